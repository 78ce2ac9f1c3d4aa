"""A small Hub on the loopback device, for a real, unmodified `huggingface_hub` client with HF_HUB_DISABLE_XET=1.

    with HubServer() as hub:
        api = HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)  # user "user"; READ_TOKEN, OTHER_TOKEN (user "other")
        subprocess.run(..., env=hub.environment(home, WRITE_TOKEN))  # other processes: HF_ENDPOINT and so on

        hub.create("models", "user/name", {"config.json": b"{}"}, private=True, gated="auto")  # without a client
        hub.repo("models", "user/name").files(revision="main")  # {path: bytes}; .branches, .tags, .commits, .private

        hub.fail("commit", status=500, times=1)  # answer an error: once; always without `times`
        hub.fail("lfs_put", drop=True)  # close the connection half-way through what is sent, there or back
        hub.fail("commit", drop="answer")  # do what is asked, then close the connection without an answer
        hub.stall("lfs_put")  # accept, and never answer until the server closes
        hub.heal()  # forget all of these
        hub.requests  # [Request(stage, method, path)]; hub.count("lfs_put") counts them

`fail` and `stall` take `path=` and `method=`, too: only requests whose path contains this, only this method.

Stages: whoami, create, settings, validate, preupload, lfs_batch, lfs_put, lfs_verify, commit, branch, tag, refs, info,
tree, paths_info, resolve (files and their headers), unknown (everything else, answered with 404).

A new repository holds one commit with one file, .gitattributes, as on the Hub. The client retries 429 and 5xx in some
stages, after 1, 2, 4, 8 and 8 seconds: in tests, patch `time.sleep`, or give a time limit.
"""

import os
import socket
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hub_repository import HubError, Repository
from hub_stages import STAGES, Account, Call, Reply, Request, error_reply, find_stage


WRITE_TOKEN = "hf_WriteTokenOfUser"
READ_TOKEN = "hf_ReadTokenOfUser"
OTHER_TOKEN = "hf_WriteTokenOfOther"


@dataclass
class Fault:
    """What goes wrong with requests of one stage: an error, a lost connection, or no answer at all."""

    stage: str
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool | str = False
    stall: bool = False
    times: float = float("inf")
    path: str = ""
    method: str = ""

    def concerns(self, request: Request) -> bool:
        return (
            self.times > 0
            and self.stage == request.stage
            and self.path in request.path
            and self.method in ("", request.method)
        )


class HubServer:
    """The server, in threads of its own from `with` on until its end.

    Args:
        user (`str`):
            Name of the user whose tokens `WRITE_TOKEN` and `READ_TOKEN` are.
    """

    def __init__(self, user: str = "user"):
        self.accounts = {
            WRITE_TOKEN: Account(user, may_write=True),
            READ_TOKEN: Account(user, may_write=False),
            OTHER_TOKEN: Account("other", may_write=True),
        }
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self._faults: list[Fault] = []
        self._listener = _Listener(("127.0.0.1", 0), _Connection)
        self._listener.hub = self
        self.endpoint = f"http://127.0.0.1:{self._listener.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self._listener.shutdown()
        self._listener.server_close()
        self._listener.hang_up()

    def environment(self, home: Path | str, token: str | None = None) -> dict[str, str]:
        """For a new process that knows this Hub only, and keeps its caches in `home`."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        variables |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # `evaluate` has its own address for that
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        return variables | ({"HF_TOKEN": token} if token else {})

    def create(self, kind: str, id: str, files: dict[str, bytes] | None = None, **settings) -> Repository:
        """A repository that nobody has to push. `settings`: those of `Repository`."""
        repository = self.repositories[kind, id] = Repository(kind, id, **settings)
        if files:
            repository.add(files)
        return repository

    def repo(self, kind: str, id: str) -> Repository:
        return self.repositories[kind, id]

    def count(self, stage: str, method: str = "") -> int:
        return sum(request.stage == stage and method in ("", request.method) for request in self.requests)

    def fail(self, stage: str, **how) -> None:
        """See the module. `how`: fields of `Fault`."""
        if stage not in STAGES:
            raise ValueError(f"There is no stage {stage!r}; stages are {', '.join(STAGES)}.")
        with self.lock:
            self._faults.append(Fault(stage, **how))

    def stall(self, stage: str, **how) -> None:
        self.fail(stage, stall=True, **how)

    def heal(self) -> None:
        with self.lock:
            self._faults.clear()

    def receive(self, request: Request) -> Fault | None:
        """Record a request; what is to go wrong with it."""
        with self.lock:
            self.requests.append(request)
            fault = next((fault for fault in self._faults if fault.concerns(request)), None)
            if fault is not None:
                fault.times -= 1
            return fault


class _Listener(ThreadingHTTPServer):
    hub: HubServer

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._connections: set[socket.socket] = set()

    def process_request(self, request, client_address):
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Clients keep connections open, and the threads that serve them would go on to answer."""
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # closed in the meantime

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # clients that go away are what some tests are about
            super().handle_error(request, client_address)


class _Connection(BaseHTTPRequestHandler):
    """Answers the requests that come over one connection, one after the other."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are sent apart, and the second would wait for 40 ms
    server: _Listener

    def answer(self) -> None:
        hub = self.server.hub
        address = urlsplit(self.path)
        stage, arguments = find_stage(self.command, address.path)
        fault = hub.receive(Request(stage, self.command, unquote(address.path)))
        length = int(self.headers.get("Content-Length", 0))
        self.close_connection = fault is not None and (fault.stall or bool(fault.drop))
        if fault and fault.stall:
            hub.closing.wait()
            return
        if fault and fault.drop is True and length > 0:
            self.rfile.read(length // 2)
            return
        body = self.rfile.read(length)
        call = Call(hub.endpoint, hub.accounts, hub.repositories, self.command, address.query, self.headers, body)
        try:
            if fault and not fault.drop:
                raise HubError(fault.status, "Injected by the test.", headers=fault.headers)
            with hub.lock:
                reply = call.answer(stage, arguments)
        except HubError as error:
            reply = error_reply(error, address.path)
        if fault and fault.drop:
            if fault.drop is True and self.command != "HEAD":
                self.send(reply, len(reply.body) // 2)
        else:
            self.send(reply, len(reply.body))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def send(self, reply: Reply, count: int) -> None:
        """Send the headers and the first `count` bytes."""
        self.send_response(reply.status)
        for name, value in {"Content-Length": len(reply.body), **reply.headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[:count])

    def log_message(self, *_):
        pass
