from fractions import Fraction
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from hf_rft.metrics.expected_robustness import expected_robustness as module


FOLDER = Path(module.__file__).parent


@pytest.fixture
def metric():
    return evaluate.load(str(FOLDER))


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
    assert module.mean_breaking_share(distances, largest) == pytest.approx(exact)
    summary = module.robustness_summary(right.astype(int), np.ones(len(distances), int), epsilons)
    assert summary["lower_bound"] - 1e-9 <= exact <= summary["upper_bound"] + 1e-9
    assert summary["expected_robustness"] == pytest.approx(exact, abs=0.5 / intervals + 1e-9)


# What share of [0, E] an example withstands, and how often: coins, rare failures, and everything in between.
SHARES = {
    "coin": ([0, 1], [0.5, 0.5]),
    "mostly robust": ([0, 1], [0.02, 0.98]),
    "hardly ever fooled": ([0, 1], [0.005, 0.995]),
    "hardly ever robust": ([0, 1], [0.97, 0.03]),
    "even": (np.linspace(0, 1, 6), np.full(6, 1 / 6)),
    "0, 1 and between": (np.linspace(0, 1, 6), [0.3, 0.05, 0.05, 0.05, 0.05, 0.5]),
    "skewed": (np.linspace(0, 1, 6), [0.01, 0.01, 0.01, 0.02, 0.05, 0.9]),
    "rarely a little less": ([0.875, 1], [0.03, 0.97]),
}


@pytest.mark.parametrize("count", [8, 20, 100, 500])
@pytest.mark.parametrize("values, chances", SHARES.values(), ids=SHARES)
def test_at_least_94_percent_of_the_intervals_hold_the_true_mean(count, values, chances):
    samples = np.random.default_rng(0).multinomial(count, chances, size=4000)
    mean = np.dot(values, chances)
    found, times = np.unique((samples @ values / count).round(12), return_counts=True)
    intervals = np.array([module.confidence_interval(one, count) for one in found])
    held = (intervals[:, 0] <= mean) & (mean <= intervals[:, 1])
    assert times @ held / 4000 >= 0.94


def test_interval_of_the_summary_is_that_of_the_mean_share():
    rng = np.random.default_rng(0)
    summary = module.robustness_summary(rng.integers(2, size=(40, 3)), np.zeros(40, int), [0, 0.5, 1])
    low, high = summary["confidence_interval"]
    assert (low, high) == module.confidence_interval(summary["expected_robustness"], 40)
    assert low < summary["expected_robustness"] < high


@pytest.mark.parametrize("count", [1, 8, 500])
def test_interval_of_examples_that_are_all_robust_or_all_fooled_in_closed_form(count):
    """A model that withstands a share below `bound` is right on all of them in less than 2.5 % of the draws."""
    bound = 0.025 ** (1 / count)
    for prediction, interval in ((1, (bound, 1)), (0, (0, 1 - bound))):
        summary = module.robustness_summary([[prediction] * 2] * count, [1] * count, [0, 1])
        assert summary["confidence_interval"] == pytest.approx(interval)


@given(st.integers(0, 30), st.integers(1, 30))
@settings(deadline=None, max_examples=30)
def test_interval_of_whole_successes_is_the_exact_binomial_one(successes, count):
    successes = min(successes, count)
    exact = binomtest(successes, count).proportion_ci(method="exact")
    assert module.confidence_interval(successes / count, count) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_epsilon_zero_alone_is_the_accuracy(metric):
    results = metric.compute(predictions=[[1], [0], [1], [1]], references=[1, 1, 1, 1], epsilons=[0])
    for key in ("expected_robustness", "clean_accuracy", "robust_accuracy", "lower_bound", "upper_bound"):
        assert results[key] == 0.75


@given(predictions_and_grid())
@settings(deadline=None, max_examples=50)
def test_uniform_epsilon_is_the_trapezoidal_rule(case):
    predictions, references, epsilons = case
    right = module.still_correct(predictions, references)
    expected = module.expected_robustness(epsilons, right)
    assert expected.shape == references.shape
    if len(epsilons) > 1:
        assert expected == pytest.approx(np.trapezoid(right.astype(float), epsilons) / epsilons[-1], rel=1e-12)
        assert expected == pytest.approx(module.expected_robustness(epsilons, right, weight=lambda epsilon: 3.0))
    assert (module.expected_robustness(epsilons, np.ones_like(right)) == 1).all()


