#!/usr/bin/env python3
"""Reads vindexes with the `gguf` package, part by part, and compares them with what llama.cpp's converter writes.

    check.py --larql PATH --goldens DIR --models DIR [--also MODEL_DIR ...]

Every model of DIR that has a golden is extracted with recipe f32 and every part opened by GGUFReader: names,
shapes, types and the bytes of each tensor must be those of the golden, metadata too, but for the names that derive
from a folder. Then each model is extracted with every other recipe and every part must open and hold what
index.json says. Models of --also have no golden; they are opened only. Ends with 'N passed, N failed'.
"""
import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
from gguf import GGUFReader, GGUFValueType

RECIPES = ["f32", "bf16", "f16", "q8_0", "q4k"]
# The converter makes these from the name of the folder it was given; ours come from the model's name.
NAMES = {"general.name", "general.basename", "general.finetune", "general.organization", "general.version"}
# What we add, where llama.cpp ignores what it does not know.
OURS = {"tokenizer.huggingface.json", "llama.attention.sliding_window", "split.no", "split.count", "split.tensors.count"}


def canonical(values):
    """Arrays as the goldens hash them: JSON, a float as the double nearest to its float32."""
    plain = [float(v) if isinstance(v, (float, numpy.floating)) else v.item() if isinstance(v, numpy.generic) else v for v in values]
    return hashlib.sha256(json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def field_value(field):
    if field.types[0] == GGUFValueType.ARRAY:
        return {"type": "ARRAY", "elem": field.types[1].name, "values": field.contents()}
    return {"type": field.types[0].name, "value": field.contents()}


def read(vindex):
    """Metadata of the first part and the tensors of all parts."""
    index = json.loads((vindex / "index.json").read_text())
    metadata, tensors = {}, {}
    for number, part in enumerate(index["parts"]):
        reader = GGUFReader(vindex / part["file"])
        fields = {name: field_value(f) for name, f in reader.fields.items() if not name.startswith("GGUF.")}
        assert fields["split.no"]["value"] == number, (part["file"], fields["split.no"])
        assert fields["split.count"]["value"] == len(index["parts"]), (part["file"], fields["split.count"])
        if number == 0:
            metadata = fields
            assert not reader.tensors, "part 1 has tensors"
        for tensor in reader.tensors:
            assert tensor.name not in tensors, f"{tensor.name} is in two parts"
            tensors[tensor.name] = {
                "ne": [int(n) for n in tensor.shape],
                "type": tensor.tensor_type.name,
                "sha256": hashlib.sha256(tensor.data.tobytes()).hexdigest(),
            }
    listed = {t["name"]: (t["ne"], t["type"]) for t in index["tensors"]}
    found = {name: (t["ne"], t["type"]) for name, t in tensors.items()}
    assert listed == found, f"index.json and the parts differ: {sorted(k for k in set(listed) | set(found) if listed.get(k) != found.get(k))}"
    return metadata, tensors


def compare(golden, metadata, tensors):
    wrong = []
    for name in sorted(set(golden["metadata"]) | set(metadata)):
        want, got = golden["metadata"].get(name), metadata.get(name)
        if name in NAMES or (want is None and name in OURS):
            continue
        if want is None or got is None:
            wrong.append(f"{name}: converter {want}, ours {got and str(got)[:80]}")
        elif want["type"] == "ARRAY" and "sha256_canonical_json" in want:
            ours = {"type": "ARRAY", "elem": got.get("elem"), "len": len(got["values"]), "sha256_canonical_json": canonical(got["values"])}
            if ours != want:
                wrong.append(f"{name}: converter {want}, ours {ours}")
        elif want["type"] == "ARRAY":
            if [want.get("elem"), list(want["value"])] != [got.get("elem"), list(got.get("values", []))]:
                wrong.append(f"{name}: converter {want}, ours {got}")
        elif (want["type"], want["value"]) != (got["type"], got.get("value")):
            wrong.append(f"{name}: converter {want}, ours {got}")
    # Blocks that are kept as they are have a hash of their bytes.
    wanted = {t["name"]: {"ne": t["ne"], "type": t["type"], "sha256": t.get("sha256_raw", t["sha256_f32"])} for t in golden["tensors"]}
    for name in sorted(set(wanted) | set(tensors)):
        if wanted.get(name) != tensors.get(name):
            wrong.append(f"tensor {name}: converter {wanted.get(name)}, ours {tensors.get(name)}")
    return wrong


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--larql", required=True, type=Path)
    arguments.add_argument("--goldens", required=True, type=Path)
    arguments.add_argument("--models", required=True, type=Path)
    arguments.add_argument("--family", required=True, action="append", help="a golden that must be there")
    arguments.add_argument("--also", action="append", type=Path, default=[])
    given = arguments.parse_args()
    models = [(given.models / family, given.goldens / f"{family}.json") for family in given.family]
    models += [(path, None) for path in given.also]
    passed = failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for model, golden in models:
            for recipe in RECIPES:
                out = Path(folder) / f"{model.name}-{recipe}"
                try:
                    subprocess.run([given.larql, "extract", model, "-o", out, "--quant", recipe], check=True, capture_output=True, text=True)
                    metadata, tensors = read(out)
                    assert tensors, "no tensors"
                    wrong = compare(json.loads(golden.read_text()), metadata, tensors) if golden and recipe == "f32" else []
                except subprocess.CalledProcessError as error:
                    wrong = [error.stderr.strip() or str(error)]
                except Exception as error:  # anything the reader or a check objects to is a failure of this model
                    wrong = [f"{type(error).__name__}: {error}"]
                for line in wrong:
                    print(f"{model.name} {recipe}: {line}")
                failed += bool(wrong)
                passed += not wrong
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()
