"""Restoring from a checkpoint folder: refusing what could run code, and every weight of the model."""

import copy
import os
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME
from transformers.utils.peft_utils import ADAPTER_WEIGHTS_NAME

from .untrusted import check_weight_index


# What `Trainer` saves with pickle, apart from training_args.bin, which nothing loads.
_PICKLES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth")


def check_pickles(folder: str | os.PathLike) -> None:
    """Refuse a checkpoint that resuming cannot read, before anything of it was restored.

    torch's own message names no file, and advises to open it without the restriction that protects.

    Raises:
        ValueError: naming the file: damaged, or a pickle that holds more than tensors and plain values (it could run
            code), or weights as a pickle.
    """
    folder = Path(folder)
    for path in sorted(path for pattern in _PICKLES for path in folder.glob(pattern)):
        try:
            with safe_globals():
                torch.load(path, map_location="meta", mmap=True, weights_only=True)
        except Exception as error:  # on damaged files, whatever the decoder comes across
            raise ValueError(
                f"{path} is not loaded ({type(error).__name__}): it is damaged, or a pickle that holds more than "
                "tensors and plain values and could run code. Resume from another checkpoint."
            ) from None
    for name in (WEIGHTS_NAME, f"{WEIGHTS_NAME}.index.json", ADAPTER_WEIGHTS_NAME):
        if (folder / name).exists() and not list(folder.glob("*.safetensors")):
            raise ValueError(
                f"{folder / name} is not loaded: the checkpoint holds its weights as a pickle, which could run code. "
                "Resume from a checkpoint with safetensors files, as `RobustTrainer` writes them."
            )


def restore_weights(model: nn.Module, folder: str | os.PathLike) -> bool:
    """Load every tensor of an ordinary transformers checkpoint into `model`, in place.

    `Trainer` loads a checkpoint's raw keys, which skips, with a warning only, every tensor whose name the saved format
    changes (ViT, DeiT, BEiT, DINOv2, Swin): huggingface/transformers#43701. `from_pretrained` maps the names. Delete
    this function and its two calls when that issue is fixed.

    Returns:
        `bool`: False if the folder or the model is of another kind (PEFT, for example); then nothing was done.

    Raises:
        ValueError: if a tensor is missing, left over or has another shape.
    """
    has_weights = any(
        os.path.isfile(os.path.join(folder, name)) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    if not has_weights or not isinstance(model, PreTrainedModel):
        return False
    check_weight_index(folder)
    config = copy.deepcopy(model.config)
    # Other sizes are let through here and refused below, with the missing ones.
    options = {"config": config, "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    restored, report = cast(tuple, type(model).from_pretrained(folder, **options))
    problems = {kind: sorted(map(str, keys)) for kind, keys in report.items() if kind.endswith("_keys") and keys}
    if problems:
        raise ValueError(f"{folder} does not hold the weights of this {type(model).__name__}: {problems}.")
    model.load_state_dict(restored.state_dict(), strict=True)
    return True
