"""Onset of task adaptation: when a run begins to learn the new task (paper, section 3)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


MAJORITY = "majority_class_share"  # metric: share of the evaluated examples that belong to the largest class


def onset_threshold(chance: float) -> float:
    """The accuracy above which a model has begun to learn the task.

    The paper's threshold is 5 %. Where always naming the largest class is right more often than 2.5 %, because classes
    are few or of unequal size, it is 5 points above that (at most twice it, and half-way to 100 %).

    Args:
        chance (`float`):
            Accuracy of always naming the largest class, in (0, 1).
    """
    return max(0.05, chance + min(chance, 0.05, (1 - chance) / 2))


def while_training(history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The entries of a `log_history` up to the one that ends training: later ones measure the finished model."""
    end = next((i for i, entry in enumerate(history) if "train_runtime" in entry), len(history))
    return list(history[:end])


def evaluations(history: Sequence[Mapping[str, Any]], prefix: str = "eval") -> list[Mapping[str, Any]]:
    """The evaluations made during training, in order, except one before the first step.

    Args:
        history (`Sequence[Mapping]`):
            `TrainerState.log_history`.
        prefix (`str`, *optional*, defaults to `"eval"`):
            Prefix of the metrics; with several evaluation datasets `"eval_<name>"`.
    """
    return [entry for entry in while_training(history) if f"{prefix}_accuracy" in entry and entry.get("epoch")]


def chance_accuracy(history: Sequence[Mapping[str, Any]], num_classes: int, prefix: str = "eval") -> float:
    """Accuracy of always naming the largest class of the validation data, as the trainer logs it; 1 / `num_classes`
    if it did not."""
    logged = (entry.get(f"{prefix}_{MAJORITY}") for entry in history)
    return next((share for share in logged if share is not None), 1 / num_classes)


def first_above_chance(
    history: Sequence[Mapping[str, Any]], num_classes: int, prefix: str = "eval"
) -> Mapping[str, Any] | None:
    """The first evaluation during training whose clean accuracy passes [`onset_threshold`]; None: none does
    (*transfer failure*)."""
    threshold = onset_threshold(chance_accuracy(history, num_classes, prefix))
    found = (entry for entry in evaluations(history, prefix) if entry[f"{prefix}_accuracy"] > threshold)
    return next(found, None)


def find_onset(history: Sequence[Mapping[str, Any]], num_classes: int, prefix: str = "eval") -> int | None:
    """The epoch, counted from 1, of [`first_above_chance`]."""
    first = first_above_chance(history, num_classes, prefix)
    return None if first is None else math.ceil(first["epoch"])


def describe_onset(history: Sequence[Mapping[str, Any]], num_classes: int, prefix: str = "eval") -> str:
    """The onset in words."""
    onset = find_onset(history, num_classes, prefix)
    if onset is not None:
        return f"epoch {onset}"
    return "never (transfer failure)" if evaluations(history, prefix) else "not measured"


def eval_prefix(trainer: Any) -> str:
    """Prefix of the metrics in the log; that of the first evaluation dataset if there are several."""
    names = list(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else []
    return f"eval_{names[0]}" if names else "eval"
