"""Targeted Auto-PGD: one run of APGD for each of the most likely wrong classes.

Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks"
(https://huggingface.co/papers/2003.01690), section 4.
"""

from functools import partial

import torch

from ..threat_model import ThreatModel
from ..utils.noise import Generators, check_generators
from .apgd import apgd, apgd_passes
from .base import (
    Forward,
    Passes,
    check_inputs,
    likeliest_wrong_classes,
    select_generators,
    states_passes,
    targeted_dlr,
)


def _passes(steps: int, norm: str = "linf", targets: int = 9) -> Passes:
    forward, backward = apgd_passes(steps, norm)
    return Passes(forward=1 + targets * (forward + 1), backward=targets * backward)


@states_passes(_passes)
def apgd_targeted(
    forward: Forward,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    *,
    threat_model: ThreatModel,
    steps: int,
    generator: Generators = None,
    random_start: bool = True,
    step_size: float | None = None,
    targets: int = 9,
) -> torch.Tensor:
    """APGD towards the wrong classes with the largest clean logits, one at a time, until an example is fooled.

    See [`Attack`] for the common arguments. Passes for an example that withstands everything: one forward for the
    clean logits, then `targets` runs of [`apgd`], each followed by one forward to check the result. Once fooled, an
    example costs nothing more.

    Args:
        steps (`int`):
            Gradient evaluations for each target.
        random_start (`bool`, *optional*, defaults to `True`):
            Start each run from a random point, as in [`apgd`]; every target gets a new one.
        step_size (`float`, *optional*):
            As in [`apgd`].
        targets (`int`, *optional*, defaults to 9):
            How many classes to aim at; capped at the number of classes minus one.

    Returns:
        `torch.Tensor`: the first misclassified image found for each example; if it withstands all targets, the image
        that came closest to the last one.
    """
    pixels = check_inputs(pixels, labels, steps)
    if targets < 1:
        raise ValueError(f"`targets={targets}` must be at least 1.")
    if threat_model.is_trivial or len(pixels) == 0:
        return pixels
    threat_model.radius(pixels)  # check the lengths here: indexing below would hide surplus epsilons or generators
    check_generators(generator, len(pixels))
    with torch.no_grad():
        clean_logits = forward(pixels)
    classes = likeliest_wrong_classes(clean_logits, labels, targets)
    options = {"threat_model": threat_model, "steps": steps, "random_start": random_start, "step_size": step_size}
    fooled = clean_logits.argmax(dim=1) != labels
    return aim_at(classes, fooled, forward, pixels, labels, generator=generator, **options)


def aim_at(
    classes: torch.Tensor,
    fooled: torch.Tensor,
    forward: Forward,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    *,
    threat_model: ThreatModel,
    steps: int,
    generator: Generators,
    random_start: bool,
    step_size: float | None,
) -> torch.Tensor:
    """APGD towards each column of `classes`, of shape `(batch, targets)`, for the examples not yet `fooled`."""
    adversarial, fooled = pixels.clone(), fooled.clone()
    for target in classes.unbind(dim=1):
        standing = (~fooled).nonzero().flatten()
        if len(standing) == 0:
            break
        found = apgd(
            forward,
            pixels[standing],
            labels[standing],
            threat_model=threat_model.select(standing),
            steps=steps,
            generator=select_generators(generator, standing),
            random_start=random_start,
            step_size=step_size,
            objective=partial(targeted_dlr, targets=target[standing]),
            early_stop=True,
        )
        adversarial[standing] = found
        with torch.no_grad():
            fooled[standing] = forward(found).argmax(dim=1) != labels[standing]
    return adversarial
