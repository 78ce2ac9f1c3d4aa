from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rft.metrics.expected_robustness import expected_robustness as module


FOLDER = Path(module.__file__).parent


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return evaluate.load(str(FOLDER), cache_dir=str(tmp_path_factory.mktemp("cache")))


@st.composite
def predictions_and_grid(draw):
    count, points, classes = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(2, 4))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    epsilons = np.concatenate([[0], np.cumsum(rng.uniform(0.1, 1, points - 1))])
    return rng.integers(classes, size=(count, points)), rng.integers(classes, size=count), epsilons


def test_example_of_the_docstring(metric):
    results = metric.compute(
        predictions=[[0, 0, 0], [1, 1, 0], [1, 0, 0], [2, 2, 2]], references=[0, 1, 1, 0], epsilons=[0, 0.01, 0.02]
    )
    assert results["expected_robustness"] == pytest.approx(0.5)
    assert results["accuracies"] == [0.75, 0.5, 0.25]
    assert (results["clean_accuracy"], results["robust_accuracy"]) == (0.75, 0.25)
    assert (results["lower_bound"], results["upper_bound"]) == pytest.approx((0.375, 0.625))
    assert set(results) == {
        "expected_robustness",
        "clean_accuracy",
        "robust_accuracy",
        "accuracies",
        "lower_bound",
        "upper_bound",
        "confidence_interval",
    }


def test_row_of_published_accuracies():
    epsilons, accuracies = [0, 0.25, 0.5, 1, 2], [90.83, 82.34, 70.17, 40.47, 5.23]
    assert module.expected_robustness(epsilons[:4], accuracies[:4]) == pytest.approx(68.37, abs=0.005)


@given(predictions_and_grid())
@settings(deadline=None, max_examples=50)
def test_right_only_where_right_at_all_smaller_epsilons(case):
    predictions, references, epsilons = case
    right = [
        [all(row[: k + 1] == y) for k in range(len(epsilons))] for row, y in zip(predictions, references, strict=True)
    ]
    assert module.still_correct(predictions, references).tolist() == right


@given(predictions_and_grid())
@settings(deadline=None, max_examples=50)
def test_closed_forms(case):
    predictions, references, epsilons = case
    results = module.robustness_summary(predictions.tolist(), references.tolist(), epsilons.tolist())
    right = module.still_correct(predictions, references)
    accuracies = right.mean(axis=0)
    assert results["accuracies"] == pytest.approx(accuracies.tolist())
    widths = np.diff(epsilons)
    mean = accuracies[0]
    if len(epsilons) > 1:
        mean = (widths * (accuracies[1:] + accuracies[:-1]) / 2).sum() / epsilons[-1]
        assert results["lower_bound"] == pytest.approx((widths * accuracies[1:]).sum() / epsilons[-1])
        assert results["upper_bound"] == pytest.approx((widths * accuracies[:-1]).sum() / epsilons[-1])
    assert results["expected_robustness"] == pytest.approx(mean)
    shares = [module.expected_robustness(epsilons, row) for row in right]
    assert results["expected_robustness"] == pytest.approx(np.mean(shares))
    low, high = results["confidence_interval"]
    assert 0 <= low <= results["expected_robustness"] + 1e-12 and results["expected_robustness"] - 1e-12 <= high <= 1
    assert results["lower_bound"] <= results["expected_robustness"] + 1e-12
    assert results["expected_robustness"] <= results["upper_bound"] + 1e-12
    assert all(a >= b for a, b in zip(results["accuracies"], results["accuracies"][1:], strict=False))


