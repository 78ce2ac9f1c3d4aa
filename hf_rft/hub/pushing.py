"""Publishing a folder on the Hub, in a process of its own that can be stopped."""

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


# Never published: a pickle full of local paths, a log with the path of the best checkpoint, event files (which hold
# host names), what is private by convention, checkpoints (which `hub_strategy` publishes), and compiled Python.
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

# A push may take five minutes, and longer if there is much to send: as long as it takes at 250 kB/s.
BASE_SECONDS, BYTES_PER_SECOND = 300, 250_000

_HINTS = {
    401: "Log in with `hf auth login`, or give a token with write access.",
    403: "Your token has no write access to this repository; use one that has.",
    404: "Check the repository's name, and that your token may see it.",
    409: "Somebody changed the repository at the same time; try again.",
    429: "The Hub limits how often you may ask; wait some minutes.",
    507: "The Hub has no space left for you; free some in your account's settings.",
}


class PushError(RuntimeError):
    """A push that failed; the message says why, and how to try again."""


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
    """Upload a folder, except for what should stay private ([`NOT_PUSHED`]); makes the repository if it is not there.

    The upload runs in a process of its own, which is stopped after `timeout` seconds. The folder is only read.

    Args:
        folder (`str`):
            What to upload.
        repo_id (`str`):
            `"name"` or `"namespace/name"`.
        path_in_repo (`str`, *optional*):
            Folder in the repository.
        repo_type, space_sdk, revision, private, token, commit_message:
            As in `huggingface_hub`. A branch that is not there is made.
        timeout (`float`, *optional*):
            Seconds. None: five minutes plus the time it takes at 250 kB/s.
        ignore_patterns (`Sequence[str]`, *optional*):
            Of files to leave out.
        progress_bar (`bool`, *optional*, defaults to `True`):
            Show the upload's progress.

    Raises:
        ValueError: if there is nothing to upload, a link leads out of the folder, or a repository cannot have that
            name.
        PushError: if it did not work.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder={str(folder)!r}` is not a folder.")
    check_links(folder)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    names = list(filter_repo_objects(names, ignore_patterns=list(ignore_patterns)))
    if not names:
        raise ValueError(f"`folder={str(folder)!r}` holds nothing to upload.")
    validate_repo_id(repo_id)
    if timeout is None:
        timeout = BASE_SECONDS + sum((folder / name).stat().st_size for name in names) / BYTES_PER_SECOND
    given = {"repo_type": repo_type, "revision": revision, "private": private, "space_sdk": space_sdk}
    uploaded = {
        "folder_path": str(folder),
        "path_in_repo": path_in_repo,
        "ignore_patterns": list(ignore_patterns),
        "commit_message": commit_message,
    }
    try:
        commit = _talk_to_hub(repo_id, token, timeout, folder=uploaded, progress_bar=progress_bar, **given)
    except _HubError as error:
        unlike_defaults = {**given, "repo_type": None if repo_type == "model" else repo_type}
        again = {**unlike_defaults, "path_in_repo": path_in_repo or None}
        arguments = "".join(f", {key}={value!r}" for key, value in again.items() if value is not None)
        raise PushError(
            f"The push to {repo_id} failed: {error}\n"
            f"Nothing is lost, all files are in {folder}; a commit is on the Hub as a whole or not at all.\n"
            f"To try again: hf_rft.hub.push_folder({str(folder)!r}, {repo_id!r}{arguments})."
        ) from error
    return CommitInfo(commit_message=commit_message, commit_description="", **commit)


def create_repo(
    repo_id: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None
) -> str:
    """Make a model repository, and the branch `revision`, if they are not there; returns its full name.

    Raises:
        PushError: if that did not work.
    """
    try:
        return _talk_to_hub(repo_id, token, timeout=60, private=private, revision=revision)["repo_id"]
    except _HubError as error:
        raise PushError(
            f"The repository {repo_id} could not be made: {error}\n"
            "You can train without `push_to_hub`, and publish the output folder afterwards with "
            "`hf_rft.hub.push_folder`."
        ) from error


class _HubError(Exception):
    """What went wrong, and what to do about it."""


def _talk_to_hub(
    repo_id: str,
    token: str | None,
    timeout: float,
    *,
    folder: dict[str, Any] | None = None,
    repo_type: str = "model",
    revision: str | None = None,
    private: bool | None = None,
    space_sdk: str | None = None,
    progress_bar: bool = False,
) -> dict[str, str]:
    """Run upload_process.py, which is stopped after `timeout` seconds."""
    request = {"repo_id": repo_id, "repo_type": repo_type, "revision": revision, "private": private}
    request |= {"space_sdk": space_sdk, "folder": folder, "token": token}
    silent = {} if progress_bar else {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    try:
        process = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("upload_process.py"))],
            input=json.dumps(request),
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout,
            env={**os.environ, **silent},
        )
    except subprocess.TimeoutExpired as error:
        raise _HubError(
            f"no end after {timeout:.0f} seconds. The connection is slow or stalled; allow more time with `timeout`, "
            "or set HF_HUB_DISABLE_XET=1 if the server speaks no Xet."
        ) from error
    try:
        answer = json.loads(process.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError) as error:
        raise _HubError(f"the upload ended with status {process.returncode}; see its output.") from error
    if "error" not in answer:
        return answer["result"]
    status, message = answer["error"]["status"], answer["error"]["message"].rstrip(".")
    if status is None:
        raise _HubError(f"{answer['error']['type']}: {message}. Check the connection to {constants.ENDPOINT}.")
    hint = _HINTS.get(status, "The trouble is on the Hub's side; try later." if status >= 500 else "")
    raise _HubError(f"the Hub answered {status}: {message}. {hint}".rstrip())
