"""The public AutoAttack at one epsilon, as a second opinion: package `pyautoattack`, extra `autoattack`.

The package expects float32 logits and contiguous images, fails on fewer than four classes, reseeds the global random
number generator and disables any debugger or coverage tool. The adapter here handles all of that.
"""

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..attacks.base import Forward, Passes
from ..models.classifier import CountedForward
from ..threat_model import ThreatModel


ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}  # as named in that package


class ReferenceResult(NamedTuple):
    """What AutoAttack found at one epsilon."""

    robust: torch.Tensor  # (batch,), bool: correct on the clean image and under every attack that was run
    adversarial: torch.Tensor  # like the pixels
    attacks: tuple[str, ...]  # the attacks that were run
    passes: Passes  # sums over examples


def check_installed() -> None:
    """Raise an `ImportError` that says how to get `pyautoattack` if it is not installed."""
    if importlib.util.find_spec("pyautoattack") is None:
        raise ImportError(
            "The reference needs the package `pyautoattack`, the extra `autoattack` of hf_rft: "
            "`pip install pyautoattack==0.2.0`."
        )


def reference_attacks(attacks: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """The attacks that are defined for this many classes: targeted DLR needs a fourth logit."""
    return tuple(attack for attack in attacks if attack != "apgd-t" or num_classes >= 4)


def run_autoattack(
    forward: Forward,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    *,
    threat_model: ThreatModel,
    num_classes: int,
    attacks: Sequence[str] = ATTACKS,
    seed: int = 0,
    batch_size: int = 100,
) -> ReferenceResult:
    """Run attacks of the public AutoAttack, each on the examples that withstood the previous ones.

    Args:
        forward (`Callable`):
            Maps pixels in [0, 1] to logits; the model behind it must be in evaluation mode.
        pixels (`torch.Tensor` of shape `(batch, channels, height, width)`):
            Clean images, pixels in [0, 1].
        labels (`torch.Tensor` of shape `(batch,)`):
            True classes.
        threat_model ([`ThreatModel`]):
            Norm and a single epsilon above 0.
        num_classes (`int`):
            Number of logits.
        attacks (`Sequence[str]`, *optional*):
            Any of `"apgd-ce"`, `"apgd-t"`, `"fab-t"` and `"square"`; `"apgd-t"` needs at least four classes and is
            skipped otherwise.
        seed (`int`, *optional*, defaults to 0):
            The seed of the attacks. The states of the global random number generators are preserved.
        batch_size (`int`, *optional*, defaults to 100):
            Images in a forward pass.

    Raises:
        ValueError: for a norm that AutoAttack does not support.
    """
    if threat_model.norm not in _NORMS:
        raise ValueError(f"AutoAttack has no norm {threat_model.norm!r}; the reference knows {list(_NORMS)}.")
    check_installed()
    from pyautoattack import AutoAttack

    attacks = reference_attacks(attacks, num_classes)
    counted = CountedForward(forward)
    devices = [pixels.device] if pixels.is_cuda else []
    with torch.random.fork_rng(devices=devices), _trace_function_kept():
        autoattack = AutoAttack(
            _Logits(counted),
            norm=_NORMS[threat_model.norm],
            eps=float(threat_model.epsilon),
            version="standard",
            device=pixels.device,
            seed=seed,
        )
        autoattack.attacks_to_run = list(attacks)
        targets = min(9, num_classes - 1)
        for targeted in (autoattack.apgd_targeted, autoattack.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, targets)
        autoattack.logger.setLevel(logging.WARNING)
        adversarial, predictions = autoattack.run_standard_evaluation(
            pixels.float().contiguous(), labels, batch_size=batch_size
        )
    return ReferenceResult(predictions == labels, adversarial, attacks, counted.passes)


class _Logits(torch.nn.Module):
    """Float32 logits whose gradients go to the images only, and are contiguous."""

    def __init__(self, forward: Forward):
        super().__init__()
        self._forward = forward

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and pixels.requires_grad:
            return _ImageGradient.apply(pixels, self._forward)
        return self._forward(pixels).float()


class _ImageGradient(torch.autograd.Function):
    """FAB calls `backward`, which would also fill the parameters' `.grad`, and the package calls `view`, which fails
    on the gradients of a channels_last model."""

    @staticmethod
    def forward(ctx, pixels, forward):
        with torch.enable_grad():
            ctx.leaf = pixels.detach().requires_grad_()
            ctx.logits = forward(ctx.leaf)
        return ctx.logits.detach().float()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.to(ctx.logits.dtype)
        return torch.autograd.grad(ctx.logits, ctx.leaf, gradient, retain_graph=True)[0].contiguous(), None


@contextlib.contextmanager
def _trace_function_kept() -> Iterator[None]:
    trace = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(trace)
