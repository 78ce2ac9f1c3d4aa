"""The Hub of `hub_server.py`, seen by a real `huggingface_hub` client, in this process and in others."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest
from conftest import make_model
from hub_server import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, HubServer, Request
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session


FILES = {"README.md": b"---\ntags: [test]\n---\n# Model", "config.json": b"{}", "logs/empty.txt": b""}
WEIGHTS = bytes(range(256)) * 1000


@pytest.fixture(autouse=True)
def without_xet(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)


@pytest.fixture
def waits(monkeypatch):
    """The seconds for which the client would have waited before it tried again."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.fixture
def folder(tmp_path):
    """What is uploaded: text, a large file and an empty one."""
    folder = tmp_path / "folder"
    (folder / "logs").mkdir(parents=True)
    for path, content in {**FILES, "model.safetensors": WEIGHTS}.items():
        (folder / path).write_bytes(content)
    return folder


def run(hub, tmp_path, code, *arguments, token=None):
    """Run Python in a process of its own, with an empty cache; what it prints last, as JSON."""
    environment = hub.environment(tmp_path / "home", token)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- Other processes ---

PUSH_AND_LOAD = """
import json, sys
from pathlib import Path
from huggingface_hub import create_branch, create_repo, create_tag, list_repo_files, snapshot_download, upload_folder

folder = Path(sys.argv[1])
create_repo("user/model")
first = upload_folder(repo_id="user/model", folder_path=folder)
create_tag("user/model", tag="v1")
create_branch("user/model", branch="with/slash")
(folder / "config.json").write_text("[]")
second = upload_folder(repo_id="user/model", folder_path=folder)
found = {}
for revision in ("main", "v1", "with/slash", first.oid, second.oid):
    snapshot = Path(snapshot_download("user/model", revision=revision))
    found[revision] = [(snapshot / "config.json").read_text(), snapshot.name]
    assert (snapshot / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
print(json.dumps([first.oid, second.oid, list_repo_files("user/model"), found]))
"""


def test_client_of_another_process(hub, tmp_path, folder):
    first, second, listed, found = run(hub, tmp_path, PUSH_AND_LOAD, folder, token=WRITE_TOKEN)
    assert found == {
        "main": ["[]", second],
        "v1": ["{}", first],
        "with/slash": ["{}", first],
        first: ["{}", first],
        second: ["[]", second],
    }
    assert set(listed) == {".gitattributes", "README.md", "config.json", "logs/empty.txt", "model.safetensors"}
    repository = hub.repo("models", "user/model")
    assert repository.files("v1")["config.json"] == b"{}"
    assert repository.files() == {**repository.files("v1"), "config.json": b"[]"}
    # The weights were there the second time, the other files were sent with the commit.
    assert [hub.count(stage) for stage in ("create", "lfs_batch", "lfs_put", "lfs_verify", "commit")] == [
        1,
        2,
        1,
        1,
        2,
    ]
    assert hub.requests[0] == Request("create", "POST", "/api/repos/create")


LOAD_MODEL_AND_DATA = """
import json
from datasets import load_dataset
from transformers import AutoConfig, AutoModelForImageClassification, pipeline

AutoConfig.from_pretrained("user/vit", revision="v1")
model = AutoModelForImageClassification.from_pretrained("user/vit", revision="v1")
classifier = pipeline(model="user/vit", revision="v1")
rows = load_dataset("user/data", split="train")["number"][:]
print(json.dumps([sum(weight.sum().item() for weight in model.parameters()), classifier.task, rows]))
"""


def test_transformers_and_datasets(hub, api, tmp_path, processor):
    model = make_model("vit")
    model.save_pretrained(tmp_path / "vit")
    processor.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit/README.md").write_text(
        "---\nlibrary_name: transformers\npipeline_tag: image-classification\n---\n"
    )
    api.create_repo("user/vit", private=True)
    api.upload_folder(repo_id="user/vit", folder_path=tmp_path / "vit")
    api.create_tag("user/vit", tag="v1")
    hub.create("datasets", "user/data", {"train.jsonl": b'{"number": 1}\n{"number": 2}\n'})
    total, task, rows = run(hub, tmp_path, LOAD_MODEL_AND_DATA, token=READ_TOKEN)
    assert total == pytest.approx(sum(weight.sum().item() for weight in model.parameters()))
    assert task == "image-classification"
    assert rows == [1, 2]


