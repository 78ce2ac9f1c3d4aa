"""Attacks, one per file. Each is a pure function; configure it with `functools.partial`."""

from .apgd import apgd, apgd_dlr
from .apgd_targeted import apgd_targeted
from .base import Attack
from .fgsm import fgsm
from .fmn import fmn
from .malt import malt
from .nfgsm import nfgsm
from .pgd import pgd
from .square import square


# Names for the command line. In Python, any callable with the signature of `Attack` will do.
_ASCENTS: dict[str, Attack] = {"fgsm": fgsm, "pgd": pgd, "apgd": apgd, "apgd_dlr": apgd_dlr}
# For evaluation.
ATTACKS: dict[str, Attack] = {**_ASCENTS, "apgd_targeted": apgd_targeted, "malt": malt, "fmn": fmn, "square": square}
# For training: those that keep increasing a loss. The others stop once an example is misclassified, which teaches a
# model little. N-FGSM leaves the ball, so it cannot measure robustness.
TRAINING_ATTACKS: dict[str, Attack] = {**_ASCENTS, "nfgsm": nfgsm}
SINGLE_STEP = ("fgsm", "nfgsm")

__all__ = [
    "ATTACKS",
    "SINGLE_STEP",
    "TRAINING_ATTACKS",
    "Attack",
    "apgd",
    "apgd_dlr",
    "apgd_targeted",
    "fgsm",
    "fmn",
    "malt",
    "nfgsm",
    "pgd",
    "square",
]
