"""What talks to the Hub while something is pushed: a process of its own, which hub.py can stop.

It imports nothing but huggingface_hub, takes one request as JSON from standard input (so that a token is on no command
line), and prints one JSON line: `{"result": ...}`, or `{"error": ...}` with exit status 1.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.sha import git_hash


# Seconds without a single byte, after which a request counts as lost and is tried again. Without this the client waits
# for ever.
STALL_SECONDS = 60


def impatient_client():
    """The client's own, but with a limit."""
    client = default_client_factory()
    client.timeout = STALL_SECONDS
    return client


def create(api: HfApi, repo: dict, *, private: bool | None = None, space_sdk: str | None = None) -> str:
    """Make the repository, and the branch, if they are not there; its full name."""
    repo_id, repo_type, revision = repo["repo_id"], repo["repo_type"], repo["revision"]
    name = api.create_repo(repo_id, repo_type=repo_type, private=private, space_sdk=space_sdk, exist_ok=True).repo_id
    if revision not in (None, "main") and not revision.startswith("refs/"):
        api.create_branch(name, branch=revision, repo_type=repo_type, exist_ok=True)
    return name


def push(
    api: HfApi,
    repo: dict,
    *,
    folder: str,
    path_in_repo: str,
    ignore_patterns: list[str],
    commit_message: str,
    private: bool | None = None,
    space_sdk: str | None = None,
) -> dict[str, str]:
    repo = {**repo, "repo_id": create(api, repo, private=private, space_sdk=space_sdk)}
    commit = api.upload_folder(
        folder_path=folder,
        path_in_repo=path_in_repo,
        ignore_patterns=ignore_patterns,
        commit_message=commit_message,
        **repo,
    )
    return {"commit_url": commit.commit_url, "oid": commit.oid, "_endpoint": api.endpoint}


def missing(api: HfApi, repo: dict, *, folder: str, files: dict[str, str]) -> list[str]:
    """Those of `files` (path in folder -> path in repository) that the repository does not have as they are."""
    known = {file.path: file for file in api.get_paths_info(paths=list(files.values()), **repo)}
    return [
        name
        for name, path in files.items()
        if not (isinstance(file := known.get(path), RepoFile) and _is_same(Path(folder, name), file))
    ]


def _is_same(path: Path, file: RepoFile) -> bool:
    if path.stat().st_size != file.size:
        return False
    if file.lfs is None:
        return git_hash(path.read_bytes()) == file.blob_id
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == file.lfs.sha256


def describe(error: Exception, token: str | None = None) -> dict[str, Any]:
    """The error, with the status of the Hub's answer if there was one, and without the token."""
    found = _describe(error)
    if token:  # the client quotes a header that it cannot send; the repr of a token may differ from it
        for secret in (token, repr(token)[1:-1], token.strip()):
            found["message"] = found["message"].replace(secret, "<token>") if secret else found["message"]
    return found


def _describe(error: Exception) -> dict[str, Any]:
    cause: BaseException | None = error
    while cause is not None:  # the client wraps what happened to a single file
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            message = cause.server_message or str(cause).splitlines()[0]
            return {"type": type(cause).__name__, "status": cause.response.status_code, "message": message}
        cause = cause.__cause__ or cause.__context__
    return {"type": type(error).__name__, "status": None, "message": str(error) or repr(error)}


def main() -> int:
    request = json.load(sys.stdin)
    set_client_factory(impatient_client)
    api = HfApi(token=request["token"], library_name="hf_rft")
    command = {"create": create, "push": push, "missing": missing}[request["command"]]
    try:
        answer, status = {"result": command(api, request["repo"], **request["options"])}, 0
    except Exception as error:
        answer, status = {"error": describe(error, request["token"] or get_token())}, 1
    sys.stdout.write(json.dumps(answer) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
