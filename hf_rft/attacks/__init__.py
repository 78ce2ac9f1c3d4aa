"""Attacks, one method a file. Each is a pure function; `functools.partial` makes a configured one."""

from .apgd import apgd, apgd_dlr
from .apgd_targeted import apgd_targeted
from .base import Attack
from .fgsm import fgsm
from .pgd import pgd


# The names the command line knows. In Python, pass any callable with the signature of `Attack` instead.
ATTACKS = {"fgsm": fgsm, "pgd": pgd, "apgd": apgd, "apgd_dlr": apgd_dlr}

__all__ = ["ATTACKS", "Attack", "apgd", "apgd_dlr", "apgd_targeted", "fgsm", "pgd"]
