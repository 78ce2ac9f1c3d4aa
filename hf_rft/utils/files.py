"""Writing files whole or not at all, and checking folders for write access and for links that lead outside."""

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it replaces `path` once the block ends without an error.

    Even if the disk fills up, readers see either the old file or the new one, never half of it.
    """
    path = Path(path)
    # Keep the suffix: matplotlib and others infer the format from it.
    scratch = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def check_links(folder: str | Path) -> None:
    """Refuse a folder with a link to a file outside: publishing the folder would publish that file.

    A cloned repository may hold such links, to whatever its author hopes to find.

    Raises:
        ValueError: naming the link and its target.
    """
    folder = Path(folder)
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{path} is a link to {path.resolve()}, outside the folder; publishing the folder would publish that "
                "file. If you want that, replace the link with a copy (`cp -rL` copies a folder that way)."
            )


def check_writable(argument: str, folder: str | Path, *, needed_bytes: int = 1) -> None:
    """Refuse a folder that cannot be created or written to, before any work is done for it. Leaves no trace.

    Args:
        argument (`str`):
            Name of the argument that holds the folder, for messages: `--output_dir` or `cache_dir`.
        folder (`str` or `Path`):
            The folder; it need not exist.
        needed_bytes (`int`, *optional*):
            Lower bound on what will be written.

    Raises:
        ValueError: if the path is not a valid folder name, or exists and is not a folder.
        OSError: if the folder cannot be written to, or the disk lacks space.
    """
    written = f"`{argument}={str(folder)!r}`"
    if not str(folder) or "\0" in str(folder):
        raise ValueError(f"{written} is not a valid folder name.")
    # Find the nearest existing parent, and try to create the missing part below it in a scratch folder there.
    existing = Path(os.path.abspath(folder))
    missing = []
    while not os.path.lexists(existing):
        missing.insert(0, existing.name)
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"{written} cannot be a folder: {existing} is a file; choose another name, or move the file.")
    try:
        trial = Path(tempfile.mkdtemp(prefix=".trial-", dir=existing))
        try:
            inside = trial.joinpath(*missing)
            inside.mkdir(parents=True, exist_ok=True)
            (inside / "trial").write_bytes(b"\0")
        finally:
            shutil.rmtree(trial, ignore_errors=True)
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise OSError(
            error.errno, f"{written} cannot be written ({error.strerror}); free space, or choose another folder"
        ) from error
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{written} has {free / 1e6:.1f} MB free, but at least {needed_bytes / 1e6:.1f} MB will be written; free "
            "space, or choose another folder",
        )
