"""A small Hub on the loopback interface, for the real `huggingface_hub` client with HF_HUB_DISABLE_XET=1.

    with HubServer() as hub:
        subprocess.run(..., env=hub.environment(home, WRITE_TOKEN))  # HF_ENDPOINT, HF_HOME, HF_TOKEN and so on
        hub.create("models", "user/name", {"config.json": b"{}"}, private=True)  # without a client
        hub.repo("models", "user/name").files(revision="main")  # {path: bytes}; see `Repository`
        hub.fail("commit", status=500, times=1)  # answer with an error once; without `times`, always
        hub.fail("lfs_put", drop=True)  # close the connection half-way through the request
        hub.fail("commit", drop="answer")  # do as requested, then close the connection without an answer
        hub.fail("lfs_put", stall=True)  # accept the request, but never answer
        hub.heal()  # end all faults
        hub.requests, hub.count("lfs_put")  # the requests so far: [Request(stage, path)]

The stages are the keys of `ROUTES`; other requests are answered with 404. One user owns everything.
"""

import base64
import hashlib
import itertools
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils.sha import git_hash


WRITE_TOKEN, READ_TOKEN = "hf_WriteTokenOfUser", "hf_ReadTokenOfUser"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".png")

_API, _PAGE = "/api/(?P<kind>[a-z]+)/(?P<id>[^/]+/[^/]+)", "/(?:(?P<kind>[a-z]+)/)??(?P<id>[^/]+/[^/]+)"
ROUTES = {  # stage -> methods and path
    "create": "POST /api/repos/create",
    "validate": "POST /api/validate-yaml",
    "preupload": f"POST {_API}/preupload/(?P<revision>[^/]+)",
    "lfs_batch": rf"POST {_PAGE}\.git/info/lfs/objects/batch",
    "lfs_put": r"PUT /lfs/(?P<kind>\w+)/(?P<id>[^/]+/[^/]+)/(?P<oid>\w+)",
    "commit": f"POST {_API}/commit/(?P<revision>[^/]+)",
    "branch": f"POST {_API}/branch/(?P<name>[^/]+)",
    "tree": f"GET {_API}/tree/(?P<revision>[^/]+)",
    "info": f"GET {_API}(?:/revision/(?P<revision>[^/]+))?",
    "resolve": f"(?:GET|HEAD) {_PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
    "unknown": ".*",
}


class HubError(Exception):
    """An error to answer with. `code` tells the client which exception to raise."""

    def __init__(self, status: int, message: str, code: str = "", **body):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, "X-Error-Code": code}


# --- What the Hub keeps ---


class File(NamedTuple):
    content: bytes
    is_lfs: bool = False

    def entry(self, path: str) -> dict:
        """The file in listings."""
        size, sha256 = len(self.content), hashlib.sha256(self.content).hexdigest()
        lfs = {"lfs": {"oid": sha256, "size": size, "pointerSize": 0}} if self.is_lfs else {}
        return {"type": "file", "path": path, "size": size, "oid": git_hash(self.content), **lfs}

    @property
    def oid(self) -> str:
        """What the client compares before it uploads a file again."""
        entry = self.entry("")
        return entry.get("lfs", entry)["oid"]


class Commit(NamedTuple):
    id: str
    title: str
    files: dict[str, File]  # path -> file: the whole snapshot, never changed


@dataclass
class Repository:
    """A model or Space (`kind`: `"models"`, `"spaces"`), at first with one commit of one file, as on the Hub."""

    kind: str
    id: str
    private: bool = False
    gated: str | bool = False  # users with a token have access
    sdk: str | None = None
    commits: dict[str, Commit] = field(default_factory=dict)  # by id, oldest first
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit id
    objects: dict[str, bytes] = field(default_factory=dict)  # uploaded large files: sha256 -> content
    _numbers = itertools.count()

    def __post_init__(self):
        self.record("main", "initial commit", {".gitattributes": File(b"")})

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content."""
        return {path: file.content for path, file in self.resolve(revision).files.items()}

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch or a commit id stands for."""
        commit = self.commits.get(self.branches.get(revision, revision))
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def record(self, branch: str, title: str, files: dict[str, File]) -> str:
        id = hashlib.sha1(f"{self.kind} {self.id} {next(self._numbers)}".encode()).hexdigest()
        self.commits[id], self.branches[branch] = Commit(id, title, files), id
        return id


