from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from hf_rft.metrics.expected_robustness.expected_robustness import robustness_summary
from hf_rft.metrics.robust_accuracy import robust_accuracy as module


FOLDER = Path(module.__file__).parent


@pytest.fixture
def metric():
    return evaluate.load(str(FOLDER))


# Rows of (predictions, references, clean_predictions).
examples = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12)


def test_keys_without_and_with_clean_predictions(metric):
    case = {"predictions": [0, 0, 1, 1], "references": [0, 1, 1, 1]}
    results = metric.compute(**case)
    assert set(results) == {"robust_accuracy", "confidence_interval"}
    assert results["robust_accuracy"] == 0.75
    results = metric.compute(**case, clean_predictions=[0, 1, 1, 0])
    assert set(results) == {"robust_accuracy", "confidence_interval", "clean_accuracy", "attack_success_rate"}
    assert (results["robust_accuracy"], results["clean_accuracy"]) == (0.5, 0.75)
    assert results["attack_success_rate"] == pytest.approx(1 / 3)


@given(examples)
@settings(deadline=None, max_examples=100)
def test_counts(rows):
    predictions, references, clean_predictions = zip(*rows, strict=True)
    results = module.robust_accuracy_summary(predictions, references, clean_predictions)
    clean = [row for row in rows if row[2] == row[1]]
    fooled = [row for row in clean if row[0] != row[1]]
    assert results["clean_accuracy"] == len(clean) / len(rows)
    assert results["robust_accuracy"] == (len(clean) - len(fooled)) / len(rows)
    assert results["attack_success_rate"] == (len(fooled) / len(clean) if clean else 0)
    alone = module.robust_accuracy_summary(predictions, references)
    assert alone["robust_accuracy"] == sum(row[0] == row[1] for row in rows) / len(rows)


@given(examples)
@settings(deadline=None, max_examples=50)
def test_clean_and_robust_accuracy_are_those_of_expected_robustness(rows):
    predictions, references, clean_predictions = (np.array(column) for column in zip(*rows, strict=True))
    results = module.robust_accuracy_summary(predictions, references, clean_predictions)
    curve = robustness_summary(np.stack([clean_predictions, predictions], axis=1), references, [0, 1])
    assert results["robust_accuracy"] == curve["robust_accuracy"]
    assert results["clean_accuracy"] == curve["clean_accuracy"]


@given(st.integers(1, 300), st.data())
@settings(deadline=None, max_examples=50)
def test_interval_is_the_exact_binomial_one(count, data):
    """Its ends are the shares with which as many right ones or more, or fewer, have a chance of 2.5 %."""
    right = data.draw(st.integers(0, count))
    predictions = np.arange(count) < right
    results = module.robust_accuracy_summary(predictions.astype(int), np.ones(count, int))
    low, high = results["confidence_interval"]
    assert low == 0 if right == 0 else binom.sf(right - 1, count, low) == pytest.approx(0.025)
    assert high == 1 if right == count else binom.cdf(right, count, high) == pytest.approx(0.025)
    assert 0 <= low <= results["robust_accuracy"] <= high <= 1
    of_shares = robustness_summary(predictions.astype(int)[:, None], np.ones(count, int), [0])
    assert results["confidence_interval"] == pytest.approx(of_shares["confidence_interval"], abs=1e-9)


@given(examples, st.booleans(), st.data())
@settings(deadline=None, max_examples=25)
def test_batches_and_single_examples_equal_one_compute(rows, with_clean, data):
    columns = [list(column) for column in zip(*rows, strict=True)]
    names = ("predictions", "references", "clean_predictions")[: 3 if with_clean else 2]
    case = dict(zip(names, columns, strict=False))
    metric = evaluate.load(str(FOLDER), keep_in_memory=True)
    at_once = metric.compute(**case)
    assert at_once == module.robust_accuracy_summary(**case)
    start = 0
    while start < len(rows):
        size = data.draw(st.integers(1, len(rows) - start))
        metric.add_batch(**{name: column[start : start + size] for name, column in case.items()})
        start += size
    assert metric.compute() == at_once
    for i in range(len(rows)):
        metric.add(**{name.removesuffix("s"): column[i] for name, column in case.items()})
    assert metric.compute() == at_once


def test_batches_with_and_without_clean_predictions_are_refused(metric):
    metric.add_batch(predictions=[0, 1], references=[0, 1], clean_predictions=[0, 1])
    metric.add_batch(predictions=[0], references=[0])
    with pytest.raises(ValueError, match="`clean_predictions` was not given for 1 of 3 examples; give it"):
        metric.compute()


def compute(metric, predictions, references, clean_predictions):
    return metric.compute(predictions=predictions, references=references, clean_predictions=clean_predictions)


def add_batch(metric, predictions, references, clean_predictions):
    metric.add_batch(predictions=predictions, references=references, clean_predictions=clean_predictions)


def without_evaluate(metric, predictions, references, clean_predictions):
    return module.robust_accuracy_summary(predictions, references, clean_predictions)


INTEGERS_NOT = "must hold class indices of an integer type, got"


