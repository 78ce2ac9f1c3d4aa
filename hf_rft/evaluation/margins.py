"""Margin consistency: on a robust model, the margin of the clean logits says which predictions are brittle.

Ngnawe et al. 2024, "Detecting brittle decisions for free: leveraging margin consistency in deep robust classifiers"
(https://huggingface.co/papers/2406.18451). It is a property of a model, to be measured (`report.margin_correlation`)
before it is used, and an attacker who aims at the margin itself can break it.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..utils.values import SHARE


if TYPE_CHECKING:
    from .report import RobustnessReport


def logit_margins(logits: torch.Tensor) -> torch.Tensor:
    """Largest logit minus the second largest, of logits of shape `(batch, classes)`; shape `(batch,)`."""
    largest, second = logits.float().topk(2, dim=1).values.unbind(dim=1)
    return largest - second


def margin_correlation(margins: np.ndarray | None, distances: np.ndarray) -> float:
    """See [`RobustnessReport.margin_correlation`]."""
    from scipy.stats import kendalltau  # slow to import

    if margins is None:
        return math.nan
    is_right = distances > 0
    # `kendalltau` compares ranks, so any number above all others stands for "farther than looked".
    reached = np.where(np.isfinite(distances), distances, np.finfo(float).max)
    correlation, _ = kendalltau(margins[is_right], reached[is_right])
    return float(correlation)


def margin_threshold(margins: np.ndarray | None, is_brittle: np.ndarray, recall: float) -> float:
    """See [`RobustnessReport.margin_threshold`]."""
    if recall not in SHARE or recall == 0:
        raise ValueError(f"`recall={recall!r}` must be a number above 0 and at most 1.")
    if margins is None:
        raise ValueError("The report holds no margins: it was made by an older hf_rft. Evaluate again.")
    if not is_brittle.any():
        raise ValueError("No prediction of the report is brittle: there is nothing to recall. Evaluate more examples.")
    return float(np.quantile(margins[is_brittle], recall, method="inverted_cdf"))


@torch.no_grad()
def brittle(model: torch.nn.Module, batch: Mapping[str, Any] | torch.Tensor, threshold: float) -> torch.Tensor:
    """Which predictions are likely to change under attack, at the cost of a forward pass; shape `(batch,)`, bool.

    Args:
        model (`torch.nn.Module`):
            Maps `pixel_values` to logits, or to an output that has them.
        batch (`Mapping` or `torch.Tensor`):
            The model's inputs, or `pixel_values` alone.
        threshold (`float`):
            From `report.margin_threshold()` of the same model.
    """
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    return logit_margins(getattr(output, "logits", output)) <= threshold


class Estimate(NamedTuple):
    """A robust accuracy that was not measured on all examples, and its 95 % interval."""

    robust_accuracy: float
    low: float
    high: float


def estimate_robust_accuracy(report: "RobustnessReport", is_right: np.ndarray, margins: np.ndarray) -> Estimate:
    """Robust accuracy of a large set, of which only a random subset was attacked.

    The subset says how likely a correct prediction is to withstand the largest epsilon, given its margin; the mean of
    that over the large set is corrected by its mean error on the subset, which makes it unbiased whatever the margins
    are worth (prediction-powered inference, Angelopoulos et al. 2023, https://huggingface.co/papers/2301.09633). Where
    margins say nothing, the interval is about as wide as the subset's own.

    Args:
        report ([`RobustnessReport`]):
            Of the subset.
        is_right (`np.ndarray` of shape `(large,)`, bool):
            Whether each example of the large set is classified correctly.
        margins (`np.ndarray` of shape `(large,)`):
            Their [`logit_margins`].

    Raises:
        ValueError: if the report holds no margins or fewer than four examples, or the large set is empty or of two
            lengths.
    """
    from scipy.stats import t  # slow to import

    if report.margins is None or len(report) < 4:
        raise ValueError("`report` must hold margins, of at least four examples; evaluate again, or more examples.")
    is_right, margins = np.asarray(is_right, dtype=bool), np.asarray(margins, dtype=float)
    if is_right.ndim != 1 or is_right.shape != margins.shape or len(margins) == 0:
        raise ValueError(
            f"`is_right` and `margins` must hold one value per example, got the shapes {is_right.shape} and "
            f"{margins.shape}."
        )
    subset_is_right, is_robust = report.broken_at > 0, report.broken_at == len(report.epsilons)
    # Each half of the subset is judged by what the other half teaches, or its errors would look too small.
    halves = np.arange(len(report)) % 2 == 0
    predicted, on_large = np.empty(len(report)), np.zeros(len(is_right))
    for half in (halves, ~halves):
        taught = ~half & subset_is_right
        chance = _isotonic(report.margins[taught], is_robust[taught])
        predicted[half] = np.where(subset_is_right[half], chance(report.margins[half]), 0)
        on_large += np.where(is_right, chance(margins), 0) / 2
    errors = is_robust - predicted
    value = on_large.mean() + errors.mean()
    # Two errors at either extreme stand for those too rare to have been seen, as in differences.py.
    padded = np.concatenate([errors, [-1, 1]])
    of_errors = t.ppf(0.975, len(padded) - 1) * padded.std(ddof=1) / math.sqrt(len(padded))
    half = math.hypot(of_errors, 1.96 * on_large.std() / math.sqrt(len(on_large)))
    low, high = value - half, value + half
    return Estimate(*(float(np.clip(number, 0, 1)) for number in (value, low, high)))


def _isotonic(margins: np.ndarray, is_robust: np.ndarray):
    """The share of robust predictions as a function of the margin that never falls."""
    from scipy.optimize import isotonic_regression  # slow to import

    if len(margins) == 0:
        return np.zeros_like
    order = np.argsort(margins, kind="stable")
    shares = isotonic_regression(is_robust[order].astype(float)).x
    return lambda at: np.interp(at, margins[order], shares)
