"""Restoring a model from a checkpoint folder."""

import copy
import os

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
        RuntimeError: if a tensor is missing or has another shape.
    """
    has_weights = any(
        os.path.isfile(os.path.join(folder, name)) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    if not has_weights or not isinstance(model, PreTrainedModel):
        return False
    restored = type(model).from_pretrained(folder, config=copy.deepcopy(model.config))
    model.load_state_dict(restored.state_dict(), strict=True)
    return True
