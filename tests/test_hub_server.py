"""What the other tests rely on of the Hub of hub_server.py, seen by a real client."""

import pytest
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError


WEIGHTS = bytes(range(256)) * 1000


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with HubServer() as hub:
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder" / "logs").mkdir(parents=True)
    (tmp_path / "folder" / "logs" / "empty.txt").touch()
    (tmp_path / "folder" / "model.safetensors").write_bytes(WEIGHTS)
    return tmp_path / "folder"


def test_what_is_uploaded_comes_back_and_is_not_sent_twice(hub, api, folder, tmp_path):
    api.create_repo("user/name", private=True)
    api.create_branch("user/name", branch="with/slash")
    commit = api.upload_folder(repo_id="user/name", folder_path=folder, revision="with/slash")
    assert api.upload_folder(repo_id="user/name", folder_path=folder, revision="with/slash").oid == commit.oid
    assert hub.count("lfs_put") == hub.count("commit") == 1
    snapshot = tmp_path / api.snapshot_download("user/name", revision="with/slash", cache_dir=tmp_path)
    assert snapshot.name == commit.oid and (snapshot / "model.safetensors").read_bytes() == WEIGHTS
    assert set(hub.repo("models", "user/name").files()) == {".gitattributes"}


def test_what_is_missing_or_forbidden_raises_the_errors_of_the_client(hub, api, folder):
    hub.create("models", "user/name", private=True)
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("user/name", "config.json", local_dir=folder)
    with pytest.raises(RevisionNotFoundError):
        api.model_info("user/name", revision="v1")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("user/name", token=False)
    for repo_id, token, status in (("user/name", READ_TOKEN, 403), ("google/x", WRITE_TOKEN, 403), ("x", False, 401)):
        with pytest.raises(HfHubHTTPError, match=str(status)):
            api.create_repo(repo_id, token=token)


def test_the_metadata_of_cards_are_validated(hub, api):
    hub.create("models", "user/name")
    card = b"---\nmodel-index: [{name: x, results: [{task: {type: t}, dataset: {type: d}}]}]\n---\n"
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="user/name")
    assert hub.count("commit") == 0


def test_faults_end_after_their_times_or_when_they_are_healed(hub, api):
    repository = hub.create("models", "user/name")
    hub.fail("info", status=500, times=1)
    with pytest.raises(HfHubHTTPError, match="(?s)500.*Injected by the test"):
        api.model_info("user/name")
    api.model_info("user/name")
    upload = {"path_or_fileobj": b"1", "path_in_repo": "a", "repo_id": "user/name"}
    for drop, arrives in ((True, False), ("answer", True)):
        hub.fail("commit", drop=drop)
        with pytest.raises(Exception, match="disconnected|closed|reset"):
            api.upload_file(**upload)
        assert ("a" in repository.files()) == arrives
    hub.heal()
    api.upload_file(**{**upload, "path_or_fileobj": b"2"})
    assert repository.files()["a"] == b"2"
    with pytest.raises(ValueError, match="no stage 'download'"):
        hub.fail("download")
