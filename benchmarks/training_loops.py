"""Training steps that `RobustTrainer` is compared with: the least there is to compute, and what users write today.

None of the peers' packages is imported, except pyautoattack's APGD. The loops are re-implementations, as short as
possible, of what the packages do in one step: how they get the gradient, in which mode, with how many passes. Their
shape is `loop(model, update, batch, settings)`; `update(loss_of_model)` is the optimizer step that all have in common.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hf_rft import PixelNormalization
from hf_rft.losses import trades_loss
from hf_rft.models.classifier import batch_norm_frozen, parameters_frozen


class Settings(NamedTuple):
    """Of an L-inf attack."""

    epsilon: float
    steps: int

    @property
    def step_size(self) -> float:
        return 2.5 * self.epsilon / self.steps


class Batch(NamedTuple):
    pixel_values: torch.Tensor  # normalised, (batch, channels, height, width)
    labels: torch.Tensor  # (batch,)
    normalization: PixelNormalization

    @property
    def pixels(self) -> torch.Tensor:
        return self.normalization.to_pixels(self.pixel_values)


class Updater:
    """Backward pass, clipping, optimizer step: the same for all loops."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, autocast: Callable[[], Any]):
        self.model, self.optimizer, self.autocast = model, optimizer, autocast

    def __call__(self, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


# --- The least there is to compute ---


def ideal(model, update: Updater, batch: Batch, settings: Settings, *, loss: str, extra_forward: bool = False) -> None:
    """`steps` input gradients without parameter gradients, and one full pass. The input does not even move.

    TRADES: one clean forward pass more, and the full pass has clean and moved images. `extra_forward` adds the one
    with which APGD looks at its last iterate. Modules with running statistics stay in evaluation mode, as in
    `RobustTrainer`.
    """
    with batch_norm_frozen(model):
        with parameters_frozen(model):
            leaf = batch.pixel_values.detach().requires_grad_()
            if loss == "trades":
                with torch.no_grad(), update.autocast():
                    clean = F.log_softmax(model(pixel_values=batch.pixel_values).logits.float(), dim=1)
            for _ in range(settings.steps):
                with update.autocast():
                    logits = model(pixel_values=leaf).logits
                if loss == "trades":
                    value = F.kl_div(F.log_softmax(logits.float(), dim=1), clean, reduction="sum", log_target=True)
                else:
                    value = F.cross_entropy(logits.float(), batch.labels, reduction="sum")
                torch.autograd.grad(value, leaf)
            if extra_forward:
                with torch.no_grad(), update.autocast():
                    model(pixel_values=batch.pixel_values)
        if loss == "trades":
            with update.autocast():
                logits = model(pixel_values=torch.cat([batch.pixel_values, batch.pixel_values])).logits
            clean_logits, adversarial_logits = logits.chunk(2)
            update(trades_loss(clean_logits, adversarial_logits, batch.labels).mean())
        else:
            with update.autocast():
                logits = model(pixel_values=batch.pixel_values).logits
            update(F.cross_entropy(logits.float(), batch.labels))


# --- What users write today ---


def _logits(model, update: Updater, batch: Batch, pixels: torch.Tensor) -> torch.Tensor:
    """Packages attack pixels in [0, 1]: the normalisation belongs to the attacked model."""
    with update.autocast():
        return model(pixel_values=batch.normalization.from_pixels(pixels)).logits.float()


def _moved(pixels: torch.Tensor, adversarial: torch.Tensor, gradient: torch.Tensor, settings: Settings):
    adversarial = adversarial.detach() + settings.step_size * gradient.sign()
    delta = (adversarial - pixels).clamp(-settings.epsilon, settings.epsilon)
    return (pixels + delta).clamp(0, 1).detach()


def _random_start(pixels: torch.Tensor, settings: Settings) -> torch.Tensor:
    noise = torch.empty_like(pixels).uniform_(-settings.epsilon, settings.epsilon)
    return (pixels + noise).clamp(0, 1)


def by_autograd_grad(logits_of, pixels, labels, settings: Settings) -> torch.Tensor:
    """torchattacks' PGD: the gradient by `torch.autograd.grad`, while the parameters want gradients too."""
    adversarial = _random_start(pixels, settings)
    for _ in range(settings.steps):
        adversarial.requires_grad_()
        loss = F.cross_entropy(logits_of(adversarial), labels)
        adversarial = _moved(pixels, adversarial, torch.autograd.grad(loss, adversarial)[0], settings)
    return adversarial


def by_backward(logits_of, pixels, labels, settings: Settings, *, before_step=lambda: None) -> torch.Tensor:
    """The gradient by `loss.backward()`, which also computes, and keeps, that of every parameter."""
    adversarial = _random_start(pixels, settings)
    for _ in range(settings.steps):
        before_step()
        adversarial.requires_grad_()
        F.cross_entropy(logits_of(adversarial), labels, reduction="sum").backward()
        adversarial = _moved(pixels, adversarial, adversarial.grad, settings)
    return adversarial


def as_foolbox(logits_of, pixels, labels, settings: Settings) -> torch.Tensor:
    """Its LinfPGD: `loss.backward()`, and one forward pass more, which tells the user what was fooled."""
    adversarial = by_backward(logits_of, pixels, labels, settings)
    with torch.no_grad():
        logits_of(adversarial)
    return adversarial


def as_art(logits_of, pixels, labels, settings: Settings, *, model) -> torch.Tensor:
    """Its PGD for PyTorch: numpy in, numpy out, parameter gradients emptied and filled in each step."""
    array, targets = pixels.cpu().numpy(), labels.cpu().numpy()
    pixels, labels = torch.from_numpy(array).to(pixels.device), torch.from_numpy(targets).to(labels.device)
    adversarial = by_backward(logits_of, pixels, labels, settings, before_step=model.zero_grad)
    return torch.from_numpy(np.array(adversarial.cpu().numpy())).to(pixels.device)


class _ContiguousGradient(torch.autograd.Function):
    """pyautoattack cannot take the gradients of a channels_last model."""

    @staticmethod
    def forward(ctx, pixels):
        return pixels.view_as(pixels)

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient.contiguous()


def as_pyautoattack(logits_of, pixels, labels, settings: Settings) -> torch.Tensor:
    """The package's own APGD, one run on all images: `steps + 1` gradients."""
    from pyautoattack.autopgd_base import APGDAttack

    attack = APGDAttack(
        lambda images: logits_of(_ContiguousGradient.apply(images)),
        n_iter=settings.steps,
        norm="Linf",
        eps=settings.epsilon,
        device=pixels.device,
    )
    pixels = pixels.contiguous()
    attack.init_hyperparam(pixels)
    return attack.attack_single_run(pixels, labels)[0]


def attack_in_eval_mode(model, update: Updater, batch: Batch, settings: Settings, *, attack) -> None:
    """The loop around a package: switch the mode, attack, switch it back, empty the gradients, update."""
    pixels = batch.pixels
    logits_of = partial(_logits, model, update, batch)
    model.eval()
    adversarial = attack(logits_of, pixels, batch.labels, settings)
    model.train()
    model.zero_grad()
    update(F.cross_entropy(logits_of(adversarial), batch.labels))


def attack_in_train_mode(model, update: Updater, batch: Batch, settings: Settings) -> None:
    """The loop of Madry et al.: like torchattacks', but the model stays in training mode."""
    logits_of = partial(_logits, model, update, batch)
    adversarial = by_autograd_grad(logits_of, batch.pixels, batch.labels, settings)
    update(F.cross_entropy(logits_of(adversarial), batch.labels))


def trades_reference(model, update: Updater, batch: Batch, settings: Settings) -> None:
    """The authors' loop: the clean logits anew in each step, with their graph, and twice in the update."""
    pixels = batch.pixels
    logits_of = partial(_logits, model, update, batch)

    def divergence(adversarial: torch.Tensor) -> torch.Tensor:
        clean = F.softmax(logits_of(pixels), dim=1)
        return F.kl_div(F.log_softmax(logits_of(adversarial), dim=1), clean, reduction="sum")

    model.eval()
    adversarial = pixels + 0.001 * torch.randn_like(pixels)
    for _ in range(settings.steps):
        adversarial.requires_grad_()
        gradient = torch.autograd.grad(divergence(adversarial), adversarial)[0]
        adversarial = _moved(pixels, adversarial, gradient, settings)
    model.train()
    update.optimizer.zero_grad()
    clean_loss = F.cross_entropy(logits_of(pixels), batch.labels)
    update(clean_loss + 6.0 * divergence(adversarial) / len(pixels))


def loops(attack: str, loss: str) -> dict[str, Callable[..., None]]:
    """The loops that do the same as `RobustTrainer` with this attack and loss, by name; `ideal` is the first."""
    found: dict[str, Callable[..., None]] = {"ideal": partial(ideal, loss=loss)}
    if attack == "apgd":
        found["ideal, one forward more"] = partial(ideal, loss=loss, extra_forward=True)
    if loss == "trades":
        return {**found, "TRADES reference *": trades_reference} if attack == "pgd" else found
    if attack == "apgd":
        return {**found, "pyautoattack APGD": partial(attack_in_eval_mode, attack=as_pyautoattack)}
    return {
        **found,
        "torchattacks *": partial(attack_in_eval_mode, attack=by_autograd_grad),
        "loss.backward() *": partial(attack_in_eval_mode, attack=by_backward),
        "Foolbox *": partial(attack_in_eval_mode, attack=as_foolbox),
        "ART *": lambda model, *rest: attack_in_eval_mode(model, *rest, attack=partial(as_art, model=model)),
        "Madry reference *": attack_in_train_mode,
    }