@given(
    predictions_and_grid(),
    st.tuples(*[st.sampled_from([0, 1e-9, 0.3, 2, 1e9])] * 3).filter(any),
    st.sampled_from([1e-12, 1, 1e12]),
)
@settings(deadline=None, max_examples=50)
def test_weight_is_integrated_over_each_interval(case, coefficients, unit):
    """Weight a + b epsilon + c epsilon^2, in any unit: masses and the mean of the curve in closed form."""
    predictions, references, epsilons = case
    density = np.polynomial.Polynomial(coefficients)
    summary = module.robustness_summary(
        predictions, references, epsilons, weight=lambda epsilon: unit * density(epsilon)
    )
    accuracies = np.array(summary["accuracies"])
    if len(epsilons) == 1:
        assert summary["lower_bound"] == summary["upper_bound"] == summary["expected_robustness"] == accuracies[0]
        return
    masses = np.diff(density.integ()(epsilons))
    masses /= masses.sum()
    assert summary["lower_bound"] == pytest.approx(masses @ accuracies[1:])
    assert summary["upper_bound"] == pytest.approx(masses @ accuracies[:-1])
    exact = 0.0
    for k in range(len(masses)):
        slope = (accuracies[k + 1] - accuracies[k]) / (epsilons[k + 1] - epsilons[k])
        line = np.polynomial.Polynomial([accuracies[k] - slope * epsilons[k], slope])
        antiderivative = (density * line).integ()
        exact += antiderivative(epsilons[k + 1]) - antiderivative(epsilons[k])
    assert summary["expected_robustness"] == pytest.approx(exact / density.integ()(epsilons[-1]))


@pytest.mark.parametrize(
    ("epsilons", "accuracies", "weight", "mean"),
    [
        ([0, 1], [1, 0], lambda epsilon: epsilon, 1 / 3),
        ([0, 1], [1, 0], lambda epsilon: 1 - epsilon, 2 / 3),
        ([0, 1], [1, 0], lambda epsilon: 5.0, 1 / 2),
        ([0, 1], [1, 0], lambda epsilon: float(epsilon < 0.25), 7 / 8),
        ([0, 1], [1, 0], lambda epsilon: epsilon**-0.5, 2 / 3),
        # Integral of epsilon times curve: 1/2 on [0, 1], 2/3 on [1, 2]; of epsilon: 2.
        ([0, 1, 2], [1, 1, 0], lambda epsilon: epsilon, (1 / 2 + 2 / 3) / 2),
        ([0, 1, 3], [0.7, 0.7, 0.7], lambda epsilon: epsilon, 0.7),
        ([0], [0.7], lambda epsilon: epsilon, 0.7),
    ],
    ids=["rising", "falling", "even", "jump", "pole", "plateau", "flat", "one point"],
)
def test_with_a_weight_it_is_the_weighted_mean_of_the_curve_that_is_linear_between_the_points(
    epsilons, accuracies, weight, mean
):
    assert module.expected_robustness(epsilons, accuracies, weight) == pytest.approx(mean, rel=1e-5)
    lower, upper = module.bracket(epsilons, accuracies, weight)
    assert lower - 1e-9 <= mean <= upper + 1e-9


def test_always_right_is_exactly_1_with_any_weight():
    assert module.expected_robustness([0, 0.1, 0.7, 1.3], np.ones((2, 4)), lambda epsilon: epsilon**0.3).tolist() == [
        1,
        1,
    ]


