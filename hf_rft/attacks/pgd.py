"""Projected gradient descent (Madry et al. 2018, https://huggingface.co/papers/1706.06083)."""

import torch

from ..threat_model import ThreatModel
from ..utils.noise import Generators
from .base import Forward, Objective, Passes, PerNorm, check_inputs, evaluate, log_odds, states_passes, where


# Default total length of all steps, relative to epsilon. 2.5 (Madry et al.) crosses the ball from any start. On the L2
# sphere, n steps of length a / n turn the perturbation towards the gradient until tan(angle / 2) = exp(-a): a = 2.5
# still loses 1.4 % of epsilon, a = 4 less than 0.1 %.
PATH_LENGTH = PerNorm("pgd.PATH_LENGTH", {"linf": 2.5, "l2": 4.0, "l1": 2.5})


@states_passes(lambda steps, norm="linf": Passes(steps, steps))
def pgd(
    forward: Forward,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    *,
    threat_model: ThreatModel,
    steps: int,
    generator: Generators = None,
    random_start: bool = True,
    step_size: float | None = None,
    objective: Objective = log_odds,
    early_stop: bool = False,
) -> torch.Tensor:
    """Steepest ascent steps of fixed length, each followed by a projection onto ball and box.

    See [`Attack`] for the common arguments. Passes: `steps` forward, `steps` backward; the last iterate is returned
    without being evaluated.

    Args:
        random_start (`bool`, *optional*, defaults to `True`):
            Start from a uniform point of the ball instead of the clean image.
        step_size (`float`, *optional*):
            Length of a step relative to epsilon. Defaults to `2.5 / steps`, or `4 / steps` for L2.
        objective (`Callable`, *optional*):
            Maps logits and labels to the value to increase, per example. Defaults to the log-odds, which rise
            together with the cross-entropy.
        early_stop (`bool`, *optional*, defaults to `False`):
            Return the first misclassified iterate of each example and spend no further passes on it. Meant for
            evaluation: in training, a misclassified example is worth improving further.
    """
    pixels = check_inputs(pixels, labels, steps)
    if threat_model.is_trivial or len(pixels) == 0:
        return pixels
    step = threat_model.radius(pixels) * (PATH_LENGTH[threat_model.norm] / steps if step_size is None else step_size)
    adversarial = threat_model.random_start(pixels, generator) if random_start else pixels
    stopped = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    standing = None
    for _ in range(steps):
        current = evaluate(forward, adversarial, labels, objective, standing=standing)
        if early_stop:
            stopped = stopped | current.fooled
            standing = (~stopped).nonzero().flatten()
            if len(standing) == 0:
                break
        moved = threat_model.project(adversarial + threat_model.step(current.gradient, step), pixels)
        adversarial = where(stopped, adversarial, moved) if early_stop else moved
    return adversarial
