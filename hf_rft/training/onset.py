"""Onset of task adaptation: when a run begins to learn the new task (paper, section 3)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def onset_threshold(num_classes: int) -> float:
    """The accuracy above which a model has begun to learn the task.

    The paper's threshold is 5 %. With few classes that is below chance, so the threshold is the larger of 5 % and
    twice chance; with two classes, where twice chance is 100 %, half-way between chance and 100 %.
    """
    chance = 1 / num_classes
    return max(0.05, min(2 * chance, (1 + chance) / 2))


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


def find_onset(history: Sequence[Mapping[str, Any]], num_classes: int, prefix: str = "eval") -> int | None:
    """The epoch, counted from 1, of the first evaluation whose clean accuracy passes the threshold.

    Returns:
        `int` or None: None if no evaluation passed it (*transfer failure*).
    """
    threshold = onset_threshold(num_classes)
    for entry in evaluations(history, prefix):
        if entry[f"{prefix}_accuracy"] > threshold:
            return math.ceil(entry["epoch"])
    return None


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
