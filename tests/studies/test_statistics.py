import numpy as np
import pandas
import pytest
from scipy import stats

from hf_rft.studies.statistics import (
    differences,
    mean_interval,
    mean_ranks,
    onset_correlation,
    over_pairs,
    summary,
    with_pairs,
)


def table(rows, **columns):
    """`rows`: (data, schedule, seed, broken_at); the grid is 0 and 1/255, so a row of '2' withstands all."""
    found = pandas.DataFrame(rows, columns=["data", "schedule", "seed", "broken_at"])
    places = [np.array([int(digit) for digit in text]) for text in found["broken_at"]]
    found["clean_accuracy"] = [(place > 0).mean() for place in places]
    found["robust_accuracy"] = [(place > 1).mean() for place in places]
    found["expected_robustness"] = (found["clean_accuracy"] + found["robust_accuracy"]) / 2
    constants = {
        "eval_norm": "linf",
        "eval_epsilons": "0 1/255",
        "tier": "fast",
        "images": "a",
        "seconds": 60.0,
        "onset": 0.5,
    }
    constants |= {"num_examples": 4, "num_classes": 2, "validation_accuracy": "", "trust_checks": ""}
    return found.assign(**{**constants, "run": "r", "attacks": "apgd:100:1", "commit": "c", "torch": "2", **columns})


ROWS = [
    *(("easy", "constant", 0, "0022"), ("easy", "constant", 1, "0222")),  # 50, 75
    *(("easy", "hinge", 0, "0222"), ("easy", "hinge", 1, "2222")),  # 75, 100
    *(("hard", "constant", 0, "0000"), ("hard", "hinge", 0, "0011")),  # 0, 25
]


def test_mean_and_deviation_over_seeds():
    found = summary(with_pairs(table(ROWS), "schedule"), "schedule").set_index(["pair", "schedule"])
    easy = found.loc[("easy", "constant")]
    assert (easy["seeds"], easy["expected_robustness"]) == (2, 0.625)
    assert easy["expected_robustness_std"] == pytest.approx(np.sqrt(2) * 0.125)
    assert np.isnan(found.loc[("hard", "hinge"), "expected_robustness_std"])


def test_differences_are_paired_by_seed_and_example():
    found = differences(with_pairs(table(ROWS), "schedule"), "schedule", "constant").set_index("pair")
    assert list(found["difference"]) == [0.25, 0.25] and list(found["seeds"]) == [2, 1]
    # Both seeds gain the same, so there is no spread; with one seed there is no interval.
    assert (found.loc["easy", "low"], found.loc["easy", "high"]) == (0.25, 0.25)
    assert np.isnan(found.loc["hard", "low"])
    # Eight examples of both seeds, two of which went from 0 to 1, and two added at either extreme.
    padded = np.array([0, 1, 0, 0, 1, 0, 0, 0, -1, -1, 1, 1])
    half = stats.t.ppf(0.975, 11) * stats.sem(padded)
    expected = (padded.mean() - half, padded.mean() + half)
    assert tuple(found.loc["easy", ["low_examples", "high_examples"]]) == pytest.approx(expected)


def test_only_seeds_that_both_have_are_compared():
    rows = [("easy", "constant", 0, "0000"), ("easy", "hinge", 1, "2222"), ("easy", "hinge", 0, "2222")]
    (found,) = differences(with_pairs(table(rows), "schedule"), "schedule", "constant").to_dict("records")
    assert (found["seeds"], found["difference"]) == (1, 1.0)
    assert differences(with_pairs(table(rows[:2]), "schedule"), "schedule", "constant").empty


@pytest.mark.parametrize("column", ["images", "eval_epsilons", "eval_norm", "tier"])
def test_runs_evaluated_differently_are_not_compared(column):
    other = with_pairs(table(ROWS[:4]), "schedule")
    other.loc[2, column] = "0 2/255"
    with pytest.raises(ValueError, match=f"all: the runs of hinge and constant have other {column}"):
        differences(other, "schedule", "constant")


def test_means_over_pairs():
    rows = [(data, "constant", 0, "0000") for data in "abc"]
    rows += [("a", "hinge", 0, "0002"), ("b", "hinge", 0, "0022"), ("c", "hinge", 0, "0222")]
    found = differences(with_pairs(table(rows), "schedule"), "schedule", "constant")
    (means,) = over_pairs(found, "schedule").to_dict("records")
    assert (means["pairs"], means["difference"], means["better"]) == (3, 0.5, 3)
    half = stats.t.ppf(0.975, 2) * 0.25 / np.sqrt(3)
    assert (means["low"], means["high"]) == pytest.approx((0.5 - half, 0.5 + half))
    assert (means["worst"], means["best"]) == (0.25, 0.75)
    assert (means["surely_better"], means["surely_worse"]) == (0, 0), "one seed says nothing for sure"


def test_ranks_count_only_complete_pairs_and_share_ties():
    rows = [("a", "x", 0, "2222"), ("a", "y", 0, "0000"), ("b", "x", 0, "0022"), ("b", "y", 0, "0022")]
    rows += [("c", "y", 0, "2222")]
    ranks = mean_ranks(summary(with_pairs(table(rows), "schedule"), "schedule"), "schedule")
    assert ranks.to_dict() == {"x": 1.25, "y": 1.75}


def test_onset_that_predicts_the_gain_perfectly():
    rows = [(data, "constant", 0, "0000") for data in "abcd"]
    rows += [
        ("a", "hinge", 0, "2222"),
        ("b", "hinge", 0, "2220"),
        ("c", "hinge", 0, "2200"),
        ("d", "hinge", 0, "2000"),
    ]
    onsets = [0.1, 0.2, 0.7, np.nan, *[0.0] * 4]  # the last never learned: 1
    found = with_pairs(table(rows, onset=onsets), "schedule")
    summaries, gains = summary(found, "schedule"), differences(found, "schedule", "constant")
    (row,) = onset_correlation(summaries, gains, "schedule", "constant").to_dict("records")
    assert (row["pairs"], row["correlation"]) == (4, pytest.approx(-1))
    two_pairs = gains[:2]
    assert onset_correlation(summaries, two_pairs, "schedule", "constant").empty


def test_pairs_are_named_by_what_varies():
    several = table(ROWS).assign(backbone="lite0", epsilon=["4/255"] * 4 + ["8/255"] * 2)
    assert list(with_pairs(several, "schedule")["pair"].unique()) == ["easy, 4/255", "hard, 8/255"]
    assert set(with_pairs(table(ROWS[:4]), "schedule")["pair"]) == {"all"}


def test_interval_of_a_mean():
    low, high = mean_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx(stats.ttest_1samp([1.0, 2.0, 3.0], 0).confidence_interval(0.95))
    assert all(np.isnan(mean_interval([1.0])))
