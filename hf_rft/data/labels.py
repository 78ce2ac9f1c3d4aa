"""Class labels: which column holds them, and whether they fit the model."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np


LABEL_COLUMNS = ("labels", "label")


def check_class_order(where: str, class_names: Sequence[str] | None, config: Any) -> None:
    """Refuse a model that numbers the same class names differently; `where` begins the message.

    Args:
        class_names (`Sequence[str]`, *optional*):
            The data's class names, in the order of their numbers; None if unknown.
        config:
            The model's configuration.

    Raises:
        ValueError: naming the first such class.
    """
    number_of = _numbers_of_unique_names(config)
    for number, name in enumerate(class_names or []):
        if number_of.get(name, number) != number:
            raise ValueError(
                f"{where} numbers the class {name!r} {number}, the model {number_of[name]} (`config.id2label`); bring "
                "the labels into the model's order (`hf-rft evaluate` does), or, if the numbers are "
                f"right and the names are not, {NUMBERS_ARE_RIGHT}."
            )


NUMBERS_ARE_RIGHT = "cast the label column to `datasets.Value('int64')`"


def class_numbers(
    where: str, class_names: Sequence[str], config: Any, numbers_are_right: str = NUMBERS_ARE_RIGHT
) -> list[int]:
    """The model's number for each class of the data, found by name.

    A model without names of its own (`LABEL_0`, ...) is assumed to number its classes like the data. A minority of the
    names may be missing from the model or belong to several of its classes, provided that all other names have the
    same numbers in both: ImageNet's second "crane" goes by different names.

    Args:
        where (`str`):
            The argument that names the data, for the message.
        class_names (`Sequence[str]`):
            The data's class names, in the order of their numbers.
        config:
            The model's configuration.
        numbers_are_right (`str`):
            For the message: what to do if the numbers agree and only the names differ.

    Raises:
        ValueError: if the data's classes are not the model's.
    """
    numbers, names, number_of = list(range(len(class_names))), class_names_of(config), _numbers_of_unique_names(config)
    if not has_class_names(config):
        return numbers
    found = [number_of.get(name, number) for number, name in enumerate(class_names)]
    unknown = [name for name in class_names if name not in number_of]
    if not unknown or (found == numbers and 2 * len(unknown) < len(numbers)):
        return found
    several = [name for name in unknown if name in names.values()]
    problem = f"Several classes of the model have the names {several[:5]}"
    if len(several) < len(unknown):
        missing = [name for name in unknown if name not in several]
        problem = f"The model has no classes {missing[:5]}"
    raise ValueError(
        f"{problem}; its classes are {list(names.values())[:5]} and so on. Give images of its classes ({where}), "
        "rename the data's classes, or, if their numbers are the model's and only the names differ, "
        f"{numbers_are_right}."
    )


def has_class_names(config: Any) -> bool:
    """Whether a model's classes have names other than the defaults of transformers (`LABEL_0`, ...)."""
    return any(name != f"LABEL_{number}" for number, name in class_names_of(config).items())


def class_names_of(config: Any) -> dict[int, str]:
    """The model's class names by number; empty if it has none."""
    return {int(number): str(name) for number, name in (getattr(config, "id2label", None) or {}).items()}


def _numbers_of_unique_names(config: Any) -> dict[str, int]:
    names = class_names_of(config)
    counts = Counter(names.values())
    return {name: number for number, name in names.items() if counts[name] == 1}


def names_of_missing_classes(labels: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """Names of the classes without examples."""
    counts = np.bincount(np.asarray(labels), minlength=len(class_names))
    return [name for name, count in zip(class_names, counts, strict=True) if count == 0]
