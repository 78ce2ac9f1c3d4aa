"""FMN, the fast minimum-norm attack: the nearest misclassified image, not just one inside a given ball.

Pintor et al. 2021, "Fast minimum-norm adversarial attacks through adaptive norm constraints"
(https://huggingface.co/papers/2102.12827). Four differences from the published code:

* The perturbation is projected onto the ball, not scaled onto its sphere.
* The estimated distance is overshot a little; otherwise the search on a linear model ends on the boundary itself.
* The target is the class whose boundary is nearest to first order, not the one with the second largest logit.
* Steps are relative to the current radius, so no step size depends on the norm.
"""

import math
from functools import partial

import torch

from ..threat_model import ThreatModel
from ..utils.noise import Generators
from .base import Forward, Passes, check_inputs, evaluate, lead, nearest_classes, per_example, states_passes, where


# The radius changes by at least this share: inwards from the nearest fooling image, outwards while there is none.
# First and last step.
RADIUS_CHANGE = (0.05, 0.001)
# Length of a step relative to the current radius, first and last step.
STEP_LENGTH = (1.0, 0.01)
# How far to move beyond the estimated distance. It doubles with every step as long as an example has never been
# fooled: a small overshoot may vanish in float32, or fall short of a boundary that curves away.
OVERSHOOT, LARGEST_OVERSHOOT = 1e-4, 0.5


@states_passes(lambda steps, norm="linf", targets=9: Passes(steps + 2, steps + targets))
def fmn(
    forward: Forward,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    *,
    threat_model: ThreatModel,
    steps: int,
    generator: Generators = None,
    targets: int = 9,
) -> torch.Tensor:
    """Search for the smallest perturbation that fools the model, inside the ball of the threat model.

    See [`Attack`] for the common arguments. To measure distances, choose a radius larger than any example needs. An
    example is fooled once it is taken for any other class. Passes: `steps + 2` forward; `steps` backward, plus one for
    each class that might be the nearest.

    Args:
        steps (`int`):
            Gradient evaluations after the choice of the nearest class.
        generator (*optional*):
            Not used: the search starts from the clean image and is deterministic.
        targets (`int`, *optional*, defaults to 9):
            How many classes, in order of their logits, to compare for the nearest boundary; capped at the number of
            classes minus one.

    Returns:
        `torch.Tensor`: the nearest misclassified image found; if an example withstands, the image that came closest
        to the target class.
    """
    pixels = check_inputs(pixels, labels, steps)
    if targets < 1:
        raise ValueError(f"`targets={targets}` must be at least 1.")
    if threat_model.is_trivial or len(pixels) == 0:
        return pixels
    classes, fooled = nearest_classes(forward, pixels, labels, threat_model, targets)
    target = classes[:, 0]

    limit = threat_model.radius(pixels).flatten()
    adversarial, radius = pixels, torch.zeros_like(limit)
    overshoot = torch.full_like(limit, OVERSHOOT)
    nearest, distance = pixels, torch.where(fooled, 0.0, torch.inf).to(limit)
    closest, largest_lead = pixels, torch.full_like(limit, -torch.inf)
    for step in range(steps + 1):
        standing = (distance > 0).nonzero().flatten()
        if len(standing) == 0:
            break
        objective = partial(lead, targets=target)
        current = evaluate(forward, adversarial, labels, objective, gradient=step < steps, standing=standing)
        value, fooled = current.objective, current.fooled
        moved = threat_model.distance(adversarial, pixels)
        is_nearer, is_closer = fooled & (moved < distance), value > largest_lead
        nearest, distance = where(is_nearer, adversarial, nearest), torch.where(is_nearer, moved, distance)
        closest, largest_lead = where(is_closer, adversarial, closest), torch.where(is_closer, value, largest_lead)
        target = torch.where(fooled, current.prediction, target)
        if step == steps:
            break

        # The next radius to try: to first order, the target class's boundary lies at `moved - value / slope`.
        slope = threat_model.dual_norm(current.gradient)
        estimate = (moved - value / slope.clamp_min(torch.finfo(slope.dtype).tiny)) * (1 + overshoot)
        change = _cosine(RADIUS_CHANGE, step, steps)
        outward = estimate.maximum(radius * (1 + change))
        inward = estimate.clamp(distance / 2, distance * (1 - change))
        never_fooled = distance.isinf()
        overshoot = torch.where(never_fooled, (2 * overshoot).clamp_max(LARGEST_OVERSHOOT), OVERSHOOT)
        radius = torch.where(never_fooled, outward, inward).minimum(limit)

        length = per_example(_cosine(STEP_LENGTH, step, steps) * radius)
        moved = adversarial + _step(current.gradient, length, threat_model.norm)
        adversarial = ThreatModel(threat_model.norm, radius).project(moved, pixels)
    return where(distance.isinf(), closest, nearest)


def _step(gradient: torch.Tensor, length: torch.Tensor, norm: str) -> torch.Tensor:
    """The steepest step. In L1 it follows the gradient itself: the projection then picks the best few coordinates."""
    if norm == "l1":
        largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
        return length * gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
    return ThreatModel(norm, 0).step(gradient, length)


def _cosine(ends: tuple[float, float], step: int, steps: int) -> float:
    """Half a cosine wave from the first value to the second over the steps."""
    first, last = ends
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2
