"""FGSM (Goodfellow et al. 2015, https://huggingface.co/papers/1412.6572), with a random start (Wong et al. 2020)."""

import torch

from .base import Forward, Passes, states_passes
from .pgd import pgd


@states_passes(lambda steps=1, norm="linf": Passes(1, 1))
def fgsm(
    forward: Forward,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    *,
    steps: int = 1,
    random_start: bool = True,
    step_size: float | None = None,
    early_stop: bool = False,
    **options,
) -> torch.Tensor:
    """One steepest step, the first of [`pgd`]; see there and [`Attack`] for the common arguments.

    Args:
        steps (`int`, *optional*, defaults to 1):
            Must be 1.
        random_start (`bool`, *optional*, defaults to `True`):
            Start from a uniform point of the ball, which delays catastrophic overfitting (FGSM-RS).
        step_size (`float`, *optional*):
            Length of the step relative to epsilon: 1.25 from a random start, 1 otherwise.
    """
    if steps != 1:
        raise ValueError(f"FGSM takes exactly one step, got `steps={steps}`; use `pgd` for more.")
    if step_size is None:
        step_size = 1.25 if random_start else 1.0
    options |= {"steps": 1, "random_start": random_start, "step_size": step_size, "early_stop": early_stop}
    return pgd(forward, pixels, labels, **options)
