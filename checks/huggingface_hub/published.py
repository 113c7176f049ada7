"""Our tools and the real client meet in a registry: published.py URL TOKEN LARQL MODEL_DIR

What huggingface_hub uploads, larql extracts as if it lay here; what larql publishes, huggingface_hub downloads byte
for byte, whole and as a slice. Ends with 'N passed, 0 failed'.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

URL, TOKEN, LARQL, MODEL_DIR = sys.argv[1:5]

# The client reads its environment when it is imported.
os.environ.update(HF_ENDPOINT=URL, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

from huggingface_hub import HfApi, snapshot_download  # noqa: E402


def larql(*arguments):
    done = subprocess.run([LARQL, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"larql {' '.join(map(str, arguments))} ended with {done.returncode}:\n{done.stderr}"


def contents(folder):
    """Bytes of every file below a folder, without the client's own notes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and ".cache" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def main():
    api = HfApi(endpoint=URL, token=TOKEN)
    me = api.whoami()["name"]
    passed = 0
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        os.environ["HF_HOME"] = str(work / "home")
        source, target, slice_target = f"{me}/source-model", f"{me}/model-vindex", f"{me}/model-ffn-vindex"

        api.create_repo(source)
        commit = api.upload_folder(repo_id=source, folder_path=MODEL_DIR).oid
        larql("extract", source, "-o", work / "vindex", "--quant", "q4k", "--revision", commit)
        named = work / "source-model"
        shutil.copytree(MODEL_DIR, named)
        larql("extract", named, "-o", work / "local", "--quant", "q4k")
        from_hub, from_here = (contents(work / name) for name in ("vindex", "local"))
        assert from_hub["index.json"] == from_here["index.json"], "extraction from the Hub and from here differ"
        assert json.loads(from_hub["provenance.json"])["commit"] == commit
        passed += 1

        larql("publish", work / "vindex", "--repo", target, "--slices", "none")
        snapshot = pathlib.Path(snapshot_download(target, cache_dir=work / "cache"))
        downloaded = contents(snapshot)
        downloaded.pop(".gitattributes", None)
        assert downloaded == from_hub, f"files differ: {sorted(set(downloaded) ^ set(from_hub))}"
        passed += 1

        larql("publish", work / "vindex", "--repo", slice_target, "--slices", "expert-server")
        snapshot = pathlib.Path(snapshot_download(slice_target, cache_dir=work / "cache"))
        downloaded = contents(snapshot)
        parts = json.loads(from_hub["index.json"])["parts"]
        wanted = {part["file"] for part in parts if part["component"] in ("metadata", "feed-forward")}
        assert {name for name in downloaded if name.endswith(".gguf")} == wanted and len(wanted) < len(parts)
        assert all(downloaded[name] == from_hub[name] for name in [*wanted, "index.json"])
        passed += 1

        larql("pull", slice_target, "-o", work / "pulled", "--slice", "expert-server")
        assert {name: data for name, data in contents(work / "pulled").items() if name.endswith(".gguf")} == {name: from_hub[name] for name in wanted}
        larql("verify", work / "pulled")
        passed += 1
    print(f"{passed} passed, 0 failed")


main()
