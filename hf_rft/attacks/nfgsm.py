"""N-FGSM (de Jorge et al. 2022, https://huggingface.co/papers/2202.01181): one step from strong noise."""

import torch

from ..threat_model import ThreatModel
from ..utils.noise import Generators, rand
from .base import Forward, Objective, Passes, check_inputs, evaluate, log_odds, states_passes


NOISE = 2.0  # largest change of a pixel by the noise, relative to epsilon (section 5)


@states_passes(lambda steps=1, norm="linf": Passes(1, 1))
def nfgsm(
    forward: Forward,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    *,
    threat_model: ThreatModel,
    steps: int = 1,
    generator: Generators = None,
    random_start: bool = True,
    step_size: float | None = None,
    objective: Objective = log_odds,
) -> torch.Tensor:
    """One signed step from uniform noise of twice epsilon, for training.

    The result is **not** projected onto the ball, only onto [0, 1]: a pixel may change by up to three times epsilon.
    So it measures no robustness. But a model that trains on it resists the catastrophic overfitting of [`fgsm`], at
    the same cost.

    See [`Attack`] for the common arguments.

    Args:
        steps (`int`, *optional*, defaults to 1):
            Must be 1.
        random_start (`bool`, *optional*, defaults to `True`):
            Must be True: the noise is the method.
        step_size (`float`, *optional*):
            Length of the step relative to epsilon. Defaults to 1.
        objective (`Callable`, *optional*):
            Maps logits and labels to the value to increase, per example. Defaults to the log-odds, which rise
            together with the cross-entropy.

    Raises:
        ValueError: for another norm than `"linf"`, several steps, or without the noise.
    """
    pixels = check_inputs(pixels, labels, steps)
    if steps != 1:
        raise ValueError(f"N-FGSM takes exactly one step, got `steps={steps}`; use `pgd` for more.")
    if threat_model.norm != "linf":
        raise ValueError(f"N-FGSM is defined for `norm='linf'`, got {threat_model.norm!r}; use `pgd`.")
    if not random_start:
        raise ValueError("`random_start=False` leaves out the noise of N-FGSM; use `fgsm`.")
    if threat_model.is_trivial or len(pixels) == 0:
        return pixels
    radius = threat_model.radius(pixels)
    noisy = (pixels + NOISE * radius * (2 * rand(pixels, generator) - 1)).clamp(0, 1)
    gradient = evaluate(forward, noisy, labels, objective).gradient
    return (noisy + threat_model.step(gradient, radius * (1.0 if step_size is None else step_size))).clamp(0, 1)