def test_environment_of_other_processes(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "a token of the person who runs the tests")
    monkeypatch.setenv("HF_HUB_CACHE", "their cache")
    environment = hub.environment(tmp_path)
    assert "HF_TOKEN" not in environment and "HF_HUB_CACHE" not in environment
    assert hub.environment(tmp_path, READ_TOKEN)["HF_TOKEN"] == READ_TOKEN


# --- Repositories ---


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_kinds_of_repositories(hub, api, folder, tmp_path, kind):
    sdk = {"space_sdk": "gradio"} if kind == "space" else {}
    url = api.create_repo("user/name", repo_type=kind, **sdk)
    assert (url.repo_id, url.repo_type) == ("user/name", kind)
    commit = api.upload_folder(repo_id="user/name", folder_path=folder, repo_type=kind)
    info = api.repo_info("user/name", repo_type=kind, files_metadata=True)
    assert (info.sha, info.private, info.tags) == (commit.oid, False, ["test"])
    sizes = {file.rfilename: file.size for file in info.siblings}
    assert sizes["model.safetensors"] == len(WEIGHTS) and sizes["logs/empty.txt"] == 0
    snapshot = Path(api.snapshot_download("user/name", repo_type=kind, cache_dir=tmp_path / "cache"))
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.repo(f"{kind}s", "user/name").sdk == sdk.get("space_sdk")


def test_create_again(hub, api):
    url = api.create_repo("user/name")
    assert api.create_repo("user/name", exist_ok=True) == url
    with pytest.raises(HfHubHTTPError, match="You already created this model repo"):
        api.create_repo("user/name")


def test_nothing_new(hub, api, folder):
    """Neither weights nor a commit."""
    api.create_repo("user/name")
    first = api.upload_folder(repo_id="user/name", folder_path=folder)
    again = api.upload_folder(repo_id="user/name", folder_path=folder)
    assert again.oid == first.oid
    assert hub.count("lfs_put") == hub.count("commit") == 1


def test_commits_never_change(hub, api):
    repository = hub.create("models", "user/name", {"a": b"1", "b/c": b"2", "b/d": b"3"})
    before = repository.branches["main"]
    delete = [CommitOperationDelete("a"), CommitOperationDelete("b/")]
    commit = api.create_commit("user/name", operations=delete, commit_message="Away", parent_commit=before)
    assert repository.commits[commit.oid].title == "Away"
    assert set(repository.files()) == {".gitattributes"}
    assert repository.files(before)["b/d"] == b"3"
    with pytest.raises(HfHubHTTPError, match="(?s)412.*A commit has happened since"):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="user/name", parent_commit=before)
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("a", "user/name")


def test_branches_and_tags(hub, api):
    repository = hub.create("models", "user/name", {"a": b"1"})
    api.create_branch("user/name", branch="old")
    api.create_tag("user/name", tag="v1", revision="old")
    repository.add({"a": b"2"})
    api.upload_file(path_or_fileobj=b"3", path_in_repo="a", repo_id="user/name", revision="old")
    assert [repository.files(revision)["a"] for revision in ("v1", "main", "old")] == [b"1", b"2", b"3"]
    refs = api.list_repo_refs("user/name")
    assert [branch.name for branch in refs.branches] == ["main", "old"]
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", repository.tags["v1"])]
    with pytest.raises(HfHubHTTPError, match="(?s)409.*Reference already exists: v1"):
        api.create_tag("user/name", tag="v1")
    with pytest.raises(BadRequestError, match="v1 is not a branch"):
        api.upload_file(path_or_fileobj=b"3", path_in_repo="a", repo_id="user/name", revision="v1")
    api.delete_tag("user/name", tag="v1")
    api.delete_branch("user/name", branch="old")
    for missing in ("v1", "old"):
        with pytest.raises(RevisionNotFoundError):
            api.model_info("user/name", revision=missing)


