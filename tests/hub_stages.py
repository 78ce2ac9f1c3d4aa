"""What the Hub of `hub_server.py` answers to each kind of request, as `huggingface_hub` 2.4 expects it."""

import base64
import json
import re
from dataclasses import dataclass, field
from email.message import Message
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

from hub_repository import File, HubError, Repository, card_data, is_lfs


class Account(NamedTuple):
    name: str  # also the one namespace it owns
    may_write: bool


class Request(NamedTuple):
    stage: str
    method: str
    path: str


@dataclass
class Reply:
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


DATE = "2026-01-01T00:00:00.000Z"
BAD_TOKEN = "Invalid credentials in Authorization header"


@dataclass
class Call:
    """One request, and the Hub's answer to it.

    Each method below `# --- Stages ---` gets the groups of its pattern in `ROUTES`. It returns a `Reply`
    or what is to be sent as JSON, or raises a `HubError`.
    """

    endpoint: str
    accounts: dict[str, Account]  # by token
    repositories: dict[tuple[str, str], Repository]  # by kind and id
    method: str
    query: str
    headers: Message
    body: bytes

    def answer(self, stage: str, arguments: dict[str, str]) -> Reply:
        answer = getattr(self, stage)(**arguments)
        return answer if isinstance(answer, Reply) else Reply(json.dumps(answer).encode())

    @property
    def values(self) -> dict[str, Any]:
        """The body, where it is JSON."""
        return json.loads(self.body or b"{}")

    # --- Who may do what ---

    def account(self) -> Account | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.accounts:
            raise HubError(401, BAD_TOKEN)
        return self.accounts.get(token)

    def owns(self, namespace: str) -> bool:
        account = self.account()
        return account is not None and account.name == namespace

    def check_may_write(self, namespace: str) -> None:
        account = self.account()
        if account is None:
            raise HubError(401, "Invalid username or password.")
        if not (account.may_write and self.owns(namespace)):
            raise HubError(403, f'You don\'t have the rights to write under the namespace "{namespace}".')

    def find(self, kind: str | None, id: str, *, write: bool = False) -> Repository:
        repository = self.repositories.get((kind or "models", id))
        if repository is None or (repository.private and not self.owns(repository.namespace)):
            raise HubError(404 if self.account() else 401, "Repository not found", "RepoNotFound")
        if write:
            self.check_may_write(repository.namespace)
        return repository

    def url(self, repository: Repository) -> str:
        prefix = "" if repository.kind == "models" else f"/{repository.kind}"
        return f"{self.endpoint}{prefix}/{repository.id}"

    # --- Stages ---

    def unknown(self):
        raise HubError(404, "This server has no such page.")

    def whoami(self):
        account = self.account()
        if account is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": "write" if account.may_write else "read"}
        return {
            "type": "user",
            "name": account.name,
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": token},
        }

    def create(self):
        account = self.account()
        namespace = self.values.get("organization") or (account.name if account else "")
        self.check_may_write(namespace)
        key = kind, id = self.values.get("type", "model") + "s", f"{namespace}/{self.values['name']}"
        if key in self.repositories:
            raise HubError(409, f"You already created this {kind[:-1]} repo", url=self.url(self.repositories[key]))
        private = self.values.get("visibility") == "private"
        self.repositories[key] = Repository(kind, id, private=private, sdk=self.values.get("sdk"))
        return {"url": self.url(self.repositories[key]), "name": id}

    def settings(self, kind: str, id: str):
        repository = self.find(kind, id, write=True)
        repository.gated = self.values.get("gated", repository.gated)
        if "visibility" in self.values:
            repository.private = self.values["visibility"] == "private"
        return {"private": repository.private, "gated": repository.gated}

    def validate(self):
        card = card_data(self.values["content"].encode())
        return {"errors": [], "warnings": [] if card else [{"message": "empty or missing yaml metadata in repo card"}]}

    def preupload(self, kind: str, id: str, revision: str):
        files = self.find(kind, id, write=True).resolve(revision).files
        return {
            "files": [
                {
                    "path": wanted["path"],
                    "uploadMode": "lfs" if is_lfs(wanted["path"], wanted["size"]) else "regular",
                    "shouldIgnore": False,
                    "oid": files[wanted["path"]].oid if wanted["path"] in files else None,
                }
                for wanted in self.values["files"]
            ]
        }

    def lfs_batch(self, kind: str | None, id: str):
        repository = self.find(kind, id, write=True)
        objects = self.values["objects"]
        for wanted in objects:
            if wanted["oid"] not in repository.objects:
                repository.expected[wanted["oid"]] = wanted["size"]
                wanted["actions"] = {
                    "upload": {"href": f"{self.endpoint}/lfs/{repository.kind}/{id}/{wanted['oid']}"},
                    "verify": {"href": f"{self.url(repository)}.git/info/lfs/objects/verify"},
                }
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, kind: str, id: str, oid: str):
        # Nobody is asked for a token: on the Hub, this is a signed address in a bucket.
        repository = self.repositories[kind, id]
        if repository.expected.get(oid) != len(self.body) or File(self.body).sha256 != oid:
            raise HubError(400, f"The {len(self.body)} bytes that arrived are not those of {oid}.")
        repository.objects[oid] = self.body
        return Reply(b"")

    def lfs_verify(self, kind: str | None, id: str):
        if self.values["oid"] not in self.find(kind, id, write=True).objects:
            raise HubError(404, f"The object {self.values['oid']} has not arrived.")
        return {}

    def commit(self, kind: str, id: str, revision: str):
        repository = self.find(kind, id, write=True)
        operations = [json.loads(line) for line in self.body.splitlines()]
        for operation in operations:
            if operation["key"] == "file":
                operation["value"]["content"] = base64.b64decode(operation["value"]["content"])
        commit = repository.commit(revision, operations)
        return {"success": True, "commitOid": commit.id, "commitUrl": f"{self.url(repository)}/commit/{commit.id}"}

    def branch(self, kind: str, id: str, name: str):
        repository = self.find(kind, id, write=True)
        return self._reference(repository, repository.branches, name, self.values.get("startingPoint", "main"))

    def tag(self, kind: str, id: str, name: str):
        """`name` is the revision that gets a tag, or the tag to delete."""
        repository = self.find(kind, id, write=True)
        return self._reference(repository, repository.tags, self.values.get("tag", name), name)

    def _reference(self, repository: Repository, references: dict[str, str], name: str, revision: str):
        if self.method == "DELETE":
            repository.resolve(name)
            references.pop(name)
        elif name in references:
            raise HubError(409, f"Reference already exists: {name}")
        else:
            references[name] = repository.resolve(revision).id
        return {}

    def refs(self, kind: str, id: str):
        repository = self.find(kind, id)

        def listed(references: dict[str, str], prefix: str) -> list[dict]:
            return [{"name": name, "ref": prefix + name, "targetCommit": id} for name, id in references.items()]

        branches, tags = listed(repository.branches, "refs/heads/"), listed(repository.tags, "refs/tags/")
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    def info(self, kind: str, id: str, revision: str | None):
        repository = self.find(kind, id)
        commit = repository.resolve(revision or "main")
        try:
            card = card_data(commit.files.get("README.md", File(b"")).content)
        except HubError:
            card = {}
        return {
            "id": id,
            "author": repository.namespace,
            "sha": commit.id,
            "private": repository.private,
            "gated": repository.gated,
            "disabled": False,
            "sdk": repository.sdk,
            "createdAt": DATE,
            "lastModified": DATE,
            "tags": card.get("tags", []),
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "cardData": card,
            "model-index": card.get("model-index"),
            "siblings": [{"rfilename": path, **self._details(file)} for path, file in commit.files.items()],
        }

    def _details(self, file: File) -> dict:
        if "blobs" not in parse_qs(self.query):
            return {}
        lfs = {"size": len(file.content), "sha256": file.sha256, "pointerSize": len(file.pointer)}
        return {"size": len(file.content), "blobId": file.blob_id, "lfs": lfs if file.is_lfs else None}

    def tree(self, kind: str, id: str, revision: str, path: str | None):
        entries = self.find(kind, id).resolve(revision).entries()
        if path and path not in entries:
            raise HubError(404, f'{path} does not exist on "{revision}"', "EntryNotFound")
        folder = f"{path}/" if path else ""
        inside = {name.removeprefix(folder): entry for name, entry in entries.items() if name.startswith(folder)}
        recursive = parse_qs(self.query).get("recursive") == ["true"]
        return [entry for name, entry in inside.items() if recursive or "/" not in name]

    def paths_info(self, kind: str, id: str, revision: str):
        entries = self.find(kind, id).resolve(revision).entries()
        paths = parse_qs(self.body.decode())["paths"]
        return [entries[path] for path in paths if path in entries]

    def resolve(self, kind: str | None, id: str, revision: str, path: str):
        repository = self.find(kind, id)
        if repository.gated and not self.owns(repository.namespace):
            message = f"Access to {repository.kind[:-1]} {id} is restricted."
            raise HubError(403 if self.account() else 401, message, "GatedRepo")
        commit = repository.resolve(revision)
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        file = commit.files[path]
        headers |= {"ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        return self._part(file.content, headers)

    def _part(self, content: bytes, headers: dict[str, str]) -> Reply:
        """What the request's Range asks for."""
        size = len(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return Reply(content, headers)
        first, end = int(wanted[1]), min(int(wanted[2] or size) + 1, size)
        if first >= end:
            raise HubError(416, "Requested range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
        return Reply(content[first:end], headers | {"Content-Range": f"bytes {first}-{end - 1}/{size}"}, status=206)


_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+(?:/[^/]+)?)"
_PAGE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+(?:/[^/]+)?)"
_REVISION = "(?P<revision>[^/]+)"
# (methods, path, stage); the first that fits.
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("PUT", rf"{_API}/settings", "settings"),
    ("POST", rf"{_API}/preupload/{_REVISION}", "preupload"),
    ("POST", rf"{_API}/commit/{_REVISION}", "commit"),
    ("POST DELETE", rf"{_API}/branch/(?P<name>[^/]+)", "branch"),
    ("POST DELETE", rf"{_API}/tag/(?P<name>[^/]+)", "tag"),
    ("GET", rf"{_API}/refs", "refs"),
    ("GET", rf"{_API}/tree/{_REVISION}(?:/(?P<path>.+))?", "tree"),
    ("POST", rf"{_API}/paths-info/{_REVISION}", "paths_info"),
    ("GET", rf"{_API}(?:/revision/{_REVISION})?", "info"),
    ("POST", rf"{_PAGE}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", rf"{_PAGE}\.git/info/lfs/objects/verify", "lfs_verify"),
    ("PUT", r"/lfs/(?P<kind>\w+)/(?P<id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("GET HEAD", rf"{_PAGE}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
]
STAGES = [stage for _, _, stage in ROUTES] + ["unknown"]


def find_stage(method: str, path: str) -> tuple[str, dict[str, Any]]:
    """The stage of a request, and its arguments."""
    for methods, pattern, stage in ROUTES:
        match = re.fullmatch(pattern, path)
        if match and method in methods.split():
            return stage, {name: value and unquote(value) for name, value in match.groupdict().items()}
    return "unknown", {}


def error_reply(error: HubError, path: str) -> Reply:
    headers = dict(error.headers)
    # On https the client takes a 401 from these addresses for a missing repository; on http it wants to be told.
    ours = re.match(r"/api/(models|datasets|spaces)/|/.+/resolve/", path)
    if error.status == 401 and ours and str(error) != BAD_TOKEN:
        headers.setdefault("X-Error-Code", "RepoNotFound")
    return Reply(json.dumps(error.body).encode(), headers, error.status)