@pytest.mark.parametrize("call", [compute, add_batch, without_evaluate])
@pytest.mark.parametrize(
    ("predictions", "references", "clean_predictions", "message"),
    [
        ([], [], None, "`references` is empty; pass a list of class indices, one per example"),
        ([], [0], None, "`predictions` is empty"),
        ([0], [0], [], "`clean_predictions` is empty"),
        (None, [0], None, "`predictions` is missing; pass a list of class indices"),
        ([0], None, None, "`references` is missing"),
        (None, None, [0], "`references` is missing"),
        (0, [0], None, r"`predictions` must be a list of class indices, .* got an array of shape \(\)"),
        ([[0, 1]], [0], None, r"`predictions` must be a list .* got an array of shape \(1, 2\)"),
        ([0], [[0]], None, r"`references` must be a list .* got an array of shape \(1, 1\)"),
        ([0, 1], [0, 1], [[0, 1]], r"`clean_predictions` must be a list .* got an array of shape \(1, 2\)"),
        ([[0], [0, 1]], [0, 0], None, "`predictions` must be a list .* got rows of different lengths"),
        ([0, 1], [0], None, "`predictions` holds 2 examples, `references` 1; give one label each"),
        ([0, 1], [0, 1], [0], "`clean_predictions` holds 1 examples, `references` 2"),
        ([0.7], [0], None, f"`predictions` {INTEGERS_NOT} float64; pass labels such as `logits.argmax"),
        ([1.0], [1], None, f"`predictions` {INTEGERS_NOT} float64"),
        ([1], torch.ones(1), None, f"`references` {INTEGERS_NOT} float32"),
        ([1], [1], [1.0], f"`clean_predictions` {INTEGERS_NOT} float64"),
        ([True], [1], None, f"`predictions` {INTEGERS_NOT} bool; .* or whether a prediction is right"),
        (["1"], [1], None, f"`predictions` {INTEGERS_NOT} <U1"),
        ([None], [1], None, f"`predictions` {INTEGERS_NOT} object"),
        ([1, 1], [1, 1], [1, None], f"`clean_predictions` {INTEGERS_NOT} object"),
        ([-1], [1], None, "`predictions` holds the label -1; class indices are >= 0"),
        ([1], [-100], None, "`references` holds the label -100; class indices are >= 0"),
        ([1], [1], [-1], "`clean_predictions` holds the label -1"),
    ],
)
def test_bad_examples(metric, call, predictions, references, clean_predictions, message):
    with pytest.raises(ValueError, match=message):
        call(metric, predictions, references, clean_predictions)
    assert len(metric) == 0


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"reference": 0}, "`prediction` is missing; pass one class index"),
        ({"prediction": 0}, "`reference` is missing; pass one class index"),
        ({"prediction": [0], "reference": 0}, r"`prediction` must be one class index; got an array of shape \(1,\)"),
        ({"prediction": 0.7, "reference": 0}, f"`prediction` {INTEGERS_NOT} float64"),
        ({"prediction": 0, "reference": True}, f"`reference` {INTEGERS_NOT} bool"),
        ({"prediction": 0, "reference": -1}, "`reference` holds the label -1"),
        ({"prediction": 0, "reference": 0, "clean_prediction": 1.0}, f"`clean_prediction` {INTEGERS_NOT} float64"),
    ],
)
def test_bad_example(metric, example, message):
    with pytest.raises(ValueError, match=message):
        metric.add(**example)
    assert len(metric) == 0


@pytest.mark.parametrize("keep_in_memory", [False, True])
def test_nothing_to_compute(keep_in_memory):
    metric = evaluate.load(str(FOLDER), keep_in_memory=keep_in_memory)
    with pytest.raises(ValueError, match="`predictions` and `references` are missing; pass them here or"):
        metric.compute()


@pytest.mark.parametrize(
    ("columns", "num_classes", "message"),
    [
        (([3], [0], [0]), 3, "`predictions` holds the label 3, which is not below `num_classes=3`"),
        (([0], [3], [0]), 3, "`references` holds the label 3"),
        (([0], [0], [3]), 3, "`clean_predictions` holds the label 3"),
        (([0], [0], [0]), 0, "`num_classes=0` must be an integer >= 1"),
        (([0], [0], [0]), "3", "`num_classes='3'` must be an integer >= 1"),
    ],
)
def test_labels_outside_of_the_classes(metric, columns, num_classes, message):
    case = dict(zip(("predictions", "references", "clean_predictions"), columns, strict=True))
    for call in (metric.compute, module.robust_accuracy_summary):
        with pytest.raises(ValueError, match=message):
            call(**case, num_classes=num_classes)


def test_bad_num_classes_does_not_cost_the_examples_added_before(metric):
    metric.add_batch(predictions=[2], references=[2])
    with pytest.raises(ValueError, match="num_classes"):
        metric.compute(num_classes=0)
    assert metric.compute(num_classes=3)["robust_accuracy"] == 1


@pytest.mark.parametrize("convert", [list, tuple, np.array, np.uint8, torch.tensor], ids=lambda kind: kind.__name__)
def test_kinds_of_arrays(metric, convert):
    columns = [convert(labels) for labels in ([0, 1, 2], [0, 1, 1], [0, 0, 1])]
    for call in (compute, without_evaluate):
        assert call(metric, *columns)["attack_success_rate"] == 0.5
    add_batch(metric, *(column[:2] for column in columns))
    metric.add(prediction=columns[0][2], reference=columns[1][2], clean_prediction=columns[2][2])
    assert metric.compute() == compute(metric, *columns)
