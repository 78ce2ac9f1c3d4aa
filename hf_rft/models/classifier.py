"""A classifier as a function of pixels: what training attacks and what evaluation attacks, in one class.

Also the context managers that prepare a model for that, and give every module and parameter back exactly as it was.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..attacks.base import Forward, Passes
from ..data.examples import Examples
from .pixel_space import PixelNormalization


class PixelClassifier:
    """A model with the normalisation of its processor: maps pixels in [0, 1] to logits.

    Args:
        model (`torch.nn.Module`):
            Maps `pixel_values` to logits, or to an output that holds `logits`. The bare model: what DDP, FSDP or
            DeepSpeed put around it would exchange gradients or weights in every step of an attack.
        normalization ([`PixelNormalization`]):
            Of its processor.
        by_name (`bool`, *optional*, defaults to `False`):
            Pass images as the keyword `pixel_values`, as `Trainer` does, instead of as the first argument.
        divided (`bool`, *optional*, defaults to `False`):
            Whether FSDP will divide the weights over processes; [`whole_weights`] then gathers them.
        autocast (`Callable`, *optional*):
            Returns the context in which gathered weights compute: unlike the model, they were not prepared for mixed
            precision.
    """

    def __init__(
        self,
        model: nn.Module,
        normalization: PixelNormalization,
        *,
        by_name: bool = False,
        divided: bool = False,
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self.model, self.normalization, self._by_name = model, normalization, by_name
        self._copy, self._autocast = WholeCopy(model) if divided else None, autocast

    @property
    def device(self) -> torch.device:
        return self._first_parameter.device

    def __call__(self, pixels: torch.Tensor, **inputs) -> torch.Tensor:
        """Logits of shape `(batch, classes)`; `inputs` go to the model as they are."""
        return self.logits(self.pixel_values(pixels), **inputs)

    def load(self, examples: Examples, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels in [0, 1] and labels of some examples, on the model's device."""
        pixel_values, labels = examples.batch(positions)
        return self.normalization.to_pixels(pixel_values.to(self.device)), labels.to(self.device)

    def pixel_values(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the model takes: normalised, in its precision."""
        return self.normalization.from_pixels(pixels).to(self._first_parameter.dtype)

    def logits(self, pixel_values: torch.Tensor, **inputs) -> torch.Tensor:
        model = self.model if self._copy is None else self._copy.model
        images = {"pixel_values": pixel_values} if self._by_name else {}
        return logits_of(model(*([] if self._by_name else [pixel_values]), **images, **inputs))

    def forward_in(self, dtype: torch.dtype | None) -> Forward:
        """This function under autocast; with None in the model's own precision, whatever surrounds the call."""

        def forward(pixels: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                return self(pixels)

        return forward

    def in_fast_format(self, pixels: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """Convolutions in channels_last while they run on a CPU, where it is up to 1.5 times as fast and never slower.

        A rule rather than a measurement: rounding differs between the formats, and a number must depend neither on
        what else the machine was doing, nor on the process, nor on whether the run was resumed. A model whose code
        cannot take channels_last images, as `pixels` show, keeps its format; so do models on other devices.
        """
        if self.device.type != "cpu" or not any(parameter.dim() == 4 for parameter in self.model.parameters()):
            return contextlib.nullcontext()
        try:
            with in_memory_format(self.model, torch.channels_last), torch.enable_grad():
                leaf = pixels.detach().requires_grad_()
                torch.autograd.grad(self.forward_in(None)(leaf).sum(), leaf)
        except RuntimeError:  # `view`, for one
            return contextlib.nullcontext()
        return in_memory_format(self.model, torch.channels_last)

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[nn.Module]:
        """The model with all of its weights; where they are divided, every process must ask at the same time."""
        if self._copy is None:
            yield self.model
            return
        with self._copy.holding(self.model) as model, self._autocast():
            yield model

    @contextlib.contextmanager
    def under_attack(self, *, training: bool = False) -> Iterator[None]:
        """The model's state while it is attacked; see [`under_attack`]."""
        with self.whole_weights() as model, under_attack(model, training=training):
            yield

    @property
    def _first_parameter(self) -> torch.Tensor:
        return next(self.model.parameters(), torch.empty(0))


def logits_of(outputs: Any) -> torch.Tensor:
    """The logits in what a model returned: a tensor, or an output or dictionary with `logits`.

    Raises:
        ValueError: if there are none, or fewer than two classes.
    """
    logits = outputs
    if not isinstance(outputs, torch.Tensor):
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if logits is None or logits.dim() != 2 or logits.shape[1] < 2:
        shape = "no `logits`" if logits is None else f"logits of shape {tuple(logits.shape)}"
        raise ValueError(
            f"`model` returned {shape}; an image classifier returns logits of shape (batch, classes), with at least "
            "2 classes."
        )
    return logits


def check_batch(inputs: Mapping[str, Any], num_labels: int) -> None:
    """Refuse a batch without images or labels, with further tensors, or with labels the model has no class for."""
    missing = [key for key in ("pixel_values", "labels") if key not in inputs]
    if missing:
        raise ValueError(
            f"A batch has no {missing}, its keys are {sorted(inputs)}; let the dataset and `data_collator` return "
            "`pixel_values` and `labels` (and keep `remove_unused_columns=False` for a transform made on the fly)."
        )
    others = [
        key
        for key, value in inputs.items()
        if isinstance(value, torch.Tensor) and key not in ("pixel_values", "labels")
    ]
    if others:
        raise ValueError(
            f"A batch holds further tensors {others}; only `pixel_values` can be attacked. Leave them out."
        )
    labels = inputs["labels"]
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"`labels` must hold one class index per image, got {labels.dtype} of shape {tuple(labels.shape)}; "
            "regression and several labels per image are not supported."
        )
    check_labels("A batch", labels, num_labels)


def blank_image(model: PreTrainedModel) -> torch.Tensor:
    """One image of the size in the model's `config`; networks of convolutions name none and take any."""
    config: Any = model.config
    if "input_size" in (getattr(config, "pretrained_cfg", None) or {}):  # timm
        channels, *size = config.pretrained_cfg["input_size"]
    else:
        channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(1, channels, height, width, dtype=model.dtype, device=model.device)


def check_labels(where: str, labels: Any, num_labels: int) -> None:
    """Refuse labels outside 0 ... `num_labels - 1`; `where` begins the message."""
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0:
        raise ValueError(
            f"{where} holds labels down to {lowest}; negative ones mark unlabelled examples, leave them out."
        )
    if highest >= num_labels:
        raise ValueError(
            f"{where} holds labels from {lowest} to {highest}, but the model has {num_labels} classes (0 to "
            f"{num_labels - 1}); load it with `num_labels={highest + 1}` and `ignore_mismatched_sizes=True`, or "
            "correct the labels."
        )


class CountedForward:
    """A `forward` that counts each image it is called with, and each image a gradient comes back for."""

    def __init__(self, forward: Forward):
        self.forward = forward
        self.forward_count = self.backward_count = 0

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        logits = self.forward(pixels)
        self.forward_count += len(pixels)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        return logits

    def _count_backward(self, gradient: torch.Tensor) -> None:
        self.backward_count += len(gradient)

    @property
    def passes(self) -> Passes:
        """Sums over examples."""
        return Passes(self.forward_count, self.backward_count)


# --- A model's state for a while ---


@contextlib.contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put all modules into training or evaluation mode."""
    changed = [module for module in model.modules() if module.training != training]
    for module in changed:
        module.training = training
    try:
        yield
    finally:
        for module in changed:
            module.training = not training


@contextlib.contextmanager
def parameters_frozen(model: nn.Module) -> Iterator[None]:
    """Switch parameter gradients off: an attack differentiates with respect to the images only."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def in_memory_format(model: nn.Module, memory_format: torch.memory_format) -> Iterator[None]:
    """Keep the weights of 2D convolutions in this memory format; afterwards they are the very tensors they were."""
    kept = [(parameter, parameter.data) for parameter in model.parameters() if parameter.dim() == 4]
    for parameter, data in kept:
        parameter.data = data.to(memory_format=memory_format)
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


@contextlib.contextmanager
def batch_norm_frozen(model: nn.Module) -> Iterator[None]:
    """Keep modules with running statistics in evaluation mode.

    Adversarial examples are crafted against running statistics. Learning from them with batch statistics, another
    function of the same weights, undoes the training (design note in the README, "Why BatchNorm is frozen").
    """
    frozen = [
        module for module in model.modules() if module.training and getattr(module, "running_mean", None) is not None
    ]
    for module in frozen:
        module.training = False
    try:
        yield
    finally:
        for module in frozen:
            module.training = True


@contextlib.contextmanager
def under_attack(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Everything an attack on `model` needs: input gradients but no parameter gradients, one mode for all modules.

    Neither the model nor the global random number generators have changed afterwards: in training mode, where dropout
    draws from them, they are set back, and modules with running statistics stay in evaluation mode all the same.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(parameters_frozen(model))
        stack.enter_context(in_mode(model, training=training))
        if training:
            devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
            stack.enter_context(torch.random.fork_rng(devices=list(devices)))
            stack.enter_context(batch_norm_frozen(model))
        yield


class WholeCopy:
    """A second model without weights of its own, which borrows those of a model that is divided over processes.

    FSDP gathers weights in every forward and backward pass, on all processes at once: an attack would gather them in
    each of its steps, and an evaluation in which one process needs more steps than another would hang. Borrowed, they
    are gathered once, and the divided model, whose hooks and flags stay untouched, takes no part in the attack.
    """

    def __init__(self, model: nn.Module):
        empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in model.parameters()}
        self.model: nn.Module = copy.deepcopy(model, empty)
        self._empty = dict(self.model.named_parameters())

    @contextlib.contextmanager
    def holding(self, divided: nn.Module) -> Iterator[nn.Module]:
        """The copy with the present weights of the divided model, on each process; all must ask at the same time."""
        whole = {name: _gathered(value) for name, value in divided.state_dict().items()}
        self.model.load_state_dict(whole, assign=True)
        try:
            yield self.model
        finally:
            self.model.load_state_dict(self._empty, assign=True, strict=False)


def _gathered(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
