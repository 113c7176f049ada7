"""Drives a running registry with the real huggingface_hub client: check.py URL [TOKEN]

Every step asserts what the client hands back, byte for byte where it hands back bytes. The registry's user is the one
that whoami names; repositories and collections of earlier runs do no harm. Ends with 'N passed, 0 failed'.
"""

import hashlib
import os
import pathlib
import random
import shutil
import sys
import tempfile
import traceback
import uuid
import warnings

URL = sys.argv[1].rstrip("/")
TOKEN = sys.argv[2] if len(sys.argv) > 2 else "any"
WORK = pathlib.Path(tempfile.mkdtemp(prefix="registry-check-"))

# The client reads its environment when it is imported.
os.environ["HF_ENDPOINT"] = URL
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HOME"] = str(WORK / "home")
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH"):
    os.environ.pop(name, None)

import huggingface_hub  # noqa: E402
from huggingface_hub import (  # noqa: E402
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (  # noqa: E402
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

api = HfApi(endpoint=URL, token=TOKEN)
anonymous = HfApi(endpoint=URL, token=False)
run = uuid.uuid4().hex[:8]
rng = random.Random(20261121)
me = api.whoami()["name"]
# A server without a token takes everyone for its owner; then there is nobody to hide things from.
try:
    anonymous.create_repo(f"{me}/anonymous-{run}")
    open_server = True
except HfHubHTTPError:
    open_server = False

MODEL = f"{me}/check-{run}"
steps = []


def step(function):
    steps.append(function)
    return function


def raises(kind, call, status=None):
    try:
        call()
    except kind as error:
        got = error.response.status_code if hasattr(error, "response") and error.response is not None else None
        assert status is None or got == status, f"status {got}, expected {status}"
        return error
    raise AssertionError(f"no {kind.__name__}")


def fetch(path, revision=None, repo=MODEL, repo_type="model", who=TOKEN):
    cache = WORK / "caches" / uuid.uuid4().hex
    file = hf_hub_download(repo, path, revision=revision, repo_type=repo_type, cache_dir=cache, token=who)
    return pathlib.Path(file).read_bytes()


def write(folder, files):
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def read(folder):
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and ".cache" not in relative.parts:
            found[relative.as_posix()] = path.read_bytes()
    return found


CARD = b"---\nlicense: apache-2.0\nbase_model: some/base\nbase_model_relation: quantized\ntags:\n- vindex\n---\n# Card\n"
FOLDER = {
    "README.md": CARD,
    "config.json": b'{"hidden_size": 640}\n',
    "empty.txt": b"",
    "deep/er/\xc3\xa4 b+c%20.txt".encode("latin-1").decode("utf-8"): b"odd name\n",
    "model-00001-of-00002.safetensors": rng.randbytes(3_000_001),
    "model-00002-of-00002.safetensors": rng.randbytes(1),
    "big.json": b"x" * (11 << 20),
    "part.gguf": rng.randbytes(70 << 20),
}
commits = {}


@step
def create_repo():
    url = api.create_repo(MODEL)
    assert url.repo_id == MODEL and url.repo_type == "model", url
    raises(HfHubHTTPError, lambda: api.create_repo(MODEL), 409)
    assert api.create_repo(MODEL, exist_ok=True).repo_id == MODEL
    assert api.repo_exists(MODEL) and not api.repo_exists(MODEL + "-not")
    raises(ValueError, lambda: api.create_repo(f"{me}/a--b"))
    assert api.list_repo_files(MODEL) == []


@step
def upload_file():
    info = api.upload_file(path_or_fileobj=b"hello\n", path_in_repo="a/hello.txt", repo_id=MODEL, commit_message="First")
    commits["first"] = info.oid
    assert info.commit_url.endswith(f"/{MODEL}/commit/{info.oid}"), info.commit_url
    assert fetch("a/hello.txt") == b"hello\n"
    data = rng.randbytes(100_000)
    api.upload_file(path_or_fileobj=data, path_in_repo="blob.bin", repo_id=MODEL)
    assert fetch("blob.bin") == data


@step
def upload_folder():
    folder = WORK / "folder"
    write(folder, FOLDER)
    info = api.upload_folder(folder_path=folder, repo_id=MODEL, commit_message="Folder", delete_patterns="a/*")
    commits["folder"] = info.oid
    assert set(api.list_repo_files(MODEL)) == set(FOLDER) | {"blob.bin"}, api.list_repo_files(MODEL)
    for name, content in FOLDER.items():
        assert fetch(name) == content, name


@step
def upload_again_changes_nothing():
    info = api.upload_folder(folder_path=WORK / "folder", repo_id=MODEL)
    assert info.oid == commits["folder"], info
    assert api.model_info(MODEL).sha == commits["folder"]


@step
def snapshots():
    for revision, expected in (
        (None, {**FOLDER, "blob.bin": fetch("blob.bin")}),
        (commits["first"], {"a/hello.txt": b"hello\n"}),
    ):
        target = WORK / "snapshots" / str(revision)
        snapshot_download(MODEL, revision=revision, local_dir=target, token=TOKEN)
        got = read(target)
        assert got == expected, (revision, sorted(got), sorted(expected))
    cached = snapshot_download(MODEL, cache_dir=WORK / "cache", allow_patterns="*.json", token=TOKEN)
    assert set(read(pathlib.Path(cached))) == {"config.json", "big.json"}
    assert pathlib.Path(cached).name == commits["folder"]


@step
def information():
    info = api.model_info(MODEL, files_metadata=True)
    assert (info.id, info.author, info.sha, info.private, info.gated) == (MODEL, me, commits["folder"], False, False)
    assert info.card_data.license == "apache-2.0" and info.card_data.base_model == "some/base", info.card_data
    for tag in ("vindex", "license:apache-2.0", "base_model:some/base", "base_model:quantized:some/base", "safetensors"):
        assert tag in info.tags, (tag, info.tags)
    assert info.created_at is not None and info.last_modified >= info.created_at
    for sibling in info.siblings:
        if sibling.rfilename in FOLDER:
            content = FOLDER[sibling.rfilename]
            assert sibling.size == len(content), sibling
            lfs = sibling.rfilename.endswith((".safetensors", ".gguf")) or len(content) > 10 << 20
            assert (sibling.lfs is not None) == lfs, sibling
            if lfs:
                assert sibling.lfs.sha256 == hashlib.sha256(content).hexdigest()
            else:
                assert sibling.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    assert api.model_info(MODEL, revision=commits["first"]).sha == commits["first"]
    assert api.model_info(MODEL, expand=["sha"]).siblings is None
    assert MODEL in [model.id for model in api.list_models(author=me, search=f"check-{run}")]
    assert MODEL in [model.id for model in api.list_models(filter="vindex", limit=10_000)]


@step
def trees():
    flat = {entry.path: entry for entry in api.list_repo_tree(MODEL)}
    assert "deep" in flat and "deep/er" not in flat and "config.json" in flat, sorted(flat)
    everything = {entry.path: entry for entry in api.list_repo_tree(MODEL, recursive=True, expand=True)}
    assert set(everything) == set(FOLDER) | {"blob.bin", "deep", "deep/er"}, sorted(everything)
    assert everything["config.json"].last_commit.oid == commits["folder"]
    assert everything["blob.bin"].last_commit.oid not in (commits["folder"], commits["first"])
    below = [entry.path for entry in api.list_repo_tree(MODEL, "deep/er")]
    assert below == [name for name in FOLDER if name.startswith("deep/er/")], below
    raises(EntryNotFoundError, lambda: list(api.list_repo_tree(MODEL, "nowhere")), 404)
    infos = api.get_paths_info(MODEL, ["config.json", "deep", "nowhere", "part.gguf"], expand=True)
    assert [info.path for info in infos] == ["config.json", "deep", "part.gguf"], infos
    assert infos[2].lfs.size == len(FOLDER["part.gguf"]) and infos[0].size == len(FOLDER["config.json"])
    assert api.file_exists(MODEL, "config.json") and not api.file_exists(MODEL, "nowhere")


@step
def many_files_are_paged():
    name = f"{me}/many-{run}"
    api.create_repo(name)
    paths = [f"d{i % 7}/{i:05}.txt" for i in range(1500)]
    api.create_commit(
        name, [CommitOperationAdd(path, str(i).encode()) for i, path in enumerate(paths)], commit_message="Many"
    )
    assert sorted(api.list_repo_files(name)) == sorted(paths)
    expanded = [entry.path for entry in api.list_repo_tree(name, "d1", expand=True)]
    assert expanded == sorted(path for path in paths if path.startswith("d1/"))
    target = WORK / "many"
    snapshot_download(name, local_dir=target, allow_patterns="d3/*", token=TOKEN)
    assert len(read(target)) == len([path for path in paths if path.startswith("d3/")])


@step
def commits_with_all_operations():
    parent = api.model_info(MODEL).sha
    info = api.create_commit(
        MODEL,
        [
            CommitOperationAdd("new/one.txt", b"one"),
            CommitOperationDelete("big.json"),
            CommitOperationDelete("deep/"),
            CommitOperationCopy("part.gguf", "copy/part.gguf"),
            CommitOperationCopy("config.json", "copy/config.json"),
        ],
        commit_message="Title",
        commit_description="Body\nof two lines",
        parent_commit=parent,
    )
    files = set(api.list_repo_files(MODEL))
    assert {"new/one.txt", "copy/part.gguf", "copy/config.json"} <= files and "big.json" not in files, files
    assert not any(path.startswith("deep/") for path in files)
    assert fetch("copy/part.gguf") == FOLDER["part.gguf"] and fetch("copy/config.json") == FOLDER["config.json"]
    assert fetch("big.json", revision=parent) == FOLDER["big.json"]
    log = api.list_repo_commits(MODEL)
    assert (log[0].commit_id, log[0].title, log[0].message) == (info.oid, "Title", "Body\nof two lines"), log[0]
    assert [commit.commit_id for commit in log].index(commits["first"]) == len(log) - 2
    assert log[0].authors == [me]
    stale = lambda: api.create_commit(  # noqa: E731
        MODEL, [CommitOperationAdd("x", b"x")], commit_message="Stale", parent_commit=parent
    )
    raises(HfHubHTTPError, stale, 412)
    assert api.model_info(MODEL).sha == info.oid
    raises(EntryNotFoundError, lambda: api.delete_file("nowhere", MODEL), 404)
    api.delete_folder("copy", MODEL)
    assert not any(path.startswith("copy/") for path in api.list_repo_files(MODEL))


@step
def branches_and_tags():
    api.create_tag(MODEL, tag="v1.0", revision=commits["first"], tag_message="The first")
    raises(HfHubHTTPError, lambda: api.create_tag(MODEL, tag="v1.0"), 409)
    api.create_tag(MODEL, tag="v1.0", exist_ok=True)
    api.create_branch(MODEL, branch="side/line", revision="v1.0")
    raises(HfHubHTTPError, lambda: api.create_branch(MODEL, branch="side/line"), 409)
    info = api.upload_file(path_or_fileobj=b"side", path_in_repo="side.txt", repo_id=MODEL, revision="side/line")
    assert fetch("side.txt", revision="side/line") == b"side"
    assert fetch("a/hello.txt", revision="v1.0") == b"hello\n"
    assert "side.txt" not in api.list_repo_files(MODEL)
    refs = api.list_repo_refs(MODEL, include_pull_requests=True)
    branches = {ref.name: (ref.ref, ref.target_commit) for ref in refs.branches}
    assert branches["side/line"] == ("refs/heads/side/line", info.oid) and "main" in branches, branches
    assert [(tag.name, tag.ref, tag.target_commit) for tag in refs.tags] == [("v1.0", "refs/tags/v1.0", commits["first"])]
    api.super_squash_history(MODEL, branch="side/line", commit_message="Squashed")
    log = api.list_repo_commits(MODEL, revision="side/line")
    assert [commit.title for commit in log] == ["Squashed"], log
    assert fetch("side.txt", revision="side/line") == b"side"
    api.delete_branch(MODEL, branch="side/line")
    api.delete_tag(MODEL, tag="v1.0")
    raises(RevisionNotFoundError, lambda: fetch("a/hello.txt", revision="v1.0"), 404)
    raises(HfHubHTTPError, lambda: api.delete_branch(MODEL, branch="main"), 403)
    assert api.revision_exists(MODEL, "main") and not api.revision_exists(MODEL, "side/line")


@step
def errors_are_told_apart():
    raises(RepositoryNotFoundError, lambda: api.model_info(f"{me}/no-such-{run}"))
    raises(RepositoryNotFoundError, lambda: fetch("x", repo=f"{me}/no-such-{run}"))
    raises(RevisionNotFoundError, lambda: api.model_info(MODEL, revision="no-such"))
    raises(RevisionNotFoundError, lambda: fetch("config.json", revision="f" * 40))
    cache = WORK / "no-exist"
    raises(EntryNotFoundError, lambda: hf_hub_download(MODEL, "nowhere", cache_dir=cache, token=TOKEN))
    assert list(cache.rglob(".no_exist/*/nowhere")), "the client did not learn in which commit the file is missing"
    if not open_server:
        error = raises(HfHubHTTPError, lambda: HfApi(endpoint=URL, token="wrong").model_info(MODEL), 401)
        assert "Invalid credentials" in str(error), error
        raises(HfHubHTTPError, lambda: anonymous.create_repo(f"{me}/x-{run}"), 401)


@step
def cards_are_checked():
    def upload(card):
        return api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=MODEL)

    before = api.model_info(MODEL).sha
    for card in (b"---\n- a list\n---\n", b"---\na: [\n---\n", b"---\nlicense: 7\n---\n", b"---\nbase_model: {a: b}\n---\n"):
        error = raises(ValueError, lambda card=card: upload(card))
        assert "Invalid metadata in README.md" in str(error), error
    assert api.model_info(MODEL).sha == before
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        upload(b"# no metadata\n")
    assert any("metadata" in str(warning.message) for warning in caught), caught
    upload(CARD)


@step
def private_and_gated():
    name = f"{me}/private-{run}"
    api.create_repo(name, private=True)
    api.upload_file(path_or_fileobj=b"secret", path_in_repo="s.txt", repo_id=name)
    assert api.model_info(name).private and fetch("s.txt", repo=name) == b"secret"
    api.auth_check(name)
    api.auth_check(name, write=True)
    if not open_server:
        raises(RepositoryNotFoundError, lambda: anonymous.model_info(name), 401)
        raises(RepositoryNotFoundError, lambda: fetch("s.txt", repo=name, who=False))
        raises(RepositoryNotFoundError, lambda: anonymous.auth_check(name))
        assert name not in [model.id for model in anonymous.list_models(author=me)]
    api.update_repo_settings(name, private=False, gated="auto")
    assert api.model_info(name).gated == "auto"
    if not open_server:
        assert anonymous.model_info(name).gated == "auto"
        raises(GatedRepoError, lambda: fetch("s.txt", repo=name, who=False))
        raises(GatedRepoError, lambda: anonymous.auth_check(name))
    api.update_repo_settings(name, gated=False)
    assert fetch("s.txt", repo=name, who=False) == b"secret"


@step
def other_kinds_and_moving():
    name, moved = f"{me}/data-{run}", f"other-org/moved-{run}"
    data = rng.randbytes(50_000)
    assert api.create_repo(name, repo_type="dataset").repo_type == "dataset"
    api.upload_file(path_or_fileobj=data, path_in_repo="d.parquet", repo_id=name, repo_type="dataset")
    assert fetch("d.parquet", repo=name, repo_type="dataset") == data
    assert not api.repo_exists(name)
    api.move_repo(name, moved, repo_type="dataset")
    assert fetch("d.parquet", repo=moved, repo_type="dataset") == data
    assert not api.repo_exists(name, repo_type="dataset")
    assert "other-org" in [org["name"] for org in api.whoami()["orgs"]]
    raises(HfHubHTTPError, lambda: api.move_repo(moved, moved, repo_type="dataset"), 409)
    api.delete_repo(moved, repo_type="dataset")
    raises(RepositoryNotFoundError, lambda: api.delete_repo(moved, repo_type="dataset"))
    api.delete_repo(moved, repo_type="dataset", missing_ok=True)


@step
def collections():
    title = f"Check {run}: Ünï & co"
    made = api.create_collection(title, namespace=me, description="What the check filed")
    assert made.slug.startswith(f"{me}/check-{run}") and made.items == [] and made.title == title, made
    raises(HfHubHTTPError, lambda: api.create_collection(title, namespace=me), 409)
    assert api.create_collection(title, namespace=me, exists_ok=True).slug == made.slug
    with_item = api.add_collection_item(made.slug, item_id=MODEL, item_type="model", note="A note")
    assert [(item.item_id, item.item_type, item.note) for item in with_item.items] == [(MODEL, "model", "A note")]
    raises(HfHubHTTPError, lambda: api.add_collection_item(made.slug, item_id=MODEL, item_type="model"), 409)
    api.add_collection_item(made.slug, item_id=MODEL, item_type="model", exists_ok=True)
    raises(HfHubHTTPError, lambda: api.add_collection_item(made.slug, item_id=f"{me}/no-{run}", item_type="model"), 404)
    others = [f"{me}/many-{run}", f"{me}/private-{run}"]
    for other in others:
        api.add_collection_item(made.slug, item_id=other, item_type="model")
    items = api.get_collection(made.slug).items
    assert [item.item_id for item in items] == [MODEL, *others]
    api.update_collection_item(made.slug, items[2].item_object_id, position=0, note="Up")
    items = api.get_collection(made.slug).items
    assert [item.item_id for item in items] == [others[1], MODEL, others[0]] and items[0].note == "Up"
    api.delete_collection_item(made.slug, items[2].item_object_id)
    raises(HfHubHTTPError, lambda: api.delete_collection_item(made.slug, items[2].item_object_id), 404)
    changed = api.update_collection_metadata(made.slug, title=f"Changed {run}", theme="pink", description="New")
    assert (changed.title, changed.theme, changed.description) == (f"Changed {run}", "pink", "New")
    assert changed.slug[-24:] == made.slug[-24:] and changed.slug != made.slug
    assert len(api.get_collection(made.slug).items) == 2
    listed = [collection for collection in api.list_collections(owner=me) if collection.slug == changed.slug]
    assert len(listed) == 1 and len(listed[0].items) == 2, listed
    holding = list(api.list_collections(owner=me, item=f"models/{MODEL}"))
    assert [collection.slug for collection in holding] == [changed.slug], holding
    raises(HfHubHTTPError, lambda: api.create_collection("t", namespace=me, description="d" * 151), 400)
    api.delete_collection(made.slug)
    raises(HfHubHTTPError, lambda: api.get_collection(made.slug), 404)


@step
def ranges():
    url = f"{URL}/{MODEL}/resolve/main/part.gguf"
    from huggingface_hub.utils import get_session

    def get(**headers):
        headers = {"Authorization": f"Bearer {TOKEN}", "Accept-Encoding": "identity", **headers}
        return get_session().get(url, headers=headers)

    content = FOLDER["part.gguf"]
    answer = get(Range="bytes=1000000-1999999")
    assert answer.status_code == 206 and answer.content == content[1_000_000:2_000_000]
    assert answer.headers["Content-Range"] == f"bytes 1000000-1999999/{len(content)}"
    assert get(Range=f"bytes={len(content) - 5}-").content == content[-5:] == get(Range="bytes=-5").content
    assert get(Range=f"bytes={len(content)}-").status_code == 416
    assert get(**{"If-None-Match": answer.headers["ETag"]}).status_code == 304
    meta = huggingface_hub.get_hf_file_metadata(url, token=TOKEN)
    assert (meta.size, meta.etag) == (len(content), hashlib.sha256(content).hexdigest()), meta
    assert meta.commit_hash == api.model_info(MODEL).sha and meta.xet_file_data is None


@step
def files_through_the_file_system():
    from huggingface_hub import HfFileSystem

    fs = HfFileSystem(endpoint=URL, token=TOKEN)
    assert fs.cat_file(f"{MODEL}/config.json") == FOLDER["config.json"]
    with fs.open(f"{MODEL}/part.gguf", "rb") as file:
        file.seek(12_345)
        assert file.read(1000) == FOLDER["part.gguf"][12_345:13_345]
    assert f"{MODEL}/config.json" in fs.ls(MODEL, detail=False)


@step
def delete_everything():
    api.delete_repo(MODEL)
    assert not api.repo_exists(MODEL)
    raises(RepositoryNotFoundError, lambda: fetch("config.json"))
    for name in (f"{me}/many-{run}", f"{me}/private-{run}", f"{me}/anonymous-{run}"):
        api.delete_repo(name, missing_ok=True)


def main():
    failed = 0
    for function in steps:
        try:
            function()
            print(f"ok      {function.__name__}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {function.__name__}\n{traceback.format_exc()}", flush=True)
    shutil.rmtree(WORK, ignore_errors=True)
    kind = "without a token" if open_server else "with a token"
    print(f"huggingface_hub {huggingface_hub.__version__} against a registry {kind}:")
    print(f"{len(steps) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
