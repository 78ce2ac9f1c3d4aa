import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from scipy.stats import t

from evaluation.test_report import GRID, make_report, reports
from hf_rft.evaluation.differences import contributions, difference_interval, paired_difference


@given(reports())
@hypothesis_settings(deadline=None, max_examples=30)
def test_contributions_are_trapezoids_whose_mean_is_the_expected_robustness(report):
    found = contributions(report.epsilons, report.broken_at)
    grid = [float(epsilon) for epsilon in report.epsilons]
    survives = [[index > place for place in range(len(grid))] for index in report.broken_at]
    np.testing.assert_allclose(found, np.trapezoid(np.array(survives, dtype=float), grid, axis=1) / grid[-1])
    assert found.mean() == pytest.approx(report.expected_robustness)


def test_difference_is_taken_example_by_example():
    mean, (low, high) = paired_difference(make_report((0, 1, 2, 4, 4)), make_report((0, 1, 2, 4, 4)))
    assert mean == 0 and low == -high and 0.5 < high < 1  # of five examples
    # The same example is always a step ahead: nearly certain, although the models' own intervals are wide.
    ahead, behind = make_report([1, 2] * 50, epsilons=GRID[:2]), make_report([0, 1] * 50, epsilons=GRID[:2])
    mean, (low, high) = paired_difference(ahead, behind)
    assert mean == 0.5 and 0.43 < low < 0.5 < high < 0.53
    # A quarter of the differences is 0.5, the others 0: plus and minus 1.96 standard errors, 0.5 * sqrt(3 / 16 / 400).
    better, worse = (make_report([0, first, 2, 2] * 100, epsilons=GRID[:2]) for first in (1, 0))
    mean, (low, high) = paired_difference(better, worse)
    assert (mean, low, high) == (0.125, pytest.approx(0.1038, abs=0.004), pytest.approx(0.1462, abs=0.004))
    assert paired_difference(worse, better)[0] == -0.125


@pytest.mark.parametrize("count", [1, 8, 500])
def test_models_that_never_differ_may_still_differ_where_nobody_looked(count):
    """All differences are 0: the four added examples are all of the variance, 4 / (count + 3)."""
    low, high = difference_interval(np.zeros(count))
    half = t.ppf(0.975, count + 3) * np.sqrt(4 / (count + 3) / (count + 4))
    assert (low, high) == pytest.approx((max(-half, -1), min(half, 1)))


DIFFERENCES = {
    "rarely better": ([0, 1], [0.97, 0.03]),
    "rarely either": ([-1, 0, 1], [0.01, 0.98, 0.01]),
    "always a step, rarely less": ([0, 0.5], [0.02, 0.98]),
    "a coin": ([-1, 1], [0.5, 0.5]),
    "half a step either way": ([-0.5, 0, 0.5], [0.1, 0.75, 0.15]),
    "skewed": ([-1, 0.125], [0.05, 0.95]),
}


@pytest.mark.parametrize("count", [8, 20, 100, 500])
@pytest.mark.parametrize("values, chances", DIFFERENCES.values(), ids=DIFFERENCES)
def test_at_least_94_percent_of_the_intervals_hold_the_true_difference(count, values, chances):
    samples = np.random.default_rng(0).multinomial(count, chances, size=10_000)
    samples, times = np.unique(samples, axis=0, return_counts=True)
    intervals = np.array([difference_interval(np.repeat(values, sample)) for sample in samples])
    mean = np.dot(values, chances)
    held = (intervals[:, 0] <= mean) & (mean <= intervals[:, 1])
    assert times @ held / 10_000 >= 0.94
