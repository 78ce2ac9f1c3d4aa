"""Attacks, one method a file. Each is a pure function; `functools.partial` makes a configured one."""

from functools import partial

from .apgd import apgd
from .base import Attack
from .fgsm import fgsm
from .objectives import dlr
from .pgd import pgd


# The names the command line knows. In Python, pass any callable with the signature of `Attack` instead.
ATTACKS = {"fgsm": fgsm, "pgd": pgd, "apgd": apgd, "apgd_dlr": partial(apgd, objective=dlr)}

__all__ = ["ATTACKS", "Attack", "apgd", "fgsm", "pgd"]
