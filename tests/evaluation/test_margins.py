import math

import numpy as np
import pytest
import torch
from conftest import SIZE, make_model
from scipy.integrate import quad
from torch import nn

from hf_rft.evaluation.margins import brittle, estimate_robust_accuracy, logit_margins

from .test_report import make_report


def test_margin_is_the_lead_of_the_largest_logit():
    logits = torch.tensor([[1.0, 4.0, 2.5], [0.0, 0.0, -1.0], [-3.0, -5.0, -9.0]])
    assert logit_margins(logits).tolist() == [1.5, 0, 2]
    assert logit_margins(logits.bfloat16()).dtype == torch.float32


def test_correlation_is_one_if_margins_rank_the_examples_by_distance():
    distances = [0, 0.01, 0.2, 0.4, np.inf]
    report = make_report([0, 2, 2, 3, 4], distances=distances, margins=np.array([9.0, 1, 2, 3, 4]))
    assert report.margin_correlation == pytest.approx(1), "the misclassified example does not count"
    report.margins = -report.margins
    assert report.margin_correlation == pytest.approx(-1)
    report.margins = np.array([9.0, 1, 3, 2, 4])  # five of six pairs in order
    assert report.margin_correlation == pytest.approx(4 / 6)


def test_correlation_without_margins_is_not_a_number():
    assert math.isnan(make_report().margin_correlation)


def test_threshold_recalls_the_share_asked_for():
    margins = np.array([0.1, 9, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 5])
    report = make_report([0, 4, *[2] * 9, 4], margins=margins)
    is_brittle = (report.broken_at > 0) & (report.broken_at < 4)
    for recall in (0.1, 0.5, 0.9, 1):
        threshold = report.margin_threshold(recall)
        assert threshold in margins[is_brittle]
        assert (margins[is_brittle] <= threshold).mean() >= recall
        assert (margins[is_brittle] < threshold).mean() < recall, "the smallest threshold that does"


@pytest.mark.parametrize("recall", [0, -0.5, 1.5, "0.9", None])
def test_recall_must_be_a_share(recall):
    with pytest.raises(ValueError, match=r"`recall=.*` must be a number above 0 and at most 1"):
        make_report(margins=np.ones(5)).margin_threshold(recall)


def test_no_threshold_without_margins_or_brittle_predictions():
    with pytest.raises(ValueError, match="holds no margins: it was made by an older hf_rft"):
        make_report().margin_threshold()
    with pytest.raises(ValueError, match="No prediction of the report is brittle"):
        make_report([0, 4, 4], margins=np.ones(3)).margin_threshold()


def test_brittle_predictions_of_any_model():
    images = torch.rand(6, 3, SIZE, SIZE)
    model = make_model("vit").eval()
    margins = logit_margins(model(pixel_values=images).logits)
    threshold = margins.median().item()
    expected = (margins <= threshold).tolist()
    assert brittle(model, {"pixel_values": images}, threshold).tolist() == expected
    assert brittle(model, images, threshold).tolist() == expected and expected.count(True) == 3
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 4))
    assert brittle(plain, images, math.inf).tolist() == [True] * 6


# --- The robust accuracy of a large set ---


def draw(rng, size, slope):
    """Whether predictions are right and robust, and their margins; `slope` 0: margins say nothing."""
    margins = rng.exponential(size=size)
    is_right = rng.random(size) < 0.85
    is_robust = is_right & (rng.random(size) < 1 / (1 + np.exp(-slope * (margins - 0.7))))
    return is_right, is_robust, margins


def report_of(is_right, is_robust, margins):
    return make_report(np.where(is_right, np.where(is_robust, 4, 2), 0), margins=margins)


@pytest.mark.parametrize("slope", [0, 4])
def test_interval_holds_the_truth_in_95_percent_of_draws(slope):
    rng, covered, errors, width = np.random.default_rng(0), 0, [], []
    for _ in range(200):
        is_right, _, margins = draw(rng, 4000, slope)
        chance, _ = quad(lambda margin: math.exp(-margin) / (1 + math.exp(-slope * (margin - 0.7))), 0, 50)
        truth = 0.85 * chance
        estimate = estimate_robust_accuracy(report_of(*draw(rng, 150, slope)), is_right, margins)
        covered += estimate.low <= truth <= estimate.high
        errors.append(estimate.robust_accuracy - truth)
        width.append(estimate.high - estimate.low)
    assert covered >= 182, "fewer happen once in 200 times if it is 95 %"
    assert abs(np.mean(errors)) < 0.01, "unbiased"
    own = 2 * 1.96 * math.sqrt(0.4 * 0.6 / 150)
    assert np.mean(width) < 0.8 * own if slope else np.mean(width) < 1.15 * own


@pytest.mark.parametrize(("size", "share"), [(4, 0.5), (8, 1.0), (20, 0.95), (50, 0.03), (100, 0.98)])
def test_interval_holds_the_truth_where_few_or_rare_predictions_are_brittle(size, share):
    """Also where all examples of the subset agree."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        margins, is_robust = rng.exponential(size=5000), rng.random(5000) < share
        subset = rng.choice(5000, size, replace=False)
        report = report_of(np.ones(size, bool), is_robust[subset], margins[subset])
        estimate = estimate_robust_accuracy(report, np.ones(5000, bool), margins)
        covered += estimate.low <= is_robust.mean() <= estimate.high
    assert covered >= 182 and estimate.low < estimate.high


def test_estimate_of_a_set_that_is_never_right_is_zero():
    report = report_of(np.zeros(20, bool), np.zeros(20, bool), np.ones(20))
    value, low, high = estimate_robust_accuracy(report, np.zeros(50, bool), np.ones(50))
    assert value == low == 0 < high < 0.2


@pytest.mark.parametrize(("right", "margins"), [(3, 4), (0, 0)])
def test_the_large_set_has_one_value_per_example(right, margins):
    report = make_report(margins=np.ones(5))
    with pytest.raises(ValueError, match=rf"got the shapes \({right},\) and \({margins},\)"):
        estimate_robust_accuracy(report, np.ones(right, bool), np.ones(margins))


def test_estimate_needs_margins_and_examples():
    for report in (make_report(), make_report([1, 2], margins=np.ones(2))):
        with pytest.raises(ValueError, match="`report` must hold margins, of at least four examples"):
            estimate_robust_accuracy(report, np.ones(3, bool), np.ones(3))
