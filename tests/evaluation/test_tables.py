import numpy as np
import pytest
from hypothesis import given, settings
from scipy.stats import binomtest

from evaluation.test_report import GRID, SETTINGS, make_report, reports
from hf_rft.evaluation.report import ExternalEvaluation


def test_a_row_per_example():
    report = make_report((0, 1, 2, 4, 4))
    table = report.to_pandas()
    assert table.index.name == "example" and table.index.tolist() == list(range(5))
    assert table["label"].tolist() == report.labels.tolist()
    assert table["correct_clean"].tolist() == [False, True, True, True, True]
    assert table["broken_at"].tolist() == [0, 2 / 255, 85 / 255, np.inf, np.inf]
    assert table["distance"].tolist() == report.distances.tolist()
    predictions = [f"prediction_at_{epsilon}" for epsilon in ("0", "2/255", "85/255", "0.5")]
    assert table.columns.tolist() == ["label", "correct_clean", "broken_at", "distance", *predictions]
    np.testing.assert_array_equal(table[predictions], report.predictions)


def test_a_row_per_epsilon():
    report = make_report((0, 1, 2, 4, 4))
    table = report.to_pandas("epsilon")
    assert table.columns.tolist() == ["epsilon", "written", "accuracy", "low", "high", "num_robust"]
    assert table["epsilon"].tolist() == [float(epsilon) for epsilon in GRID]
    assert table["written"].tolist() == ["0", "2/255", "85/255", "0.5"]
    assert table["num_robust"].tolist() == [4, 3, 2, 2]
    assert list(zip(table["low"], table["high"], strict=True)) == report.accuracy_intervals


def test_a_row_per_class():
    labels = np.array([7, 7, 7, 7, 3, 3, 5])
    model = {**SETTINGS["model"], "class_names": {"3": "cat", "7": "dog"}}
    report = make_report((0, 1, 4, 4, 2, 4, 0), labels=labels, settings={**SETTINGS, "model": model})
    table = report.to_pandas("class")
    assert table.index.tolist() == [3, 5, 7] and table["name"].tolist() == ["cat", "5", "dog"]
    assert table["count"].tolist() == [2, 1, 4]
    assert table["clean_accuracy"].tolist() == [1, 0, 0.75]
    assert table["robust_accuracy"].tolist() == [0.5, 0, 0.5]
    # Of three classes: each interval holds with 1 - 0.05 / 3.
    assert table["low"].iloc[1] == 0 and table["high"].iloc[1] == pytest.approx(1 - 0.05 / 6)
    level = 1 - 0.05 / 3
    for (_, row), successes in zip(table.iterrows(), (1, 0, 2), strict=True):
        exact = binomtest(successes, row["count"]).proportion_ci(level, method="exact")
        assert (row["low"], row["high"]) == pytest.approx((exact.low, exact.high))
    assert (table["count"] * table["robust_accuracy"]).sum() / 7 == pytest.approx(report.robust_accuracy)


def test_the_worst_class_has_enough_examples_and_of_equals_is_known_best():
    labels = np.repeat([0, 1, 2, 3], [4, 5, 6, 5])
    report = make_report(np.where(labels == 3, 4, 1), labels=labels)
    assert report.worst_class["class"] == 2 and report.worst_class["name"] == "2"
    assert "\n  worst class: 2, 0.0 % of 6 at 0.5 [0.0, " in report.table()


def test_one_class_is_not_the_worst():
    report = make_report([1] * 8)
    assert report.worst_class is None and "worst class" not in report.table()


def test_names_from_elsewhere_write_no_lines_of_the_table():
    model = {**SETTINGS["model"], "class_names": {"0": "\x1b[31mred\n  expected robustness  99.9 %"}}
    labels = np.repeat([0, 1], 6)
    report = make_report(1 + 3 * labels, labels=labels, settings={**SETTINGS, "model": model})
    report.external = [ExternalEvaluation(0, 0.0, "a\nb\x1b", "c\rd")]
    assert all(character.isprintable() for line in report.table().split("\n") for character in line)
    assert len(report.table().splitlines()) == 1 + 4 + 2 + 2


@given(reports())
@settings(deadline=None, max_examples=20)
def test_the_two_tables_agree(report):
    examples, epsilons = report.to_pandas(), report.to_pandas("epsilon")
    for row in epsilons.itertuples():
        withstand = examples["broken_at"] > row.epsilon
        assert withstand.sum() == row.num_robust and withstand.mean() == pytest.approx(row.accuracy)


def test_other_rows_are_unknown():
    with pytest.raises(ValueError, match="`per='batch'` is unknown; choose 'example', 'class' or 'epsilon'"):
        make_report().to_pandas("batch")
