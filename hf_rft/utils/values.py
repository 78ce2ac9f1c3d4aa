"""Checks of argument values: numeric ranges, and library errors that name the argument at fault."""

import contextlib
import dataclasses
import textwrap
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple, cast

from huggingface_hub.utils import validate_repo_id


class Range(NamedTuple):
    """Numbers from `lowest` to `highest`, inclusive; `is_open` excludes `lowest`."""

    lowest: float
    highest: float = 1e9  # excludes infinity
    is_whole: bool = False
    is_open: bool = False
    hint: str = ""  # appended to the message

    def __contains__(self, value: Any) -> bool:
        if not isinstance(value, Integral if self.is_whole else Real) or isinstance(value, bool):
            return False
        number = cast(float, value)  # any real number compares like a float
        return (self.lowest < number if self.is_open else self.lowest <= number) and number <= self.highest

    def __str__(self) -> str:
        kind = "a whole number" if self.is_whole else "a number"
        bounds = f"above {self.lowest:g} and at most" if self.is_open else f"from {self.lowest:g} to"
        return f"{kind} {bounds} {self.highest:.10g}{self.hint}"


POSITIVE = Range(0, is_open=True)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
COUNT = Range(1, is_whole=True)
SEED = Range(0, 2**32 - 1, is_whole=True)  # the range of numpy's legacy seeding, which `set_seed` calls
SECONDS = Range(0, 365 * 24 * 60 * 60, is_open=True)  # operating systems refuse longer timeouts


def is_repo_id(name: str) -> bool:
    """Whether it can be the name of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return True


def number_of_steps(steps: float, max_steps: int) -> float:
    """A number of optimizer steps that may be given, below 1, as a share of all, as `warmup_steps` of transformers."""
    return steps * max_steps if steps < 1 else steps


def check_ranges(arguments: Any, ranges: Mapping[str, Range], *, is_flag: bool = False) -> None:
    """Refuse dataclass fields outside their ranges; None is allowed where it is the default.

    Args:
        arguments:
            A dataclass instance.
        ranges (`Mapping[str, Range]`):
            Ranges by field name.
        is_flag (`bool`, *optional*, defaults to `False`):
            Write `--name value` instead of `` `name=value` ``.

    Raises:
        ValueError: naming the field, its value and its range.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(arguments)}
    for name, allowed in ranges.items():
        value = getattr(arguments, name)
        if value not in allowed and not (value is None and defaults[name] is None):
            written = f"--{name} {value}" if is_flag else f"`{name}={value!r}`"
            raise ValueError(f"{written} must be {allowed}.")


@contextlib.contextmanager
def naming(argument: str, value: Any, remedy: str) -> Iterator[None]:
    """Turn any exception raised inside, where only `value` can be the cause, into a `ValueError` that names it.

    Meant for single library calls that load something: these may raise anything, down to parser errors.
    """
    try:
        yield
    except Exception as error:
        reason, cause = f"{type(error).__name__}: {error}", error.__cause__
        while cause is not None:  # errors of `datasets` name the problem only in their causes
            reason, cause = f"{reason} Cause: {type(cause).__name__}: {cause}", cause.__cause__
        reason = textwrap.shorten(reason, 500, placeholder=" ...")
        raise ValueError(f"{argument} {value!r} cannot be loaded; {remedy}. ({reason})") from error
