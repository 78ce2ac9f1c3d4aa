"""Adversarial weight perturbation, AWP (Wu et al. 2020, https://huggingface.co/papers/2004.05884).

Each optimizer step follows the gradient at weights that are moved a little, layer by layer, in the direction in which
the loss rises fastest. That flattens the loss over the weights and narrows the gap to validation data.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..utils.values import number_of_steps


def ascent(weight: torch.Tensor, gradient: torch.Tensor, gamma: float) -> torch.Tensor:
    """The perturbation of one weight tensor: along the gradient, `gamma` times as long as the weights (eq. 8, 9).

    Zero where the gradient is zero.
    """
    tiny = torch.finfo(gradient.dtype).tiny
    return gradient * (gamma * weight.norm() / gradient.norm().clamp_min(tiny))


class WeightPerturbation(TrainerCallback):
    """Perturbs the weights at the begin of each optimizer step, and restores them before the update.

    Only matrices and kernels are perturbed; biases and the scales of normalisations are not, as in the paper's code.

    Args:
        trainer ([`RobustTrainer`]):
            The trainer of the model; see `awp_gamma` and `awp_warmup_steps` of its arguments.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._kept: list[tuple[nn.Parameter, torch.Tensor]] = []

    @torch.no_grad()
    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step < number_of_steps(args.awp_warmup_steps, state.max_steps):
            return
        for weight, gradient in loss_gradients(self._trainer).items():
            self._kept.append((weight, weight.clone()))
            weight.add_(ascent(weight, gradient, args.awp_gamma))

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs):
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Give the weights the values they had when the step began, to the bit."""
        for weight, value in self._kept:
            weight.copy_(value)
        self._kept.clear()


@contextlib.contextmanager
def weights_restored(trainer: Any) -> Iterator[None]:
    """Leave no perturbed weights behind when training stops within a step."""
    try:
        yield
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, WeightPerturbation):
                callback.restore()


@torch.enable_grad()
def loss_gradients(trainer: Any) -> dict[nn.Parameter, torch.Tensor]:
    """Gradients of the loss of the optimizer step that begins, over all micro-batches and processes, for the weights
    that are perturbed. The step keeps the adversarial examples, so that none is made twice.

    The bare model is called: nothing is accumulated, and DDP exchanges nothing meanwhile.
    """
    model, step = trainer.model, trainer.optimizer_step
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.dim() > 1]
    sums = [torch.zeros_like(weight) for weight in weights]
    model.train()
    step.is_ascent = True
    try:
        with _buffers_kept(model):
            for batch in step.batches:
                with trainer.in_micro_batch():
                    with trainer.compute_loss_context_manager():
                        loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
                    found = torch.autograd.grad(loss, weights, allow_unused=True)
                for total, gradient in zip(sums, found, strict=True):
                    if gradient is not None:
                        total += gradient
    finally:
        step.is_ascent, step.micro_batch = False, 0
    return dict(zip(weights, [trainer.accelerator.reduce(total, "sum") for total in sums], strict=True))


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore the buffers afterwards: a BatchNorm in training mode must not count the same images twice."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
