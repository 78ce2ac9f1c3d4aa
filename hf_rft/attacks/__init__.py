"""Attacks, one per file. Each is a pure function; configure it with `functools.partial`."""

from .apgd import apgd, apgd_dlr
from .apgd_targeted import apgd_targeted
from .base import Attack
from .fgsm import fgsm
from .fmn import fmn
from .pgd import pgd
from .square import square


# Names for the command line. In Python, any callable with the signature of `Attack` will do.
# Training attacks keep increasing a loss; the others stop once an example is misclassified, which teaches a model
# little.
TRAINING_ATTACKS: dict[str, Attack] = {"fgsm": fgsm, "pgd": pgd, "apgd": apgd, "apgd_dlr": apgd_dlr}
ATTACKS: dict[str, Attack] = {**TRAINING_ATTACKS, "apgd_targeted": apgd_targeted, "fmn": fmn, "square": square}

__all__ = [
    "ATTACKS",
    "TRAINING_ATTACKS",
    "Attack",
    "apgd",
    "apgd_dlr",
    "apgd_targeted",
    "fgsm",
    "fmn",
    "pgd",
    "square",
]
