"""Onset of task adaptation: when a run begins to learn the new task (paper, section 3)."""

from collections.abc import Sequence


def adaptation_onset(accuracies: Sequence[float], num_classes: int) -> int | None:
    """The first epoch whose clean validation accuracy passes the threshold.

    The paper's threshold is 5 %. With few classes that is below chance, so the larger of 5 % and twice chance counts;
    with two classes, where twice chance is 100 %, half-way between chance and 100 %.

    Args:
        accuracies (`Sequence[float]`):
            Clean validation accuracy after each epoch, in [0, 1].
        num_classes (`int`):
            Number of classes of the task.

    Returns:
        `int` or None: the epoch, counted from 1; None if the threshold was never passed (*transfer failure*).
    """
    chance = 1 / num_classes
    threshold = max(0.05, min(2 * chance, (1 + chance) / 2))
    for epoch, accuracy in enumerate(accuracies, start=1):
        if accuracy > threshold:
            return epoch
    return None
