"""Onset of task adaptation: when a run begins to learn the new task (paper, section 3)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def onset_threshold(num_classes: int) -> float:
    """The accuracy above which a model has begun to learn the task.

    The paper's threshold is 5 %. With few classes that is below chance, so the larger of 5 % and twice chance counts;
    with two classes, where twice chance is 100 %, half-way between chance and 100 %.
    """
    chance = 1 / num_classes
    return max(0.05, min(2 * chance, (1 + chance) / 2))


def adaptation_onset(accuracies: Sequence[float], num_classes: int) -> int | None:
    """The first epoch whose clean validation accuracy passes the threshold.

    Args:
        accuracies (`Sequence[float]`):
            Clean validation accuracy after each epoch, in [0, 1].
        num_classes (`int`):
            Number of classes of the task.

    Returns:
        `int` or None: the epoch, counted from 1; None if the threshold was never passed (*transfer failure*).
    """
    threshold = onset_threshold(num_classes)
    for epoch, accuracy in enumerate(accuracies, start=1):
        if accuracy > threshold:
            return epoch
    return None


def while_training(history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The entries of a `log_history` up to the one that ends training: later ones measure the finished model."""
    end = next((i for i, entry in enumerate(history) if "train_runtime" in entry), len(history))
    return list(history[:end])


def evaluations(history: Sequence[Mapping[str, Any]], prefix: str = "eval") -> list[Mapping[str, Any]]:
    """The evaluations made while training ran, in order.

    An evaluation before the first step is left out: there, nothing has been learnt.

    Args:
        history (`Sequence[Mapping]`):
            `TrainerState.log_history`.
        prefix (`str`, *optional*, defaults to `"eval"`):
            Of the metrics' names; with several evaluation datasets `"eval_<name>"`.
    """
    return [entry for entry in while_training(history) if f"{prefix}_accuracy" in entry and entry.get("epoch")]


def find_onset(history: Sequence[Mapping[str, Any]], num_classes: int, prefix: str = "eval") -> int | None:
    """[`adaptation_onset`] by what was logged: evaluations may be more or less frequent than one an epoch.

    Returns:
        `int` or None: the epoch, counted from 1, in which the first evaluation above the threshold was made; None if
        there was none.
    """
    measured = evaluations(history, prefix)
    first = adaptation_onset([entry[f"{prefix}_accuracy"] for entry in measured], num_classes)
    return None if first is None else math.ceil(measured[first - 1]["epoch"])


def describe_onset(history: Sequence[Mapping[str, Any]], num_classes: int, prefix: str = "eval") -> str:
    """In which epoch a run began to learn its task, by its `log_history`."""
    onset = find_onset(history, num_classes, prefix)
    if onset is not None:
        return f"epoch {onset}"
    return "never (transfer failure)" if evaluations(history, prefix) else "not measured"


def eval_prefix(trainer: Any) -> str:
    """Of the metrics' names in the log; of several validation sets the first counts."""
    names = list(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else []
    return f"eval_{names[0]}" if names else "eval"
