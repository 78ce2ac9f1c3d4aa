"""The program that uploads: pushing.py runs it in a separate process, which it can stop.

It depends only on huggingface_hub, reads one JSON request from standard input (which keeps the token off the command
line), and prints one line of JSON: `{"result": ...}`, or `{"error": ...}` with exit status 1.
"""

import json
import sys
from typing import Any

from huggingface_hub import HfApi, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._http import default_client_factory


# After this many seconds without a byte a request is retried. By default, the client waits forever.
STALL_SECONDS = 60


def impatient_client():
    client = default_client_factory()
    client.timeout = STALL_SECONDS
    return client


def push(
    api: HfApi,
    *,
    repo_id: str,
    repo_type: str = "model",
    revision: str | None = None,
    private: bool | None = None,
    space_sdk: str | None = None,
    folder: dict[str, Any] | None = None,
) -> dict[str, str]:
    """Create the repository and the branch if they do not exist, and upload the folder if one is given."""
    name = api.create_repo(repo_id, repo_type=repo_type, private=private, space_sdk=space_sdk, exist_ok=True).repo_id
    if revision not in (None, "main") and not revision.startswith("refs/"):
        api.create_branch(name, branch=revision, repo_type=repo_type, exist_ok=True)
    if folder is None:
        return {"repo_id": name}
    commit = api.upload_folder(repo_id=name, repo_type=repo_type, revision=revision, **folder)
    return {"commit_url": commit.commit_url, "oid": commit.oid, "_endpoint": api.endpoint}


def describe(error: Exception, token: str | None = None) -> dict[str, Any]:
    """The error, with the HTTP status if the Hub answered, and without the token."""
    status, message, cause = None, str(error) or repr(error), error
    while cause is not None:  # the client wraps errors of single files
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            status, message = cause.response.status_code, cause.server_message or str(cause).splitlines()[0]
            break
        cause = cause.__cause__ or cause.__context__
    if token:  # the client quotes a header it cannot send, with the token escaped
        for secret in filter(None, (token, repr(token)[1:-1], token.strip())):
            message = message.replace(secret, "<token>")
    return {"type": type(error).__name__, "status": status, "message": message}


def main() -> int:
    request = json.load(sys.stdin)
    token = request.pop("token")
    set_client_factory(impatient_client)
    try:
        answer, status = {"result": push(HfApi(token=token, library_name="hf_rft"), **request)}, 0
    except Exception as error:
        answer, status = {"error": describe(error, token or get_token())}, 1
    sys.stdout.write(json.dumps(answer) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