def test_listings(hub, api):
    hub.create("models", "user/name", {"a": b"1", "b/c": b"22", "b/d/e.bin": WEIGHTS})

    def listed(**options):
        return {entry.path for entry in api.list_repo_tree("user/name", **options)}

    assert listed() == {".gitattributes", "a", "b"}
    assert listed(path_in_repo="b") == {"b/c", "b/d"}
    assert listed(recursive=True) == {".gitattributes", "a", "b", "b/c", "b/d", "b/d/e.bin"}
    with pytest.raises(EntryNotFoundError):
        listed(path_in_repo="x")
    large, regular, directory = api.get_paths_info("user/name", ["b/d/e.bin", "a", "b", "not there"])
    assert large.lfs.size == large.size == len(WEIGHTS) and regular.lfs is None and directory.path == "b"


def test_what_is_not_there(hub, api, tmp_path):
    repository = hub.create("models", "user/name")
    options = {"cache_dir": tmp_path}
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("user/name", "config.json", **options)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("user/name", "config.json", revision="v1", **options)
    for id in ("user/other", "gpt2"):
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download(id, "config.json", **options)
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(id, token=False)
    # The client remembers that the commit has no such file.
    assert (tmp_path / f"models--user--name/.no_exist/{repository.branches['main']}/config.json").is_file()


def test_large_files_arrive_whole_or_not_at_all(hub, api):
    hub.create("models", "user/name")
    weights = CommitOperationAdd("model.safetensors", WEIGHTS)
    api.preupload_lfs_files("user/name", [weights], free_memory=False)
    put = next(request for request in hub.requests if request.stage == "lfs_put")
    assert get_session().put(hub.endpoint + put.path, content=WEIGHTS[:-1]).status_code == 400
    assert get_session().put(hub.endpoint + put.path, content=WEIGHTS[::-1]).status_code == 400
    hub.repo("models", "user/name").objects.clear()
    with pytest.raises(BadRequestError, match="pointed to a file that does not exist.*model.safetensors"):
        api.create_commit("user/name", operations=[weights], commit_message="Without weights")
    assert set(hub.repo("models", "user/name").files()) == {".gitattributes"}


def test_ranges(hub):
    hub.create("models", "user/name", {"a": b"0123456789"})

    def part(wanted):
        response = get_session().get(f"{hub.endpoint}/user/name/resolve/main/a", headers={"Range": wanted})
        return response.status_code, response.headers.get("Content-Range"), response.content

    assert part("bytes=4-") == (206, "bytes 4-9/10", b"456789")
    assert part("bytes=0-0") == (206, "bytes 0-0/10", b"0")
    assert part("bytes=10-")[:2] == (416, "bytes */10")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("tags: [a", "YAML"),
        ("- tags", "must be a mapping"),
        (
            "model-index: [{name: x, results: [{task: {type: t}, dataset: {type: d}, metrics: [{type: m}]}]}]",
            r'results\[0\].dataset.name" is required.*metrics\[0\].value" is required',
        ),
    ],
)
def test_cards_are_validated(hub, api, metadata, message):
    hub.create("models", "user/name")
    with pytest.raises(ValueError, match=f"(?s)Invalid metadata in README.md.*{message}"):
        api.upload_file(
            path_or_fileobj=f"---\n{metadata}\n---\n".encode(), path_in_repo="README.md", repo_id="user/name"
        )
    assert hub.count("commit") == 0


# --- Who may do what ---