@given(st.lists(st.floats(0, 2), min_size=1, max_size=20), st.integers(1, 50))
@settings(deadline=None, max_examples=30)
def test_weighted_mean_of_distances(distances, intervals):
    """With weight epsilon, an example at distance d is right on the share (min(d, E) / E)^2 of the weight."""
    distances, largest = np.array(distances), 1.5
    epsilons = np.linspace(0, largest, intervals + 1)
    accuracies = (distances[:, None] > epsilons).mean(axis=0)
    exact = ((np.minimum(distances, largest) / largest) ** 2).mean()
    lower, upper = module.bracket(epsilons, accuracies, weight=lambda epsilon: epsilon)
    assert lower - 1e-9 <= exact <= upper + 1e-9


@pytest.mark.parametrize(
    ("weight", "masses"),
    [
        (lambda epsilon: float(epsilon < 0.25), [0.25, 0, 0]),
        (lambda epsilon: np.where(0.25 < epsilon, 1, 0), [0.25, 0.5, 1]),
        (lambda epsilon: epsilon**-0.5, [2 * 0.5**0.5, 2 - 2 * 0.5**0.5, 2 * 2**0.5 - 2]),
        (lambda epsilon: Fraction(1, 3), [1 / 6, 1 / 6, 1 / 3]),
    ],
    ids=["jump to 0", "jump of an array", "pole", "fraction"],
)
@pytest.mark.parametrize("unit", [1, 1e-12])
def test_weight_with_a_jump_or_a_pole(weight, masses, unit):
    scaled = module.interval_masses([0, 0.5, 1, 2], lambda epsilon: unit * weight(epsilon))
    assert scaled / unit == pytest.approx(masses, rel=1e-5)


def test_weight_that_is_a_histogram():
    heights = np.random.default_rng(0).uniform(size=60)
    masses = module.interval_masses([0, 0.5, 1], lambda epsilon: heights[int(60 * epsilon)])
    assert masses == pytest.approx([heights[:30].mean() / 2, heights[30:].mean() / 2], rel=1e-5)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (2.0, "`weight=2.0` must be a function of epsilon"),
        (
            lambda epsilon: 0.4 - epsilon,
            r"`weight` returned -0.\d+ at epsilon 0.\d+; it must be a finite number >= 0",
        ),
        (lambda epsilon: float("nan"), "`weight` returned nan at epsilon"),
        (lambda epsilon: float("inf"), "`weight` returned inf at epsilon"),
        (lambda epsilon: None, "`weight` returned None at epsilon"),
        (lambda epsilon: np.ones(2), r"`weight` returned array\(\[1., 1.\]\) at epsilon"),
        (lambda epsilon: 0, r"`weight` integrates to 0 over \[0, 1\]"),
        (lambda epsilon: 1 / epsilon, r"`weight` cannot be integrated over \[0, 0.5\]"),
    ],
    ids=["number", "negative", "nan", "inf", "none", "array", "zero", "divergent"],
)
def test_bad_weight(metric, weight, message):
    for call in (module.expected_robustness, module.bracket):
        with pytest.raises(ValueError, match=message):
            call([0, 0.5, 1], [1, 1, 0], weight)
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=[[1, 1, 0]], references=[1], epsilons=[0, 0.5, 1], weight=weight)


def test_error_inside_of_the_weight_is_shown_as_it_is():
    with pytest.raises(KeyError, match="missing"):
        module.interval_masses([0, 1], lambda epsilon: {}["missing"])


def test_mean_breaking_share():
    assert module.mean_breaking_share([0, 0.5, 2, float("inf")], 2) == (0 + 0.25 + 1 + 1) / 4
    assert module.mean_breaking_share(torch.tensor([0, 0.5], dtype=torch.bfloat16), Fraction(1, 2)) == 0.5


@pytest.mark.parametrize(
    ("distances", "largest", "message"),
    [
        ([], 1, r"`distances=\[\]` must be a list of at least one number in \[0, inf\]"),
        (0.5, 1, "`distances=0.5` must be a list"),
        ([[0.5]], 1, "must be a list of at least one number"),
        ([-0.5], 1, r"`distances=\[-0.5\]`"),
        ([float("nan")], 1, r"`distances=\[nan\]`"),
        (["8/255"], 1, r"`distances=\['8/255'\]` must be numbers, for example 8 / 255\."),
        ([0.5], 0, "`largest=0` must be one finite number > 0"),
        ([0.5], float("inf"), "`largest=inf` must be one finite number > 0"),
        ([0.5], float("nan"), "`largest=nan` must be one finite number > 0"),
        ([0.5], [1], r"`largest=\[1\]` must be one finite number > 0"),
        ([0.5], "8/255", "`largest=8/255` must be numbers"),
    ],
)
def test_bad_distances(distances, largest, message):
    with pytest.raises(ValueError, match=message):
        module.mean_breaking_share(distances, largest)


