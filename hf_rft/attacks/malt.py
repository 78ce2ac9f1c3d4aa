"""MALT, mesoscopic almost linearity targeting: targeted APGD towards the few nearest classes.

Melamed et al. 2024, "MALT powers up adversarial attacks" (https://huggingface.co/papers/2407.02240): near an image a
model is almost linear, so the classes that are near to first order are those to aim at, rather than those with large
logits. They aim at nine classes; here the default is three (benchmarks/README.md).
"""

import torch

from ..threat_model import ThreatModel
from ..utils.noise import Generators, check_generators
from .apgd import apgd_passes
from .apgd_targeted import aim_at
from .base import Forward, Passes, check_inputs, nearest_classes, states_passes


def _passes(steps: int, norm: str = "linf", targets: int = 3, candidates: int = 100) -> Passes:
    forward, backward = apgd_passes(steps, norm)
    return Passes(forward=1 + targets * (forward + 1), backward=candidates + targets * backward)


@states_passes(_passes)
def malt(
    forward: Forward,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    *,
    threat_model: ThreatModel,
    steps: int,
    generator: Generators = None,
    random_start: bool = True,
    step_size: float | None = None,
    targets: int = 3,
    candidates: int = 100,
) -> torch.Tensor:
    """APGD towards the wrong classes whose boundaries are nearest to first order, until an example is fooled.

    See [`Attack`] for the common arguments and [`apgd_targeted`] for the rest. Passes for an example that withstands
    everything: one forward and `candidates` backward for the distances, then `targets` runs of [`apgd`], each followed
    by one forward.

    Args:
        targets (`int`, *optional*, defaults to 3):
            How many classes to aim at; capped at the number of classes minus one.
        candidates (`int`, *optional*, defaults to 100):
            How many classes, in order of their logits, to compare; capped likewise.
    """
    pixels = check_inputs(pixels, labels, steps)
    for name, value in (("targets", targets), ("candidates", candidates)):
        if value < 1:
            raise ValueError(f"`{name}={value}` must be at least 1.")
    if threat_model.is_trivial or len(pixels) == 0:
        return pixels
    threat_model.radius(pixels)  # check the lengths here: indexing would hide surplus epsilons or generators
    check_generators(generator, len(pixels))
    classes, fooled = nearest_classes(forward, pixels, labels, threat_model, candidates)
    options = {"threat_model": threat_model, "steps": steps, "random_start": random_start, "step_size": step_size}
    return aim_at(classes[:, :targets], fooled, forward, pixels, labels, generator=generator, **options)
