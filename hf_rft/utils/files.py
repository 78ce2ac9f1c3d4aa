"""Files that are written whole or not at all, and folders: can they be written, do links lead out of them."""

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
    """A path beside `path` to write to; it takes the place of `path` once the block has ended without an error.

    A reader, or a disk that fills up, sees the old file or the new one, never half of it.
    """
    path = Path(path)
    # The ending stays: it tells matplotlib and others which format to write.
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
    """Refuse a folder with a link to a file elsewhere: publishing it would publish that file.

    A repository that was cloned may hold such links, to whatever its author hopes to find.

    Raises:
        ValueError: naming the link and where it leads.
    """
    folder = Path(folder)
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{path} is a link to {path.resolve()}, outside of the folder, which would be published. If that is "
                "what you want, put a copy in its place (`cp -rL` copies a folder so)."
            )


def check_writable(argument: str, folder: str | Path, *, needed_bytes: int = 1) -> None:
    """Refuse a folder that cannot be made or written, before anything was computed for it. Leaves no trace.

    Args:
        argument (`str`):
            Who names the folder, for the message: `--output_dir` or `cache_dir`.
        folder (`str` or `Path`):
            It need not exist.
        needed_bytes (`int`, *optional*):
            What will be written at the least.

    Raises:
        ValueError: if the name is that of something else, or no folder can have it.
        OSError: if it cannot be written, or the disk has not enough space.
    """
    written = f"`{argument}={str(folder)!r}`"
    if not str(folder) or "\0" in str(folder):
        raise ValueError(f"{written} is no name of a folder.")
    # In the nearest folder that exists, all that is missing below it is made on trial.
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