@pytest.mark.parametrize(
    "accuracies", [[1.0], [1.0, 0.5, 0.2], 1.0, [1.0, float("nan")], [1.0, float("inf")], [[1.0, 0.5, 0.2]]]
)
def test_accuracies_must_fit_the_grid(accuracies):
    for call in (module.expected_robustness, module.bracket):
        with pytest.raises(ValueError, match="`accuracies` must hold one finite number per epsilon, 2 along its last"):
            call([0, 1], accuracies)


@pytest.mark.parametrize(
    ("epsilons", "message"),
    [
        (None, "`epsilons=None` must be a list of numbers"),
        (0.5, "`epsilons=0.5` must be a list of numbers"),
        ([[0, 1]], r"`epsilons=\[\[0, 1\]\]` must be a list of numbers"),
        ([], r"`epsilons=\[\]` must start with 0 and increase strictly"),
        ([0.1, 1], r"`epsilons=\[0.1, 1.0\]` must start with 0 and increase strictly"),
        ([1, 0], "must start with 0 and increase strictly"),
        ([0, 1, 1], "must start with 0 and increase strictly"),
        ([0, 1, 0.5], "must start with 0 and increase strictly"),
        ([0, float("nan")], r"`epsilons=\[0.0, nan\]` must start with 0 and increase strictly, all of them finite"),
        ([0, float("inf")], r"`epsilons=\[0.0, inf\]` must start with 0 and increase strictly, all of them finite"),
        ("8/255", "`epsilons=8/255` must be a list of numbers"),
        (["0", "8/25x"], "`epsilons` must be numbers or fractions such as 8 / 255 or '8/255'; got '8/25x'"),
        ([0, ""], "`epsilons` must be numbers or fractions .* got ''"),
        ([0, "1/"], "`epsilons` must be numbers or fractions .* got '1/'"),
        ([0, "1/2/3"], "`epsilons` must be numbers or fractions .* got '1/2/3'"),
        ([0, "1/0"], "`epsilons` must be numbers or fractions .* got '1/0'"),
        ([0, "nan"], "`epsilons` must be numbers or fractions .* got 'nan'"),
        ([0, "1e400"], "`epsilons` must be numbers or fractions .* got '1e400'"),
        (["0", "-8/255"], r"`epsilons=\[0.0, -0.03\d+\]` must start with 0 and increase strictly"),
        ([[0], [0, 1]], "`epsilons=.* must be numbers"),
    ],
)
def test_bad_epsilons(metric, epsilons, message):
    for call in (module.expected_robustness, module.bracket):
        with pytest.raises(ValueError, match=message):
            call(epsilons, [1, 1])
    with pytest.raises(ValueError, match=message):
        module.robustness_summary([[0, 0]], [0], epsilons)
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=[[0, 0]], references=[0], epsilons=epsilons)


def compute(metric, predictions, references):
    return metric.compute(predictions=predictions, references=references, epsilons=[0, 1])


def add_batch(metric, predictions, references):
    metric.add_batch(predictions=predictions, references=references)


def without_evaluate(metric, predictions, references):
    return module.robustness_summary(predictions, references, [0, 1])


INTEGERS_NOT = "must hold class indices of an integer type, got"