def test_tokens(hub, folder):
    hub.create("models", "user/name", FILES)
    owner = HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)
    assert owner.whoami()["name"] == "user"
    assert HfApi(endpoint=hub.endpoint, token=READ_TOKEN).whoami()["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        owner.whoami(token="hf_wrong")
    for token, status in ((READ_TOKEN, 403), (OTHER_TOKEN, 403), (False, 401), ("hf_wrong", 401)):
        api = HfApi(endpoint=hub.endpoint, token=token)
        with pytest.raises(HfHubHTTPError, match=f"{status}"):
            api.create_repo("user/new")
        with pytest.raises(HfHubHTTPError, match=f"{status}"):
            api.upload_folder(repo_id="user/name", folder_path=folder)
        with pytest.raises(HfHubHTTPError, match=f"{status}"):
            api.create_tag("user/name", tag="v1")
    assert hub.count("commit") == 0
    assert list(hub.repositories) == [("models", "user/name")]


def test_another_user():
    with HubServer(user="my-name") as hub:
        api = HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)
        assert api.create_repo("name").repo_id == "my-name/name"
        with pytest.raises(HfHubHTTPError, match='403.*namespace "user"'):
            api.create_repo("user/name")


def test_private_repositories(hub, api, tmp_path):
    api.create_repo("user/name", private=True)
    for token in (OTHER_TOKEN, False):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("user/name", token=token)
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download("user/name", ".gitattributes", token=token, cache_dir=tmp_path)
    assert api.model_info("user/name", token=READ_TOKEN).private
    assert Path(api.hf_hub_download("user/name", ".gitattributes", token=READ_TOKEN, cache_dir=tmp_path)).is_file()


def test_gated_repositories(hub, api, tmp_path):
    hub.create("models", "user/name")
    api.update_repo_settings("user/name", gated="manual")
    for token, status in ((OTHER_TOKEN, 403), (False, 401)):
        assert api.model_info("user/name", token=token).gated == "manual"
        with pytest.raises(GatedRepoError, match=str(status)):
            api.hf_hub_download("user/name", ".gitattributes", token=token, cache_dir=tmp_path)
    assert Path(api.hf_hub_download("user/name", ".gitattributes", token=READ_TOKEN, cache_dir=tmp_path)).is_file()
    api.update_repo_settings("user/name", gated=False, visibility="private")
    assert hub.repo("models", "user/name").private and not hub.repo("models", "user/name").gated


# --- Failures ---


@pytest.mark.parametrize("status", [401, 403, 409, 500])
@pytest.mark.parametrize("stage", ["create", "validate", "commit", "branch", "info"])
def test_errors(hub, api, waits, stage, status):
    """In these stages the client does not try again."""
    repository = hub.create("models", "user/name")
    hub.fail(stage, status=status)
    call = {
        "create": lambda: api.create_repo("user/new"),
        "branch": lambda: api.create_branch("user/name", branch="new"),
        "info": lambda: api.model_info("user/name"),
    }.get(
        stage,
        lambda: api.upload_file(path_or_fileobj=FILES["README.md"], path_in_repo="README.md", repo_id="user/name"),
    )
    with pytest.raises(HfHubHTTPError, match="Injected by the test") as caught:
        call()
    # What the client makes of any 401 about a repository.
    assert isinstance(caught.value, RepositoryNotFoundError) == (status == 401 and stage not in ("create", "validate"))
    assert hub.count(stage) == 1 and waits == []
    assert len(repository.commits) == len(repository.branches) == len(hub.repositories) == 1
    hub.heal()
    call()


@pytest.mark.parametrize("status", [429, 500])
@pytest.mark.parametrize("stage", ["preupload", "lfs_batch", "lfs_put", "lfs_verify"])
def test_errors_after_which_the_client_tries_again(hub, api, waits, folder, stage, status):
    repository = hub.create("models", "user/name")
    hub.fail(stage, status=status, times=1)
    api.upload_folder(repo_id="user/name", folder_path=folder)
    assert waits == [1] and hub.count(stage) == 2
    assert repository.files()["model.safetensors"] == WEIGHTS

    (folder / "model.safetensors").write_bytes(WEIGHTS * 2)
    hub.fail(stage, status=status)
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        api.upload_folder(repo_id="user/name", folder_path=folder)
    assert waits == [1, 1, 2, 4, 8, 8] and hub.count(stage) == 8
    assert repository.files()["model.safetensors"] == WEIGHTS


