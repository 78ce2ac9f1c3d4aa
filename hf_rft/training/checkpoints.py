"""Checkpoint folders: which are complete, which could run code, and restoring a model from one.

A process can be killed while it writes a checkpoint. So a checkpoint counts only if it has a marker, written last,
which lists its files and their sizes, and if all of them are there.
"""

import copy
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME, logging
from transformers.utils.peft_utils import ADAPTER_WEIGHTS_NAME

from ..hub.safe_loading import check_weight_index
from ..utils.files import write_text


logger = logging.get_logger(__name__)

MARKER_NAME = "checkpoint_complete.json"

# What `Trainer` pickles, except for training_args.bin, which is never loaded.
_PICKLES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth")


def mark_complete(folder: str | os.PathLike) -> None:
    """Write the marker, once every process has written its files."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != MARKER_NAME]
    for path in files:  # a machine that loses power must not keep the marker without the files
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_text(Path(folder) / MARKER_NAME, json.dumps({"files": sizes}, indent=2) + "\n")


def why_incomplete(folder: str | os.PathLike) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is complete."""
    marker = Path(folder) / MARKER_NAME
    try:
        files = json.loads(marker.read_text(encoding="utf-8"))["files"].items()
    except FileNotFoundError:
        return f"it has no {MARKER_NAME}, which is written last"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"its {MARKER_NAME} cannot be read ({error})"
    for name, size in files:
        path = Path(folder) / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def all_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Folders that are named like checkpoints, complete or not, oldest first."""
    folders = map(Path, sort_checkpoints(str(output_dir)))
    return [folder for folder in folders if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name)]


def complete_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The complete checkpoints of a run, oldest first; a warning names each incomplete one."""
    complete = []
    for folder in all_checkpoints(output_dir):
        reason = why_incomplete(folder)
        if reason is None:
            complete.append(folder)
        else:
            logger.warning("%s is ignored because it is not complete: %s.", folder, reason)
    return complete


def last_complete_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """Where an interrupted run can resume; None if there is no complete checkpoint."""
    complete = complete_checkpoints(output_dir)
    return complete[-1] if complete else None


def remove_checkpoint(folder: str | os.PathLike) -> None:
    """Delete a checkpoint, the marker first, so that a half-deleted one does not count as complete."""
    (Path(folder) / MARKER_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def rotate_checkpoints(output_dir: str | os.PathLike, limit: int | None, keep: Iterable[str | os.PathLike]) -> None:
    """Delete the oldest complete checkpoints until `limit` are left, but never the newest or one of those to `keep`.

    transformers' function of this name also counts incomplete checkpoints, which would displace complete ones.
    """
    if limit is None or limit <= 0:
        return
    complete = [folder for folder in all_checkpoints(output_dir) if why_incomplete(folder) is None]
    kept = {Path(folder).resolve() for folder in [*keep, *complete[-1:]]}
    deletable = [folder for folder in complete if folder.resolve() not in kept]
    for folder in deletable[: max(0, len(complete) - max(limit, len(kept)))]:
        remove_checkpoint(folder)


def check_resumable(folder: str | os.PathLike) -> None:
    """Refuse a folder from which training cannot resume exactly or safely.

    A checkpoint without a marker (from a plain `Trainer`, or from the Hub) is accepted with a warning.

    Raises:
        ValueError: naming what is wrong.
    """
    names = [path.name for path in Path(folder).iterdir()] if Path(folder).is_dir() else []
    if "trainer_state.json" not in names:
        raise ValueError(
            f"`resume_from_checkpoint={str(folder)!r}` is not a checkpoint: it has no trainer_state.json. Give a "
            f"folder such as {PREFIX_CHECKPOINT_DIR}-500, or True for the last complete one of `output_dir`."
        )
    reason = why_incomplete(folder)
    if MARKER_NAME in names and reason is not None:
        raise ValueError(
            f"`resume_from_checkpoint={str(folder)!r}` is not complete: {reason}. Resume from an earlier one, or from "
            "True for the last complete one of `output_dir`."
        )
    if reason is not None:
        logger.warning("Resuming from %s, which may not be complete: %s.", folder, reason)
    if not any(name.startswith(("optimizer", "global_step")) for name in names):  # "global_step" is DeepSpeed's
        raise ValueError(
            f"`resume_from_checkpoint={str(folder)!r}` has no optimizer state (`save_only_model=True`?), so training "
            "cannot resume from it. Load the model from there and start a new training."
        )
    check_pickles(folder)


def check_pickles(folder: str | os.PathLike) -> None:
    """Refuse a checkpoint with pickles that are damaged or could run code, before anything is restored from it.

    torch's own error does not name the file, and advises loading it without protection.

    Raises:
        ValueError: naming the file.
    """
    folder = Path(folder)
    for path in sorted(path for pattern in _PICKLES for path in folder.glob(pattern)):
        try:
            with safe_globals():
                torch.load(path, map_location="meta", mmap=True, weights_only=True)
        except Exception as error:  # damaged files raise all kinds of errors
            raise ValueError(
                f"{path} is not loaded ({type(error).__name__}): it is damaged, or a pickle with more than tensors "
                "and plain values, which could run code. Resume from another checkpoint."
            ) from None
    for name in (WEIGHTS_NAME, f"{WEIGHTS_NAME}.index.json", ADAPTER_WEIGHTS_NAME):
        if (folder / name).exists() and not list(folder.glob("*.safetensors")):
            raise ValueError(
                f"{folder / name} is not loaded: weights in a pickle could run code. Resume from a checkpoint with "
                "safetensors files, as `RobustTrainer` writes them."
            )


def restore_weights(model: nn.Module, folder: str | os.PathLike, *, sharded: bool = False) -> bool:
    """Load every tensor of an ordinary transformers checkpoint into `model`, in place.

    `Trainer` loads a checkpoint by its raw keys, and skips every tensor whose name differs in the saved format (ViT,
    DeiT, BEiT, DINOv2, Swin) with just a warning: huggingface/transformers#43701. `from_pretrained` maps the names.
    Delete this function and its two calls when that issue is fixed.

    Returns:
        `bool`: False if nothing was loaded, because the model is sharded or a PEFT model.

    Raises:
        ValueError: if a tensor is missing, unexpected or has another shape.
    """
    has_weights = any(Path(folder, name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if sharded or not has_weights or not isinstance(model, PreTrainedModel):
        return False
    check_weight_index(folder)
    config = copy.deepcopy(model.config)
    # Mismatched sizes are refused below, together with missing tensors.
    options = {"config": config, "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    restored, report = cast(tuple, type(model).from_pretrained(folder, **options))
    problems = {kind: sorted(map(str, keys)) for kind, keys in report.items() if kind.endswith("_keys") and keys}
    if problems:
        raise ValueError(f"{folder} does not hold the weights of this {type(model).__name__}: {problems}.")
    model.load_state_dict(restored.state_dict(), strict=True)
    return True