@pytest.mark.parametrize("call", [compute, add_batch, without_evaluate])
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "`references` is empty"),
        ([], [0], "`predictions` is empty; pass one list of class indices per example, one per epsilon"),
        ([[0, 0]], [], "`references` is empty; pass a list of class indices"),
        ([[]], [0], "`predictions` is empty"),
        (np.zeros((0, 2), int), np.zeros(0, int), "`references` is empty"),
        (None, [0], "`predictions` is missing; pass one list of class indices per example"),
        ([[0, 0]], None, "`references` is missing; pass a list of class indices"),
        ([0, 1], [0, 1], r"`predictions` must be one list of class indices per example.*got an array of shape \(2,\)"),
        ([[[0, 1]]], [0], r"`predictions` must be one list .* got an array of shape \(1, 1, 2\)"),
        ([[0, 0]], [[0]], r"`references` must be a list of class indices; got an array of shape \(1, 1\)"),
        ([[0, 0]], 0, r"`references` must be a list of class indices; got an array of shape \(\)"),
        ([[0, 0]], [0, 1], "`predictions` holds 1 examples, `references` 2"),
        ([[0, 0], [0]], [0, 0], "`predictions` must be one list .* one per epsilon; got rows of different lengths"),
        ([[0.7, 0.2]], [0], f"`predictions` {INTEGERS_NOT} float64; pass labels such as `logits.argmax"),
        ([[0, 1.0]], [0], f"`predictions` {INTEGERS_NOT} float64"),
        ([[0, 1]], [0.7], f"`references` {INTEGERS_NOT} float64"),
        (torch.zeros(1, 2), torch.zeros(1, dtype=int), f"`predictions` {INTEGERS_NOT} float32"),
        (torch.zeros(1, 2, dtype=torch.bfloat16), [0], f"`predictions` {INTEGERS_NOT} float32"),
        ([[True, False]], [1], f"`predictions` {INTEGERS_NOT} bool; .* or whether a prediction is right"),
        ([[0, 1]], [True], f"`references` {INTEGERS_NOT} bool"),
        ([["1", "0"]], [0], f"`predictions` {INTEGERS_NOT} <U1"),
        ([[0, None]], [0], f"`predictions` {INTEGERS_NOT} object"),
        ([[0, 0]], [None], f"`references` {INTEGERS_NOT} object"),
        ([[0, -1]], [0], "`predictions` holds the label -1; class indices are >= 0"),
        ([[0, 1]], [-100], "`references` holds the label -100; class indices are >= 0"),
    ],
)
def test_bad_examples(metric, call, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        call(metric, predictions, references)
    assert len(metric) == 0


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        (None, 0, "`prediction` is missing"),
        ([0, 1], None, "`reference` is missing; pass one class index"),
        ([], 0, "`prediction` is empty; pass a list of class indices"),
        (0, 0, r"`prediction` must be a list of class indices; got an array of shape \(\)"),
        ([0, 1], [0], r"`reference` must be one class index; got an array of shape \(1,\)"),
        ([0.7, 1], 0, f"`prediction` {INTEGERS_NOT} float64"),
        ([0, 1], 1.0, f"`reference` {INTEGERS_NOT} float64"),
        ([True, False], 1, f"`prediction` {INTEGERS_NOT} bool"),
        ([0, -1], 0, "`prediction` holds the label -1"),
        ([0, 1], -1, "`reference` holds the label -1"),
    ],
)
def test_bad_example(metric, prediction, reference, message):
    with pytest.raises(ValueError, match=message):
        metric.add(prediction=prediction, reference=reference)
    assert len(metric) == 0


@pytest.mark.parametrize("keep_in_memory", [False, True])
def test_nothing_to_compute(keep_in_memory):
    metric = evaluate.load(str(FOLDER), keep_in_memory=keep_in_memory)
    with pytest.raises(ValueError, match="`predictions` and `references` are missing; pass them here or"):
        metric.compute(epsilons=[0, 1])


@pytest.mark.parametrize("call", [compute, without_evaluate])
def test_every_example_has_one_prediction_per_epsilon(metric, call):
    with pytest.raises(ValueError, match="`epsilons` has 2 values, but every example has 3 predictions"):
        call(metric, [[0, 0, 0]], [0])


def test_batches_of_different_lengths_are_refused(metric):
    metric.add_batch(predictions=[[0, 0]], references=[0])
    metric.add_batch(predictions=[[0, 0, 0]], references=[0])
    with pytest.raises(ValueError, match="`predictions` must be one list .* got rows of different lengths"):
        metric.compute(epsilons=[0, 1])