def test_headers_of_an_error(hub, api, waits, folder):
    hub.create("models", "user/name")
    hub.fail("preupload", status=429, times=1, headers={"Retry-After": "30"})
    api.upload_folder(repo_id="user/name", folder_path=folder)
    assert waits == [31]


def test_filters(hub, api, waits, tmp_path):
    hub.create("models", "user/name", {"a": b"1", "b": b"2"})
    hub.fail("resolve", status=500, path="/b", method="GET")
    api.hf_hub_download("user/name", "a", cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.hf_hub_download("user/name", "b", cache_dir=tmp_path)
    assert hub.count("resolve", "HEAD") == hub.count("resolve", "GET") == 2
    with pytest.raises(ValueError, match="no stage 'download'"):
        hub.fail("download")


@pytest.mark.parametrize("stage", ["create", "commit", "info"])
def test_connection_lost(hub, api, stage):
    repository = hub.create("models", "user/name")
    hub.fail(stage, drop=True)
    with pytest.raises(httpx2.TransportError):
        if stage == "create":
            api.create_repo("user/new")
        elif stage == "commit":
            api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="user/name")
        else:
            api.model_info("user/name")
    assert hub.count(stage) == 1
    assert len(repository.commits) == len(hub.repositories) == 1


def test_connection_lost_in_the_middle_of_an_upload(hub, api, waits, folder):
    repository = hub.create("models", "user/name")
    hub.fail("lfs_put", drop=True, times=1)
    api.upload_folder(repo_id="user/name", folder_path=folder)
    assert hub.count("lfs_put") == 2 and repository.files()["model.safetensors"] == WEIGHTS

    (folder / "model.safetensors").write_bytes(WEIGHTS * 20)  # more than fits into the buffers of the connection
    hub.fail("lfs_put", drop=True)
    with pytest.raises(RuntimeError, match="Error while uploading 'model.safetensors'"):
        api.upload_folder(repo_id="user/name", folder_path=folder)
    assert hub.count("lfs_put") == 8 and hub.count("commit") == 1


def test_connection_lost_in_the_middle_of_a_download(hub, api, waits, tmp_path):
    hub.create("models", "user/name", {"model.safetensors": WEIGHTS * 20})
    hub.fail("resolve", drop=True, times=2, method="GET")
    path = api.hf_hub_download("user/name", "model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == WEIGHTS * 20
    assert hub.count("resolve", "GET") == 3
    hub.fail("resolve", drop=True, method="HEAD")
    with pytest.raises(httpx2.RemoteProtocolError):
        api.hf_hub_download("user/name", "model.safetensors", cache_dir=tmp_path / "other")


def test_answer_lost(hub, api):
    """The commit is there, but the client does not learn of it."""
    repository = hub.create("models", "user/name")
    hub.fail("commit", drop="answer")
    with pytest.raises(httpx2.RemoteProtocolError):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="user/name")
    assert repository.files()["a"] == b"1"


def test_stall(hub, api, tmp_path):
    hub.create("models", "user/name")
    hub.stall("info")
    hub.stall("resolve", times=1)
    with pytest.raises(httpx2.ReadTimeout):
        api.model_info("user/name", timeout=0.1)
    # For files, the client waits for a while and tries again.
    assert Path(api.hf_hub_download("user/name", ".gitattributes", cache_dir=tmp_path, etag_timeout=0.2)).is_file()
    assert hub.count("resolve", "HEAD") == 2


def test_stall_ends_with_the_server(waits, folder):
    """The client itself never gives up."""
    errors = []

    def upload():
        try:
            api.upload_folder(repo_id="user/name", folder_path=folder)
        except RuntimeError as error:
            errors.append(error)

    with HubServer() as hub:
        api = HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)
        hub.create("models", "user/name")
        hub.stall("lfs_put")
        thread = threading.Thread(target=upload, daemon=True)
        thread.start()
        while hub.count("lfs_put") == 0 and thread.is_alive():
            thread.join(0.01)
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(10)
    assert isinstance(errors[0].__cause__, httpx2.ConnectError)
    with pytest.raises(httpx2.ConnectError):
        api.model_info("user/name")