@given(st.lists(st.floats(0, 2), min_size=1, max_size=20), st.integers(1, 200))
@settings(deadline=None, max_examples=50)
def test_mean_of_distances_cut_off_at_the_largest_epsilon(distances, intervals):
    """An example at distance d is right below d: the exact value is mean min(d, E) / E, and the grid brackets it."""
    distances, largest = np.array(distances), 1.5
    epsilons = np.linspace(0, largest, intervals + 1)
    right = distances[:, None] > epsilons
    exact = np.minimum(distances, largest).mean() / largest
    summary = module.robustness_summary(np.where(right, 1, 0), np.ones(len(distances)), epsilons)
    assert summary["lower_bound"] - 1e-9 <= exact <= summary["upper_bound"] + 1e-9
    assert summary["expected_robustness"] == pytest.approx(exact, abs=0.5 / intervals + 1e-9)


def test_confidence_interval_covers():
    """About 95 % of the intervals from random samples hold the true mean."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        distances = rng.uniform(0, 2, 60)
        epsilons = np.linspace(0, 1, 21)
        right = distances[:, None] > epsilons
        low, high = module.robustness_summary(right, np.ones(60), epsilons)["confidence_interval"]
        covered += low <= 0.75 <= high
    assert 88 <= covered <= 100


def test_confidence_interval_is_reproducible(metric):
    rng = np.random.default_rng(0)
    case = {
        "predictions": rng.integers(2, size=(40, 3)).tolist(),
        "references": [0] * 40,
        "epsilons": [0, 0.5, 1],
    }
    np.random.seed(1)
    first = metric.compute(**case)
    np.random.seed(2)
    assert metric.compute(**case) == first
    low, high = first["confidence_interval"]
    assert low < first["expected_robustness"] < high


@pytest.mark.parametrize("predictions", [[[1, 1]], [[1, 0], [1, 0], [1, 0]]])
def test_equal_examples_have_an_interval_of_one_point(predictions):
    results = module.robustness_summary(predictions, [1] * len(predictions), [0, 1])
    assert results["confidence_interval"] == [results["expected_robustness"]] * 2


def test_epsilon_zero_alone_is_the_accuracy(metric):
    results = metric.compute(predictions=[[1], [0], [1], [1]], references=[1, 1, 1, 1], epsilons=[0])
    for key in ("expected_robustness", "clean_accuracy", "robust_accuracy", "lower_bound", "upper_bound"):
        assert results[key] == 0.75


@pytest.mark.parametrize(
    ("predictions", "references", "epsilons", "message"),
    [
        ([], [], [0, 1], "`references` is empty"),
        (
            [0, 1],
            [0, 1],
            [0],
            r"one list of predicted labels per example.*got 2 entries of lengths \[1\] for 2 references",
        ),
        ([[0, 0]], [0, 1], [0, 1], r"got 1 entries of lengths \[2\] for 2 references"),
        ([[0, 0], [0]], [0, 0], [0, 1], "one label per epsilon"),
        ([[0, 0]], [0], [0, 0.5, 1], "`epsilons` has 3 values, but every example has 2 predictions"),
        ([[0, 0]], [0], 0.5, "`epsilons` has 1 values, but every example has 2"),
        ([[]], [0], [], "epsilons"),
        ([[0, 0]], [0], [0.1, 1], r"`epsilons=\[0.1, 1.0\]` must start with 0 and increase strictly"),
        ([[0, 0, 0]], [0], [0, 1, 1], "must start with 0 and increase strictly"),
        ([[0, 0, 0]], [0], [0, 1, 0.5], "must start with 0 and increase strictly"),
        ([[0, 0]], [0], [0, float("nan")], "must start with 0 and increase strictly"),
        ([[0, 0]], [0], [0, float("inf")], "must start with 0 and increase strictly"),
        ([[0, 0]], [0], ["0", "1/255"], "epsilons"),
    ],
)
def test_bad_input(predictions, references, epsilons, message):
    with pytest.raises(ValueError, match=message):
        module.robustness_summary(predictions, references, epsilons)


def test_errors_reach_the_user_of_evaluate(metric):
    with pytest.raises(ValueError, match="must start with 0 and increase strictly"):
        metric.compute(predictions=[[0, 0]], references=[0], epsilons=[1, 2])