@pytest.mark.parametrize(
    ("predictions", "references", "num_classes", "message"),
    [
        ([[0, 3]], [0], 3, "`predictions` holds the label 3, which is not below `num_classes=3`"),
        ([[0, 1]], [9], 3, "`references` holds the label 9, which is not below `num_classes=3`"),
        ([[0, 1]], [0], 0, "`num_classes=0` must be an integer >= 1"),
        ([[0, 1]], [0], 2.0, "`num_classes=2.0` must be an integer >= 1"),
    ],
)
def test_labels_outside_of_the_classes(metric, predictions, references, num_classes, message):
    case = {"predictions": predictions, "references": references, "epsilons": [0, 1], "num_classes": num_classes}
    with pytest.raises(ValueError, match=message):
        metric.compute(**case)
    with pytest.raises(ValueError, match=message):
        module.robustness_summary(**case)


def test_num_classes_leaves_the_values_as_they_are(metric):
    case = {"predictions": [[0, 2], [1, 1]], "references": [0, 1], "epsilons": [0, 1]}
    assert metric.compute(**case, num_classes=3) == metric.compute(**case)


def test_bad_options_do_not_cost_the_examples_added_before(metric):
    metric.add_batch(predictions=[[1, 0]], references=[1])
    for name, options in {"epsilons": {}, "weight": {"epsilons": [0, 1]}, "num_classes": {"epsilons": [0, 1]}}.items():
        with pytest.raises(ValueError, match=f"`{name}=0`"):
            metric.compute(**options, **{name: 0})
    assert metric.compute(epsilons=[0, 1])["accuracies"] == [1.0, 0.0]


@given(predictions_and_grid(), st.data())
@settings(deadline=None, max_examples=25)
def test_batches_and_single_examples_equal_one_compute(case, data):
    predictions, references, epsilons = case
    metric = evaluate.load(str(FOLDER), keep_in_memory=True)
    at_once = metric.compute(predictions=predictions, references=references, epsilons=epsilons)
    assert at_once == module.robustness_summary(predictions, references, epsilons)
    start = 0
    while start < len(references):
        size = data.draw(st.integers(1, len(references) - start))
        metric.add_batch(predictions=predictions[start : start + size], references=references[start : start + size])
        start += size
    assert metric.compute(epsilons=epsilons) == at_once
    for prediction, reference in zip(predictions, references, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute(epsilons=epsilons) == at_once


@pytest.mark.parametrize(
    "convert",
    [list, tuple, np.array, np.uint8, torch.tensor, lambda values: [torch.tensor(value) for value in values]],
    ids=["list", "tuple", "numpy", "uint8", "torch", "list of torch"],
)
def test_kinds_of_arrays(metric, convert):
    predictions, references = [[0, 0], [1, 2], [2, 2]], [0, 1, 0]
    for call in (compute, without_evaluate):
        results = call(metric, convert(predictions), convert(references))
        assert results["accuracies"] == [2 / 3, 1 / 3]
    metric.add(prediction=convert(predictions[0]), reference=convert(references)[0])
    assert compute(metric, convert(predictions[1:]), convert(references[1:]))["accuracies"] == [2 / 3, 1 / 3]


@pytest.mark.parametrize("written", [["0", "4/255", "0.5"], [0, "4 / 255", ".5"], np.array(["0", "4/255", "5e-1"])])
def test_epsilons_as_text(metric, written):
    case = {"predictions": [[1, 1, 1], [1, 1, 0], [1, 0, 0]], "references": [1, 1, 1]}
    assert metric.compute(**case, epsilons=written) == metric.compute(**case, epsilons=[0, 4 / 255, 0.5])


@pytest.mark.parametrize("epsilons", [(0, 1), np.array([0, 1]), torch.tensor([0.0, 1.0]), [Fraction(0), Fraction(1)]])
def test_kinds_of_epsilons(metric, epsilons):
    case = {"predictions": [[1, 1], [1, 0]], "references": [1, 1]}
    assert metric.compute(**case, epsilons=epsilons) == metric.compute(**case, epsilons=[0, 1])
