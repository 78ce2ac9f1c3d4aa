"""How two models differ on the same examples, with intervals."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from scipy.stats import t

from ..metrics.expected_robustness.expected_robustness import expected_robustness
from .report import RobustnessReport


def contributions(epsilons: Sequence[Fraction | float], broken_at: np.ndarray) -> np.ndarray:
    """What each example adds to the expected robustness, which is the mean of these.

    Args:
        epsilons (`Sequence`):
            The grid.
        broken_at (`np.ndarray` of shape `(examples,)`):
            Place in the grid of the first epsilon that breaks each example; its length if none does.
    """
    withstands = broken_at[:, None] > np.arange(len(epsilons))
    return expected_robustness([float(epsilon) for epsilon in epsilons], withstands.astype(float))


def paired_difference(report: RobustnessReport, other: RobustnessReport) -> tuple[float, tuple[float, float]]:
    """Expected robustness minus that of `other` on the same examples, with its 95 % interval.

    An example that is hard for one model is often hard for the other, so the interval is narrower than the two
    models' own intervals suggest.
    """
    ours, theirs = (contributions(one.epsilons, one.broken_at) for one in (report, other))
    return float((ours - theirs).mean()), difference_interval(ours - theirs)


def difference_interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % interval of the true mean, from differences in [-1, 1] that may be few, rare or all equal.

    Student's t after adding two examples at either extreme, as Agresti and Coull do for a share. They stand for the
    differences too rare to have been seen: without them, models that are right on the same examples would differ by
    0 for certain.
    """
    padded = np.concatenate([differences, [-1, -1, 1, 1]])
    half = t.ppf(0.975, len(padded) - 1) * padded.std(ddof=1) / np.sqrt(len(padded))
    return float(max(padded.mean() - half, -1)), float(min(padded.mean() + half, 1))
