"""Numbers a user gives: of the right type, finite, and in a range in which they mean something."""

import dataclasses
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple, cast


# The least number that is too large, for what only has to be finite and for what only has to be countable.
HUGE, COUNTLESS = 1e9, 10**9

# What numpy's generators take, and with them `set_seed`.
LARGEST_SEED = 2**32 - 1


class Range(NamedTuple):
    """Numbers from `lowest` to `highest`, both included unless `is_open`, which leaves `lowest` out."""

    lowest: float
    highest: float
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
        if self.is_open:
            return f"{kind} above {self.lowest:g} and at most {self.highest:.10g}{self.hint}"
        return f"{kind} from {self.lowest:g} to {self.highest:.10g}{self.hint}"


POSITIVE = Range(0, HUGE, is_open=True)
NOT_NEGATIVE = Range(0, HUGE)
SHARE = Range(0, 1)
COUNT = Range(1, COUNTLESS, is_whole=True)
COUNT_OR_NONE = Range(0, COUNTLESS, is_whole=True)
SEED = Range(0, LARGEST_SEED, is_whole=True)
YEAR = 365 * 24 * 60 * 60
SECONDS = Range(0, YEAR, is_open=True)


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
        if (value is None and defaults[name] is None) or value in allowed:
            continue
        written = f"--{name} {value}" if is_flag else f"`{name}={value!r}`"
        reason = " (not finite)" if isinstance(value, float) and not math.isfinite(value) else ""
        raise ValueError(f"{written} must be {allowed}{reason}.")
