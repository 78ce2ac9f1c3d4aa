"""What several processes need of a model: how DDP is to treat it, and its whole weights while it is attacked."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .model_state import in_mode
from .training_args import RobustTrainingArguments


def set_ddp_options(ddp: DistributedDataParallelKwargs, args: RobustTrainingArguments, model: PreTrainedModel) -> None:
    """Switch off, where the arguments leave it open and it is safe, what DDP would do in every step for nothing.

    Buffers are sent from process 0 to the others; those of a frozen BatchNorm are equal anyway. Parameters that have
    no gradient are looked for in the whole graph; models without such parameters need no search.
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
            logits = model(pixel_values=blank_image(model)).logits
        except (RuntimeError, ValueError):  # an image of this size does not suit the model
            return True
        gradients = torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
    return any(gradient is None for gradient in gradients)


def blank_image(model: PreTrainedModel) -> torch.Tensor:
    """One image of the size in the model's `config`; networks of convolutions name none and take any."""
    config: Any = model.config
    if "input_size" in (getattr(config, "pretrained_cfg", None) or {}):  # timm
        channels, *size = config.pretrained_cfg["input_size"]
    else:
        channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(1, channels, height, width, dtype=model.dtype, device=model.device)


def leave_process_group(*, all_do: bool = True) -> None:
    """Close the connections to the other processes, if there are any, at the end of a program.

    Otherwise the end of one process races with what the others still read from it; with gloo, some are aborted
    (SIGABRT), and the launcher reports that instead of their exit status.

    Args:
        all_do (`bool`, *optional*, defaults to `True`):
            Whether all processes end here. One that ends alone leaves with gloo only: NCCL would wait for the others.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if all_do or torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


class WholeCopy:
    """A second model without weights of its own, which borrows those of a model that is divided over processes.

    FSDP gathers weights in every forward and backward pass, on all processes at once: an attack would gather them in
    each of its steps, and an evaluation in which one process needs more steps than another would hang. Borrowed, they
    are gathered once, and the divided model, whose hooks and flags stay untouched, takes no part in the attack.
    """

    def __init__(self, model: PreTrainedModel):
        empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in model.parameters()}
        self.model: PreTrainedModel = copy.deepcopy(model, empty)
        self._empty = dict(self.model.named_parameters())

    @contextlib.contextmanager
    def holding(self, divided: nn.Module) -> Iterator[PreTrainedModel]:
        """The copy with the present weights of the divided model, on each process; all must ask at the same time."""
        whole = {name: _gathered(value) for name, value in divided.state_dict().items()}
        self.model.load_state_dict(whole, assign=True)
        try:
            yield self.model
        finally:
            self.model.load_state_dict(self._empty, assign=True, strict=False)


def _gathered(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
