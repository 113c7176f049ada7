#!/usr/bin/env python3
"""Publishes the heads of checkpoints to a stand-in Hub and compares every tensor with reference values.

    check.py --bin PATH --larql PATH --kit DIR --fp8 DIR --models DIR --trained DIR

KIT has the stand-in Hub (hubmock.py). FP8 has whole checkpoints in FP8 with the sha256 of their dequantised weights: all
of their tensors are given the names of heads. MODELS has checkpoints with heads in bf16, which must come out byte for byte,
under the names that docs/sidecars.md gives. TRAINED is a model with a head that was trained with it: what is published guesses
for `larql run`, which must write the recorded tokens with about the recorded share of right guesses. Ends with 'N passed, N failed'.
"""
import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

MANIFEST = """models:
- key: model
  source_model: owner/model
  quant: q4k
  tier: smoke
  slices: [full]
  output_name: model.vindex
  hf_repo: acme/model-vindex
  mtp_source_repo: src/model
  mtp_sidecar_repo: acme/model-mtp
"""


def read(data):
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    metadata = header.pop("__metadata__", {})
    start = 8 + length
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = (entry["dtype"], entry["shape"], data[start + begin:start + end])
    return tensors, metadata


def renamed(data, rename):
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    header = {name if name == "__metadata__" else rename(name): entry for name, entry in header.items()}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length:]


def publish(hub_class, binary, files):
    """The sidecar of a repository of these files."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        named = {}
        for number, (name, data) in enumerate(files.items()):
            (folder / f"file-{number}").write_bytes(data)
            named[name] = {"path": f"file-{number}"}
        hub = hub_class({"repos": {"src/model": {"files": named}}}, folder).start()
        try:
            (folder / "m.yaml").write_text(MANIFEST)
            environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}
            command = [binary, "--manifest", "m.yaml", "publish", "--model", "model", "--artifact", "mtp"]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
            if done.returncode != 0:
                raise AssertionError(f"exit {done.returncode}: {done.stderr.strip()[-300:]}")
            return hub.repos["acme/model-mtp"].files["mtp.safetensors"]
        finally:
            hub.stop()


def check_fp8(hub_class, binary, checkpoint):
    expected = json.loads((checkpoint / "expected.json").read_text())["tensors"]
    files = {"config.json": (checkpoint / "config.json").read_bytes()}
    files["model.safetensors"] = renamed((checkpoint / "model.safetensors").read_bytes(), lambda name: f"mtp.{name}")
    tensors, _ = read(publish(hub_class, binary, files))
    for name, entry in expected.items():
        dtype, _, data = tensors[f"mtp.{name}"]
        assert dtype == "BF16", f"{name} is {dtype}"
        assert hashlib.sha256(data).hexdigest() == entry["sha256_bf16"], f"{name} differs"
    assert expected


def check_heads(hub_class, binary, model, prefix, target):
    files = {path.name: path.read_bytes() for path in model.iterdir() if path.name != "golden.npz"}
    tensors, metadata = read(publish(hub_class, binary, files))
    source = {}
    for name, data in files.items():
        if name.endswith(".safetensors"):
            source.update(read(data)[0])
    heads = {target + name[len(prefix):]: value for name, value in source.items() if name.startswith(prefix)}
    assert heads and set(heads) == set(tensors), f"names: {sorted(set(heads) ^ set(tensors))[:4]}"
    sums = json.loads(metadata["skulk.sha256"])
    for name, (dtype, shape, data) in heads.items():
        got = tensors[name]
        assert got[0] == "BF16" and got[1] == shape, f"{name}: {got[:2]}"
        assert dtype != "BF16" or got[2] == data, f"{name} differs"
        assert sums[name] == hashlib.sha256(got[2]).hexdigest(), f"{name}: its sum in the metadata differs"
    return metadata


def check_guesses(hub_class, binary, larql, model):
    """Greedy tokens with the published head are those that were recorded without one."""
    files = {path.name: path.read_bytes() for path in model.iterdir() if path.suffix in (".json", ".safetensors")}
    recorded = json.loads((model / "prompts.json").read_text())["prompts"]
    accepted = offered = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "mtp.safetensors").write_bytes(publish(hub_class, binary, files))
        subprocess.run([larql, "extract", model, "-o", folder / "v", "--quant", "f32"], check=True, capture_output=True, timeout=300)
        for prompt in recorded:
            # The recorded continuations are those of the prompts without the token that begins a document.
            ids = ",".join(map(str, prompt["prompt_ids"][1:]))
            command = [larql, "run", folder / "v", "--ids", ids, "--max-tokens", str(len(prompt["greedy_ids"])), "--greedy", "--ignore-eos"]
            command += ["--kv", "f32", "--draft", f"mtp={folder / 'mtp.safetensors'}", "--draft-depth", "1", "--json"]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=300).stdout)
            assert told["ids"] == prompt["greedy_ids"], f"{prompt['prompt']!r} goes on differently"
            accepted += told["guesses"]["accepted"]
            offered += told["guesses"]["tokens"]
    expected = sum(p["draft_accepted"] for p in recorded) / sum(p["draft_offered"] for p in recorded)
    found = accepted / offered
    print(f"trained head: {found:.3f} of {offered} guesses right, recorded {expected:.3f}")
    assert abs(found - expected) <= 0.03, f"{found:.3f} of the guesses are right, recorded are {expected:.3f}"


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bin", "larql", "kit", "fp8", "models", "trained"):
        arguments.add_argument(f"--{name}", required=True, type=Path)
    given = arguments.parse_args()
    sys.path.insert(0, str(given.kit))
    from hubmock import Hub
    binary = given.bin.resolve()

    def conventions(model, prefix, target, layout, norms):
        metadata = check_heads(Hub, binary, given.models / model, prefix, target)
        found = (metadata["skulk.layout"], metadata["skulk.norm_convention"], metadata["skulk.concat_order"], metadata["skulk.n_heads"])
        assert found == (layout, norms, "embed_first", "1"), found

    checks = [(f"fp8 {path.name}", lambda path=path: check_fp8(Hub, binary, path)) for path in sorted(given.fp8.iterdir())]
    for model in ("qwen3_5", "qwen3_5_moe", "qwen3_next"):
        checks.append((model, lambda model=model: conventions(model, "mtp.", "mtp.", "block", "zero_centered")))
    checks.append(("deepseek_v3", lambda: conventions("deepseek_v3", "model.layers.2.", "mtp.0.", "layers", "actual_scale")))
    checks.append(("trained head", lambda: check_guesses(Hub, binary, given.larql.resolve(), given.trained)))
    failed = 0
    for name, check in checks:
        try:
            check()
        except (AssertionError, KeyError) as error:
            failed += 1
            print(f"{name}: {error!r}")
    print(f"{len(checks) - failed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
