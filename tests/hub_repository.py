"""What the Hub of `hub_server.py` keeps: repositories with commits, branches, tags and large files."""

import hashlib
import itertools
import re
from dataclasses import dataclass, field

import yaml


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".png", ".parquet")
LARGEST_REGULAR_FILE = 1_000_000  # bytes

_COUNTER = itertools.count()


class HubError(Exception):
    """An answer other than success. `code` tells the client which of its exceptions to raise."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None, **body):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message.splitlines()[0], **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code
        self.body = {"error": message, **body}


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LARGEST_REGULAR_FILE)


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git holds in place of a large file."""
        lines = (
            "version https://git-lfs.github.com/spec/v1",
            f"oid sha256:{self.sha256}",
            f"size {len(self.content)}",
        )
        return "".join(f"{line}\n" for line in lines).encode()

    @property
    def blob_id(self) -> str:
        blob = self.pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def oid(self) -> str:
        """By what the client sees that it need not send a file again."""
        return self.sha256 if self.is_lfs else self.blob_id

    def entry(self, path: str) -> dict:
        """The file in listings."""
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    id: str
    title: str
    message: str
    files: dict[str, File]  # path -> file: the whole snapshot, never changed

    def entries(self) -> dict[str, dict]:
        """Path -> entry in listings, of folders and files."""
        folders = {path[:place] for path in self.files for place, letter in enumerate(path) if letter == "/"}
        entries = {path: {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)}
        return entries | {path: file.entry(path) for path, file in self.files.items()}


@dataclass
class Repository:
    """A model, dataset or Space.

    Args:
        kind (`str`):
            `"models"`, `"datasets"` or `"spaces"`.
        id (`str`):
            Namespace and name.
        gated (`str` or `False`):
            `"auto"` or `"manual"`: everybody sees what is there, only the owner can download it.
        sdk (`str`, *optional*):
            Of a Space.
    """

    kind: str
    id: str
    private: bool = False
    gated: str | bool = False
    sdk: str | None = None
    commits: dict[str, Commit] = field(default_factory=dict)  # by id, the oldest first
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit id
    tags: dict[str, str] = field(default_factory=dict)  # name -> commit id
    objects: dict[str, bytes] = field(default_factory=dict)  # large files that have arrived: sha256 -> content
    expected: dict[str, int] = field(default_factory=dict)  # large files that may be sent: sha256 -> size

    def __post_init__(self):
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self._record("main", "initial commit", "", {".gitattributes": File(attributes.encode())})

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content."""
        return {path: file.content for path, file in self.resolve(revision).files.items()}

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, tag or commit id stands for."""
        commit = self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def add(self, files: dict[str, bytes], *, branch: str = "main", title: str = "Upload files") -> Commit:
        """What a test puts there without a client."""
        new = {path: File(content, is_lfs(path, len(content))) for path, content in files.items()}
        self.objects.update({file.sha256: file.content for file in new.values() if file.is_lfs})
        return self._record(branch, title, "", self.resolve(branch).files | new)

    def commit(self, branch: str, operations: list[dict]) -> Commit:
        """Apply all operations or, if one is wrong, none."""
        parent = self.resolve(branch)
        if branch not in self.branches:
            raise HubError(400, f"{branch} is not a branch; commits are made on branches only.")
        files = dict(parent.files)
        header = {}
        for operation in operations:
            value = operation["value"]
            path = value.get("path", "").rstrip("/")
            match operation["key"]:
                case "header":
                    header = value
                case "file":
                    files[path] = File(value["content"])
                case "lfsFile" if value["oid"] in self.objects:
                    files[path] = File(self.objects[value["oid"]], is_lfs=True)
                case "lfsFile":
                    reason = "an LFS pointer pointed to a file that does not exist"
                    raise HubError(400, f"Your push was rejected because {reason}. Offending file: {path}")
                case "deletedFile" if path in files:
                    del files[path]
                case "deletedFolder" if path in parent.entries():
                    files = {name: file for name, file in files.items() if not name.startswith(f"{path}/")}
                case "deletedFile" | "deletedFolder":
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                case key:
                    raise HubError(400, f"This server does not know the operation {key!r}.")
        if header.get("parentCommit", parent.id) != parent.id:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        return self._record(branch, header.get("summary", ""), header.get("description", ""), files)

    def _record(self, branch: str, title: str, message: str, files: dict[str, File]) -> Commit:
        id = hashlib.sha1(f"{self.kind} {self.id} {title} {next(_COUNTER)}".encode()).hexdigest()
        self.commits[id] = Commit(id, title, message, files)
        self.branches[branch] = id
        return self.commits[id]


def card_data(readme: bytes) -> dict:
    """The metadata of a card.

    Raises:
        HubError: for what is wrong with them. The Hub is stricter: it knows many more fields.
    """
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---", readme.decode(), flags=re.DOTALL)
    try:
        card = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        raise HubError(400, "Invalid metadata", errors=[{"message": f"YAML: {error}"}]) from error
    if not isinstance(card, dict):
        raise HubError(400, "Invalid metadata", errors=[{"message": "metadata must be a mapping"}])
    missing = []
    for place, model in enumerate(card.get("model-index", [])):
        for number, result in enumerate(model.get("results", [])):
            prefix = f"model-index[{place}].results[{number}]"
            parts = {"task": result.get("task", {}), "dataset": result.get("dataset", {})}
            parts |= {f"metrics[{index}]": metric for index, metric in enumerate(result.get("metrics") or [{}])}
            for name, part in parts.items():
                wanted = {"task": ["type"], "dataset": ["name", "type"]}.get(name, ["type", "value"])
                missing += [f'"{prefix}.{name}.{key}" is required' for key in wanted if part.get(key) is None]
    if missing:
        raise HubError(400, "Invalid metadata", errors=[{"message": message} for message in missing])
    return card
