"""One batch against a grid of epsilons."""

from collections.abc import Sequence
from fractions import Fraction

import torch

from ..attacks.base import Attack, Forward
from ..noise import EVALUATION_ATTACK, example_generators
from ..threat_model import ThreatModel


def adversarial_predictions(
    forward: Forward,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    *,
    clean_predictions: torch.Tensor,
    norm: str,
    epsilons: Sequence[Fraction],
    attack: Attack,
    steps: int,
    seed: int,
    first: int = 0,
) -> torch.Tensor:
    """Predicted class of every example at every epsilon.

    An example fooled at one epsilon is fooled at every larger one, since its adversarial example lies in the larger
    ball too: it keeps that prediction and is not attacked again. So accuracy never rises with epsilon, and at epsilon
    0 it is the clean accuracy.

    Args:
        forward (`Callable`):
            Maps pixels to logits.
        pixels (`torch.Tensor` of shape `(batch, channels, height, width)`):
            Clean images, pixels in [0, 1].
        labels (`torch.Tensor` of shape `(batch,)`):
            True classes.
        clean_predictions (`torch.Tensor` of shape `(batch,)`):
            Predicted classes of the clean images: those at epsilon 0.
        norm (`str`):
            `"linf"`, `"l2"` or `"l1"`.
        epsilons (`Sequence[Fraction]`):
            Increasing, the first is 0.
        seed, first (`int`):
            The noise of an example depends on the seed and its position in the dataset; `first` is that of the first.

    Returns:
        `torch.Tensor` of shape `(batch, len(epsilons))`, integer.
    """
    predictions = [clean_predictions]
    for epsilon in epsilons[1:]:
        current = predictions[-1].clone()
        standing = (current == labels).nonzero().flatten()
        if len(standing) > 0:
            positions = [first + position for position in standing.tolist()]
            threat_model = ThreatModel(norm, epsilon)
            adversarial = attack(
                forward,
                pixels[standing],
                labels[standing],
                threat_model=threat_model,
                steps=steps,
                generator=example_generators(pixels.device, positions, EVALUATION_ATTACK, seed),
            )
            with torch.no_grad():
                current[standing] = forward(adversarial).argmax(dim=1)
        predictions.append(current)
    return torch.stack(predictions, dim=1)
