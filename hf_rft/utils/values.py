"""Checks of values: numbers in their ranges, and errors of libraries that name the argument at fault."""

import contextlib
import dataclasses
import textwrap
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple, cast


class Range(NamedTuple):
    """Numbers from `lowest` to `highest`, both included unless `is_open`, which leaves `lowest` out."""

    lowest: float
    highest: float = 1e9  # keeps infinity out
    is_whole: bool = False
    is_open: bool = False
    hint: str = ""  # ends the message

    def __contains__(self, value: Any) -> bool:
        if not isinstance(value, Integral if self.is_whole else Real) or isinstance(value, bool):
            return False
        number = cast(float, value)  # any real number compares like one
        return (self.lowest < number if self.is_open else self.lowest <= number) and number <= self.highest

    def __str__(self) -> str:
        kind = "a whole number" if self.is_whole else "a number"
        bounds = f"above {self.lowest:g} and at most" if self.is_open else f"from {self.lowest:g} to"
        return f"{kind} {bounds} {self.highest:.10g}{self.hint}"


POSITIVE = Range(0, is_open=True)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
COUNT = Range(1, is_whole=True)
SEED = Range(0, 2**32 - 1, is_whole=True)  # what numpy's generators take, and with them `set_seed`
SECONDS = Range(0, 365 * 24 * 60 * 60, is_open=True)  # an operating system waits no longer


def check_ranges(arguments: Any, ranges: Mapping[str, Range], *, is_flag: bool = False) -> None:
    """Refuse fields of a dataclass that are no numbers in their ranges; None is one where it is the default.

    Args:
        arguments:
            A dataclass instance.
        ranges (`Mapping[str, Range]`):
            By the name of the field.
        is_flag (`bool`, *optional*, defaults to `False`):
            Write `--name value` instead of `` `name=value` ``.

    Raises:
        ValueError: naming field, value and range.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(arguments)}
    for name, allowed in ranges.items():
        value = getattr(arguments, name)
        if value not in allowed and not (value is None and defaults[name] is None):
            written = f"--{name} {value}" if is_flag else f"`{name}={value!r}`"
            raise ValueError(f"{written} must be {allowed}.")


@contextlib.contextmanager
def naming(argument: str, value: Any, remedy: str) -> Iterator[None]:
    """Turn whatever is raised inside, where only `value` can be the cause, into a `ValueError` that names it.

    Meant for single calls of a library that loads something: these raise anything, down to the parser of the file.
    """
    try:
        yield
    except Exception as error:
        reason, cause = f"{type(error).__name__}: {error}", error.__cause__
        while cause is not None:  # `datasets` says only there what was wrong
            reason, cause = f"{reason} Cause: {type(cause).__name__}: {cause}", cause.__cause__
        reason = textwrap.shorten(reason, 500, placeholder=" ...")
        raise ValueError(f"{argument} {value!r} cannot be loaded; {remedy}. ({reason})") from error