# --- The server ---


class Request(NamedTuple):
    stage: str
    path: str


@dataclass
class Fault:
    """What goes wrong with the requests of a stage: an error, a lost connection, or no answer at all."""

    status: int | None = None
    drop: bool | str = False
    stall: bool = False
    times: float = float("inf")


class HubServer:
    """The server, which runs in the background inside `with`. `user` owns `WRITE_TOKEN` and `READ_TOKEN`."""

    def __init__(self, user: str = "user"):
        self.user = user
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[Request] = []
        self.faults: dict[str, Fault] = {}
        self.lock, self.closing = threading.RLock(), threading.Event()
        self.listener = ThreadingHTTPServer(("127.0.0.1", 0), type("Connection", (_Connection,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.listener.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.listener.shutdown()
        self.listener.server_close()

    def environment(self, home: Path | str, token: str | None = None) -> dict[str, str]:
        """Environment of a new process that uses this Hub, and keeps its caches in `home`."""
        others = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        # `evaluate` counts downloads at another address.
        off = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        off |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        known = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), **({"HF_TOKEN": token} if token else {})}
        return others | off | known | {"OMP_NUM_THREADS": "1"}

    def create(self, kind: str, id: str, files: dict[str, bytes] | None = None, **settings) -> Repository:
        """Create a repository without a client. `settings`: fields of `Repository`."""
        repository = self.repositories[kind, id] = Repository(kind, id, **settings)
        if files:
            new = {path: File(content, path.endswith(LFS_SUFFIXES)) for path, content in files.items()}
            repository.record("main", "Upload files", repository.resolve("main").files | new)
        return repository

    def repo(self, kind: str, id: str) -> Repository:
        return self.repositories[kind, id]

    def count(self, stage: str) -> int:
        return sum(request.stage == stage for request in self.requests)

    def fail(self, stage: str, **how) -> None:
        """See above. `how`: fields of `Fault`."""
        if stage not in ROUTES:
            raise ValueError(f"There is no stage {stage!r}; stages are {', '.join(ROUTES)}.")
        self.faults[stage] = Fault(**how)

    def heal(self) -> None:
        self.faults.clear()

    def receive(self, request: Request) -> Fault:
        """Record a request, and return what should go wrong with it."""
        with self.lock:
            self.requests.append(request)
            fault = self.faults.get(request.stage, Fault())
            fault.times -= 1
            return fault if fault.times >= 0 else Fault()


class _Connection(BaseHTTPRequestHandler):
    """Answers a client. A stage's method takes the groups of its route, and returns bytes or a JSON value."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise the body waits 40 ms after the headers

    def answer(self) -> None:
        path = urlsplit(self.path).path
        matches = ((stage, re.fullmatch(route, f"{self.command} {path}")) for stage, route in ROUTES.items())
        stage, match = next((stage, match) for stage, match in matches if match)
        fault = self.hub.receive(Request(stage, unquote(path)))
        self.close_connection = fault.stall or bool(fault.drop)
        if fault.stall:
            self.hub.closing.wait()
            return
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length // 2 if fault.drop is True else length)
        if fault.drop is True:
            return
        status, self.extra_headers = 200, {}
        try:
            if fault.status:
                raise HubError(fault.status, "Injected by the test.")
            with self.hub.lock:
                groups = match.groupdict().items()
                reply = getattr(self, stage)(**{name: value and unquote(value) for name, value in groups})
        except HubError as error:
            status, self.extra_headers, reply = error.status, error.headers, error.body
        if fault.drop:
            return
        reply = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(reply)), **self.extra_headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *_):
        pass

    # --- Who may do what ---

    @property
    def token(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return token if token in (WRITE_TOKEN, READ_TOKEN) else None

    def check_may_write(self, namespace: str) -> None:
        if self.token is None:
            raise HubError(401, "Invalid username or password.")
        if self.token != WRITE_TOKEN or namespace != self.hub.user:
            raise HubError(403, f'You don\'t have the rights to write under the namespace "{namespace}".')

    def find(self, kind: str | None, id: str, *, write: bool = False) -> Repository:
        repository = self.hub.repositories.get((kind or "models", id))
        if repository is None or (repository.private and self.token is None):
            raise HubError(404 if self.token else 401, "Repository not found", "RepoNotFound")
        if write:
            self.check_may_write(id.split("/")[0])
        return repository

    def url(self, kind: str, id: str) -> str:
        return f"{self.hub.endpoint}/{'' if kind == 'models' else f'{kind}/'}{id}"

    # --- Stages ---

    def unknown(self):
        raise HubError(404, "This server has no such page.")

    def create(self):
        values = json.loads(self.body)
        namespace = values.get("organization") or self.hub.user
        self.check_may_write(namespace)
        kind, id = values.get("type", "model") + "s", f"{namespace}/{values['name']}"
        if (kind, id) in self.hub.repositories:
            raise HubError(409, f"You already created this {kind[:-1]} repo", url=self.url(kind, id))
        self.hub.create(kind, id, private=values.get("visibility") == "private", sdk=values.get("sdk"))
        return {"url": self.url(kind, id), "name": id}

    def validate(self):
        """By the client's own rules; the Hub checks more fields."""
        try:
            ModelCard(json.loads(self.body)["content"])
        except (ValueError, yaml.YAMLError) as error:
            raise HubError(400, "Invalid metadata", errors=[{"message": str(error)}]) from error
        return {"errors": [], "warnings": []}

    def preupload(self, kind: str, id: str, revision: str):
        present, files = self.find(kind, id, write=True).resolve(revision).files, json.loads(self.body)["files"]
        for file in files:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            oid = present[file["path"]].oid if file["path"] in present else None
            file |= {"uploadMode": mode, "shouldIgnore": False, "oid": oid}
        return {"files": files}

    def lfs_batch(self, kind: str | None, id: str):
        repository, objects = self.find(kind, id, write=True), json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in repository.objects:
                href = f"{self.hub.endpoint}/lfs/{repository.kind}/{id}/{wanted['oid']}"
                wanted["actions"] = {"upload": {"href": href}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, kind: str, id: str, oid: str):
        """Needs no token: on the Hub, this is a signed URL."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, f"The {len(self.body)} bytes received are not those of {oid}.")
        self.hub.repo(kind, id).objects[oid] = self.body
        return b""

    def commit(self, kind: str, id: str, revision: str):
        """Either all operations or, if one is invalid, none."""
        repository = self.find(kind, id, write=True)
        files, title = dict(repository.resolve(revision).files), ""
        for operation in map(json.loads, self.body.splitlines()):
            match operation:
                case {"key": "header", "value": {"summary": title}}:
                    pass
                case {"key": "file", "value": {"path": path, "content": content}}:
                    files[path] = File(base64.b64decode(content))
                case {"key": "lfsFile", "value": {"path": path, "oid": oid}} if oid in repository.objects:
                    files[path] = File(repository.objects[oid], is_lfs=True)
                case _:
                    raise HubError(400, f"Invalid operation, or large file not uploaded: {operation}")
        commit = repository.record(revision, title, files)
        return {"success": True, "commitOid": commit, "commitUrl": f"{self.url(kind, id)}/commit/{commit}"}

    def branch(self, kind: str, id: str, name: str):
        repository = self.find(kind, id, write=True)
        if name in repository.branches:
            raise HubError(409, f"Reference already exists: {name}")
        repository.branches[name] = repository.branches["main"]
        return {}

    def info(self, kind: str, id: str, revision: str | None):
        repository = self.find(kind, id)
        commit = repository.resolve(revision or "main")
        card = ModelCard(commit.files.get("README.md", File(b"")).content.decode(), ignore_metadata_errors=True).data
        described = {name: card.get(name) for name in ("library_name", "pipeline_tag", "tags")}
        return {"id": id, "sha": commit.id, "private": repository.private, "gated": repository.gated, **described}

    def tree(self, kind: str, id: str, revision: str):
        return [file.entry(path) for path, file in self.find(kind, id).resolve(revision).files.items()]

    def resolve(self, kind: str | None, id: str, revision: str, path: str):
        repository = self.find(kind, id)
        if repository.gated and self.token is None:
            raise HubError(401, f"Access to {id} is restricted.", "GatedRepo")
        commit = repository.resolve(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        file = commit.files[path]
        self.extra_headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.oid}"'}
        return file.content
