"""A robustness profile: one model under the norms that it was not trained for, at comparable radii.

A model robust in one norm is often not robust in another (Croce and Hein 2022, "Adversarial robustness against
multiple and single l_p-threat models via quick fine-tuning of robust classifiers",
https://huggingface.co/papers/2105.12508).
Their radii, 8/255, 0.5 and 12 on CIFAR-10 and 4/255, 2 and 255 on ImageNet for L-inf, L2 and L1, are what "comparable"
means here: of one L-inf radius, the L2 radius grows with the square root of the number of pixel values, the L1 radius
with the number itself.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from ..threat_model import NORMS
from .evaluator import Evaluator
from .tiers import TIERS


# Share of the largest radius of a ball inside the L-inf ball's corners: 0.29 and 0.33 (L2), 0.12 and 0.11 (L1) in the
# published radii.
SHARES = {"linf": 1.0, "l2": 0.3, "l1": 0.12}
_POWERS = {"linf": 0.0, "l2": 0.5, "l1": 1.0}


def comparable_epsilon(norm: str, epsilon: Fraction, other: str, image_shape: Sequence[int]) -> Fraction:
    """The radius in another norm that is comparable to `epsilon` in `norm`, to two digits.

    Args:
        norm, other (`str`):
            Names in `NORMS`.
        epsilon (`Fraction`):
            In pixels scaled to [0, 1].
        image_shape (`Sequence[int]`):
            Channels, height and width.
    """
    count = math.prod(image_shape)
    of_norm, of_other = (SHARES[each] * count ** _POWERS[each] for each in (norm, other))
    radius = float(epsilon) * of_other / of_norm
    if other != "linf":
        return Fraction(f"{radius:.2g}")
    return min(Fraction(f"{255 * radius:.2g}") / 255, Fraction(1))


def comparable_evaluators(evaluator: Evaluator, image_shape: Sequence[int]) -> list[Evaluator]:
    """The same protocol in the other norms: the same shares of a comparable radius, the same tier."""
    found, name = [], evaluator.tier.name
    for norm in NORMS:
        if norm != evaluator.norm:
            tier = TIERS[name][norm] if name in TIERS else evaluator.tier
            *_, largest = evaluator.epsilons
            radius = comparable_epsilon(evaluator.norm, largest, norm, image_shape)
            epsilons = [radius * epsilon / largest for epsilon in evaluator.epsilons]
            found.append(replace(evaluator, norm=norm, epsilons=epsilons, tier=tier))
    return found
