"""Getting a model's files: a local folder as it is, or a snapshot of a repository."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..utils.values import is_repo_id


def download(
    repo_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    with_weights: bool = True,
    with_code: bool = False,
) -> Path:
    """The path of a local folder, or that of a snapshot of a repository's top-level files.

    Raises:
        ValueError: if there is no such folder or repository.
    """
    if os.path.isdir(repo_or_path):
        if revision is not None:
            raise ValueError(f"`revision={revision!r}` needs a repository, but {repo_or_path} is a local folder.")
        return Path(repo_or_path)
    try:
        validate_repo_id(str(repo_or_path))
    except ValueError as error:
        raise ValueError(f"{repo_or_path} is neither a folder nor the name of a repository ({error}).") from error
    wanted = ["*.json", "*.md", *(["*.safetensors"] if with_weights else []), *(["*.py"] if with_code else [])]
    try:
        folder = snapshot_download(
            str(repo_or_path),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            allow_patterns=wanted,
            ignore_patterns=["*/*"],  # checkpoints
            library_name="hf_rft",
        )
    except GatedRepoError:  # a RepositoryNotFoundError, although the repository exists
        raise
    except (RepositoryNotFoundError, LocalEntryNotFoundError) as error:  # usually a mistyped path
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{repo_or_path} is not a folder (looked for in {Path.cwd()}), nor a repository that can be reached: "
            f"correct the path or the repository's name. ({type(error).__name__}: {reason})"
        ) from error
    return Path(folder)


def is_on_hub(name: str) -> bool:
    """Whether it can be the name of a repository; a folder is not, even one that is gone in the meantime."""
    return is_repo_id(name) and not os.path.isdir(name)
