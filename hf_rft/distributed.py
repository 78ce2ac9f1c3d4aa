"""What several processes need of a model: how DDP is to treat it, and its whole weights while it is attacked."""

from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs
from transformers import PreTrainedModel

from .model_state import in_mode
from .training_args import RobustTrainingArguments


def set_ddp_options(
    ddp: DistributedDataParallelKwargs, args: RobustTrainingArguments, model: PreTrainedModel
) -> None:
    """Switch off, where the arguments leave it open and it is safe, what DDP would do in every step for nothing.

    Buffers are sent from process 0 to the others; those of a frozen BatchNorm are equal anyway. Parameters that have no
    gradient are looked for in the whole graph; models without such parameters need no search.
    """
    if args.ddp_broadcast_buffers is None and args.freeze_batch_norm:
        ddp.broadcast_buffers = False
    if args.ddp_find_unused_parameters is None:
        ddp.find_unused_parameters = may_have_unused_parameters(model)


def may_have_unused_parameters(model: PreTrainedModel) -> bool:
    """Whether a trainable parameter has no part in the logits (the mask token of DINOv2, for example).

    One blank image tells. A model that cannot be asked in this way may have such parameters.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return False
    with torch.enable_grad(), in_mode(model, training=False):
        try:
            logits = model(pixel_values=_blank_image(model)).logits
        except (RuntimeError, ValueError):  # an image of this size does not suit the model
            return True
        gradients = torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
    return any(gradient is None for gradient in gradients)


def _blank_image(model: PreTrainedModel) -> torch.Tensor:
    """One image of the size in the model's `config`; networks of convolutions name none and take any."""
    config: Any = model.config
    if "input_size" in (getattr(config, "pretrained_cfg", None) or {}):  # timm
        channels, *size = config.pretrained_cfg["input_size"]
    else:
        channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(1, channels, height, width, dtype=model.dtype, device=model.device)
