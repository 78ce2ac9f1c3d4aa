"""Restoring a model from a checkpoint folder."""

import copy
import os
from typing import cast

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def restore_weights(model: nn.Module, folder: str | os.PathLike) -> bool:
    """Load every tensor of an ordinary transformers checkpoint into `model`, in place.

    `Trainer` loads a checkpoint's raw keys, which skips, with a warning only, every tensor whose name the saved format
    changes (ViT, DeiT, BEiT, DINOv2, Swin): huggingface/transformers#43701. `from_pretrained` maps the names. Delete
    this module and its two calls when that issue is fixed.

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
    config = copy.deepcopy(model.config)
    # Other sizes are let through here and refused below, with the missing ones.
    options = {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
    restored, report = cast(tuple, type(model).from_pretrained(folder, **options))
    problems = {kind: sorted(map(str, keys)) for kind, keys in report.items() if kind.endswith("_keys") and keys}
    if problems:
        raise ValueError(f"{folder} does not hold the weights of this {type(model).__name__}: {problems}.")
    model.load_state_dict(restored.state_dict(), strict=True)
    return True
