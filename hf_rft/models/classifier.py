"""A classifier as a function of pixels, the target of attacks in training and in evaluation.

Also context managers that prepare a model for attack and restore every module and parameter exactly.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..attacks.base import Forward, Passes
from ..data.examples import Examples
from .pixel_space import PixelNormalization


class PixelClassifier:
    """A model together with its processor's normalisation: maps pixels in [0, 1] to logits.

    Args:
        model (`torch.nn.Module`):
            Maps `pixel_values` to logits, or to an output that holds `logits`. The unwrapped model: the wrappers of
            DDP, FSDP and DeepSpeed would exchange gradients or weights in every step of an attack.
        normalization ([`PixelNormalization`]):
            The processor's normalisation.
        by_name (`bool`, *optional*, defaults to `False`):
            Pass images as the keyword `pixel_values`, as `Trainer` does, rather than as the first argument.
        divided (`bool`, *optional*, defaults to `False`):
            Whether FSDP will shard the weights over processes; [`whole_weights`] then gathers them.
        autocast (`Callable`, *optional*):
            Returns the context in which the gathered weights run: unlike the model, they are not prepared for mixed
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
        """Logits of shape `(batch, classes)`; `inputs` are passed to the model unchanged."""
        return self.logits(self.pixel_values(pixels), **inputs)

    def load(self, examples: Examples, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels in [0, 1] and labels of the examples at `positions`, on the model's device."""
        pixel_values, labels = examples.batch(positions)
        return self.normalization.to_pixels(pixel_values.to(self.device)), labels.to(self.device)

    def pixel_values(self, pixels: torch.Tensor) -> torch.Tensor:
        """The model's input: normalised, in the model's precision."""
        return self.normalization.from_pixels(pixels).to(self._first_parameter.dtype)

    def logits(self, pixel_values: torch.Tensor, **inputs) -> torch.Tensor:
        model = self.model if self._copy is None else self._copy.model
        images = {"pixel_values": pixel_values} if self._by_name else {}
        return logits_of(model(*([] if self._by_name else [pixel_values]), **images, **inputs))

    def forward_in(self, dtype: torch.dtype | None) -> Forward:
        """This classifier under autocast; None means the model's own precision, whatever the surrounding context."""

        def forward(pixels: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                return self(pixels)

        return forward

    def in_fast_format(self, pixels: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """Run convolutions in channels_last on a CPU, where that is up to 1.5 times as fast and never slower.

        A fixed rule, not a benchmark at run time: the formats round differently, and results must not depend on the
        load of the machine, the process, or whether the run was resumed. Models on other devices keep their format,
        and so do models whose code fails on channels_last images, which is tried out on `pixels`.
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
        """The model with all its weights; if they are sharded, all processes must call this at the same time."""
        if self._copy is None:
            yield self.model
            return
        with self._copy.holding(self.model) as model, self._autocast():
            yield model

    @contextlib.contextmanager
    def under_attack(self, *, training: bool = False) -> Iterator[None]:
        """Hold the model in the state that an attack needs; see [`under_attack`]."""
        with self.whole_weights() as model, under_attack(model, training=training):
            yield

    @property
    def _first_parameter(self) -> torch.Tensor:
        return next(self.model.parameters(), torch.empty(0))


def logits_of(outputs: Any) -> torch.Tensor:
    """The logits from a model's output: a tensor, or an object or dictionary with `logits`.

    Raises:
        ValueError: if there are no logits, or fewer than two classes.
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


def check_batch(inputs: Mapping[str, Any], num_labels: int, *, may_be_soft: bool = False) -> None:
    """Refuse a batch without images or labels, with extra tensors, or with labels outside the model's classes.

    `may_be_soft` accepts probabilities of shape `(batch, num_labels)` as labels.
    """
    missing = [key for key in ("pixel_values", "labels") if key not in inputs]
    if missing:
        raise ValueError(
            f"A batch has no {missing}, its keys are {sorted(inputs)}; let the dataset and `data_collator` return "
            "`pixel_values` and `labels` (and keep `remove_unused_columns=False` for a transform made on the fly)."
        )
    tensors = [key for key, value in inputs.items() if isinstance(value, torch.Tensor)]
    if others := [key for key in tensors if key not in ("pixel_values", "labels")]:
        raise ValueError(
            f"A batch holds further tensors {others}; only `pixel_values` can be attacked. Leave them out."
        )
    labels = inputs["labels"]
    if may_be_soft and labels.is_floating_point() and labels.dim() == 2:
        sums = labels.sum(dim=1)
        if (
            labels.shape[1] != num_labels
            or (labels < 0).any()
            or not torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
        ):
            raise ValueError(
                f"Soft `labels` must hold {num_labels} probabilities per image, which sum to 1; got shape "
                f"{tuple(labels.shape)}, values from {labels.min():.4g} and sums from {sums.min():.4g} to "
                f"{sums.max():.4g}."
            )
        return
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"`labels` must hold one class index per image, got {labels.dtype} of shape {tuple(labels.shape)}; "
            "regression and several labels per image are not supported."
        )
    check_labels("A batch", labels, num_labels)


def blank_image(model: nn.Module) -> torch.Tensor:
    """One image of the size in the model's `config`. Convolutional networks name none and take any: 224 pixels."""
    config: Any = model.config
    if "input_size" in (getattr(config, "pretrained_cfg", None) or {}):  # timm
        channels, *size = config.pretrained_cfg["input_size"]
    else:
        channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    parameter = next(model.parameters())
    return torch.zeros(1, channels, height, width, dtype=parameter.dtype, device=parameter.device)


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
    """A `forward` that counts the images it is called with, and the images it receives a gradient for."""

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


# --- Temporary states of a model ---


@contextlib.contextmanager
def _holding(things: Iterable[Any], attribute: str, value: bool) -> Iterator[None]:
    """Set a flag of all these, then restore it where it was different."""
    changed = [thing for thing in things if getattr(thing, attribute) != value]
    for thing in changed:
        setattr(thing, attribute, value)
    try:
        yield
    finally:
        for thing in changed:
            setattr(thing, attribute, not value)


def in_mode(model: nn.Module, *, training: bool) -> contextlib.AbstractContextManager[None]:
    """Put all modules into training or evaluation mode."""
    return _holding(model.modules(), "training", training)


def parameters_frozen(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Switch off parameter gradients: an attack differentiates with respect to the images only."""
    return _holding(model.parameters(), "requires_grad", False)


@contextlib.contextmanager
def in_memory_format(model: nn.Module, memory_format: torch.memory_format) -> Iterator[None]:
    """Hold the weights of 2D convolutions in this memory format, then restore the original tensors."""
    kept = [(parameter, parameter.data) for parameter in model.parameters() if parameter.dim() == 4]
    for parameter, data in kept:
        parameter.data = data.to(memory_format=memory_format)
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def batch_norm_frozen(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Keep modules with running statistics in evaluation mode.

    Adversarial examples are crafted against running statistics. With batch statistics the same weights are a different
    function, and learning from the examples there undoes the training (README, "Why BatchNorm is frozen").
    """
    normalizing = (module for module in model.modules() if getattr(module, "running_mean", None) is not None)
    return _holding(normalizing, "training", False)


@contextlib.contextmanager
def under_attack(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Everything an attack on `model` needs: input gradients but no parameter gradients, one mode for all modules.

    The model and the global random number generators are unchanged afterwards: in training mode, where dropout draws
    from the generators, their state is restored. Modules with running statistics always stay in evaluation mode.
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
    """A second model without weights of its own, which borrows those of a model sharded over processes.

    FSDP gathers weights in every forward and backward pass, on all processes at once. An attack would gather them in
    each of its steps, and an evaluation would hang if one process needed more steps than another. Borrowing gathers
    them only once, and the sharded model takes no part in the attack: its hooks and flags stay untouched.
    """

    def __init__(self, model: nn.Module):
        empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in model.parameters()}
        self.model: nn.Module = copy.deepcopy(model, empty)
        self._empty = dict(self.model.named_parameters())

    @contextlib.contextmanager
    def holding(self, divided: nn.Module) -> Iterator[nn.Module]:
        """The copy with the sharded model's current weights; all processes must call this at the same time."""
        whole = {name: _gathered(value) for name, value in divided.state_dict().items()}
        self.model.load_state_dict(whole, assign=True)
        try:
            yield self.model
        finally:
            self.model.load_state_dict(self._empty, assign=True, strict=False)


def _gathered(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
