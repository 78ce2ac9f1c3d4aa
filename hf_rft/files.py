"""Files that are written whole or not at all, and folders that hold what they seem to hold."""

import contextlib
import os
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
