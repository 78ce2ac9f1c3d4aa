import numpy as np
import pytest
from hypothesis import given, settings

from evaluation.test_report import GRID, make_report, reports


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


@given(reports())
@settings(deadline=None, max_examples=20)
def test_the_two_tables_agree(report):
    examples, epsilons = report.to_pandas(), report.to_pandas("epsilon")
    for row in epsilons.itertuples():
        withstand = examples["broken_at"] > row.epsilon
        assert withstand.sum() == row.num_robust and withstand.mean() == pytest.approx(row.accuracy)


def test_other_rows_are_unknown():
    with pytest.raises(ValueError, match="`per='batch'` is unknown; choose 'example' or 'epsilon'"):
        make_report().to_pandas("batch")
