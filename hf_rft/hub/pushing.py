"""Publishing a folder on the Hub, from a separate process that can be stopped."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, constants
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from ..utils.files import check_links
from .safe_loading import base_of, can_be_fetched, is_adapter


# Never published: files with local paths or host names, files that are private by convention, checkpoints (which
# `hub_strategy` publishes), and compiled Python.
NOT_PUSHED = [
    "*training_args.bin",
    "trainer_state.json",
    "*tfevents*",
    "_*",
    "*/_*",
    ".*",
    "*/.*",
    "checkpoint-*",
    "checkpoint_complete.json",
    "*.pyc",
]

# The default time limit: five minutes, plus the time the upload takes at 250 kB/s.
BASE_SECONDS, BYTES_PER_SECOND = 300, 250_000

_HINTS = {
    401: "Log in with `hf auth login`, or pass a token with write access.",
    403: "Your token has no write access to this repository; use one that has.",
    404: "Check the repository's name, and that your token has access to it.",
    409: "Someone changed the repository at the same time; try again.",
    429: "You have reached the Hub's rate limit; wait a few minutes.",
    507: "You have no space left on the Hub; free some in your account's settings.",
}


class PushError(RuntimeError):
    """A push failed; the message says why, and how to try again."""


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    path_in_repo: str = "",
    repo_type: str = "model",
    space_sdk: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload with hf_rft",
    timeout: float | None = None,
    ignore_patterns: Sequence[str] = NOT_PUSHED,
    progress_bar: bool = True,
) -> CommitInfo:
    """Upload a folder, without the files that should stay private ([`NOT_PUSHED`]). Creates a missing repository.

    The upload runs in a separate process, which is stopped after `timeout` seconds. The folder is not changed.

    Args:
        folder (`str`):
            The folder to upload.
        repo_id (`str`):
            `"name"` or `"namespace/name"`.
        path_in_repo (`str`, *optional*):
            Where to put it in the repository.
        repo_type, space_sdk, revision, private, token, commit_message:
            As in `huggingface_hub`. A missing branch is created.
        timeout (`float`, *optional*):
            In seconds. Defaults to five minutes plus the time the upload takes at 250 kB/s.
        ignore_patterns (`Sequence[str]`, *optional*):
            Files to leave out.
        progress_bar (`bool`, *optional*, defaults to `True`):
            Show the upload's progress.

    Raises:
        ValueError: if there is nothing to upload, a link leads out of the folder, it holds an adapter of a model that
            is not published, or `repo_id` is not a valid name.
        PushError: if the push fails.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder={str(folder)!r}` is not a folder.")
    check_links(folder)
    if is_adapter(folder) and not can_be_fetched(base := base_of(folder)[0]):
        raise ValueError(
            f"{folder} holds an adapter of the base model {base!r}, which is not on the Hub; push the merged model "
            "instead (`load_robust_model(..., merge=True)`)."
        )
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    names = list(filter_repo_objects(names, ignore_patterns=list(ignore_patterns)))
    if not names:
        raise ValueError(f"`folder={str(folder)!r}` has nothing to upload.")
    validate_repo_id(repo_id)
    if timeout is None:
        timeout = BASE_SECONDS + sum((folder / name).stat().st_size for name in names) / BYTES_PER_SECOND
    where = {"repo_type": repo_type, "revision": revision, "private": private, "space_sdk": space_sdk}
    upload = {"folder_path": str(folder), "path_in_repo": path_in_repo, "commit_message": commit_message}
    upload["ignore_patterns"] = list(ignore_patterns)
    try:
        commit = _run_upload_process(token, timeout, progress_bar, repo_id=repo_id, folder=upload, **where)
    except _UploadError as error:
        again = {**where, "path_in_repo": path_in_repo}
        arguments = "".join(f", {key}={value!r}" for key, value in again.items() if value not in (None, "", "model"))
        raise PushError(
            f"The push to {repo_id} failed: {error}\n"
            f"Nothing is lost: all files are in {folder}, and a commit is on the Hub as a whole or not at all.\n"
            f"To try again: hf_rft.hub.push_folder({str(folder)!r}, {repo_id!r}{arguments})."
        ) from error
    return CommitInfo(commit_message=commit_message, commit_description="", **commit)


def create_repo(
    repo_id: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None
) -> str:
    """Create a model repository, and the branch `revision`, if they do not exist; returns the repository's full name.

    Raises:
        PushError: if the repository cannot be created.
    """
    try:
        return _run_upload_process(token, timeout=60, repo_id=repo_id, private=private, revision=revision)["repo_id"]
    except _UploadError as error:
        raise PushError(
            f"The repository {repo_id} could not be created: {error}\n"
            "You can train without `push_to_hub`, and publish the output folder afterwards with "
            "`hf_rft.hub.push_folder`."
        ) from error


class _UploadError(Exception):
    """What went wrong, and what to do about it."""


def _run_upload_process(
    token: str | None, timeout: float, progress_bar: bool = False, **request: Any
) -> dict[str, str]:
    """The result of `push` in upload_process.py, which is stopped after `timeout` seconds."""
    silent = {} if progress_bar else {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    try:
        process = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("upload_process.py"))],
            input=json.dumps({**request, "token": token}),
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout,
            env={**os.environ, **silent},
        )
    except subprocess.TimeoutExpired as error:
        raise _UploadError(
            f"it had not finished after {timeout:.0f} seconds. The connection is slow or stalled; allow more time "
            "with `timeout`, or set HF_HUB_DISABLE_XET=1 if the server does not support Xet."
        ) from error
    try:
        answer = json.loads(process.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError) as error:
        raise _UploadError(f"the upload exited with status {process.returncode}; see its output.") from error
    if "error" not in answer:
        return answer["result"]
    status, message = answer["error"]["status"], answer["error"]["message"].rstrip(".")
    if status is None:
        raise _UploadError(f"{answer['error']['type']}: {message}. Check the connection to {constants.ENDPOINT}.")
    hint = _HINTS.get(status, "The problem is on the Hub's side; try again later." if status >= 500 else "")
    raise _UploadError(f"the Hub answered {status}: {message}. {hint}".rstrip())
