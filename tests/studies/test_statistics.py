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
    prepared,
    summary,
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
    found = summary(prepared(table(ROWS), "schedule")).set_index(["pair", "option"])
    easy = found.loc[("easy", "constant")]
    assert (easy["seeds"], easy["expected_robustness"]) == (2, 0.625)
    assert easy["expected_robustness_std"] == pytest.approx(np.sqrt(2) * 0.125)
    assert np.isnan(found.loc[("hard", "hinge"), "expected_robustness_std"])


def test_differences_are_paired_by_seed_and_example():
    found = differences(prepared(table(ROWS), "schedule"), "constant").set_index("pair")
    assert list(found["difference"]) == [0.25, 0.25] and list(found["seeds"]) == [2, 1]
    # Both seeds gain the same, so there is no spread; with one seed there is no interval.
    assert (found.loc["easy", "low"], found.loc["easy", "high"]) == (0.25, 0.25)
    assert np.isnan(found.loc["hard", "low"])
    # The same four images for both seeds: their means, and two added at either extreme.
    padded = np.array([0.5, 0.5, 0, 0, -1, -1, 1, 1])
    half = stats.t.ppf(0.975, 7) * stats.sem(padded)
    expected = (padded.mean() - half, padded.mean() + half)
    assert tuple(found.loc["easy", ["low_examples", "high_examples"]]) == pytest.approx(expected)


def test_only_seeds_that_both_have_are_compared():
    rows = [("easy", "constant", 0, "0000"), ("easy", "hinge", 1, "2222"), ("easy", "hinge", 0, "2222")]
    (found,) = differences(prepared(table(rows), "schedule"), "constant").to_dict("records")
    assert (found["seeds"], found["difference"]) == (1, 1.0)
    (none,) = differences(prepared(table(rows[:2]), "schedule"), "constant").to_dict("records")
    assert none["not_compared"] == "no common seed" and np.isnan(none["difference"])


@pytest.mark.parametrize("column", ["images", "eval_epsilons", "eval_norm", "attacks"])
def test_runs_evaluated_differently_are_not_compared(column):
    other = prepared(table(ROWS), "schedule")
    other.loc[2, column] = "0 2/255"
    found = differences(other, "constant").set_index("pair")
    assert list(found["not_compared"]) == [f"other {column}", ""], "the other pair is"
    assert np.isnan(found.loc["easy", "difference"]) and found.loc["hard", "difference"] == 0.25


def test_an_image_that_seeds_share_is_one_image():
    """Three seeds that agree on every image tell no more about images than one."""
    rows = [
        (data, name, seed, places)
        for data, seeds in (("one", [0]), ("three", [0, 1, 2]))
        for seed in seeds
        for name, places in (("constant", "0000"), ("hinge", "0022"))
    ]
    one, three = differences(prepared(table(rows), "schedule"), "constant").to_dict("records")
    assert three["low_examples"] == pytest.approx(one["low_examples"])
    own_images = prepared(table(rows), "schedule")
    own_images["images"] = own_images["seed"].astype(str)
    _, apart = differences(own_images, "constant").to_dict("records")
    assert apart["low_examples"] > three["low_examples"]


def test_means_over_pairs():
    rows = [(data, "constant", 0, "0000") for data in "abc"]
    rows += [("a", "hinge", 0, "0002"), ("b", "hinge", 0, "0022"), ("c", "hinge", 0, "0222")]
    found = differences(prepared(table(rows), "schedule"), "constant")
    (means,) = over_pairs(found).to_dict("records")
    assert (means["pairs"], means["difference"], means["better"]) == (3, 0.5, 3)
    half = stats.t.ppf(0.975, 2) * 0.25 / np.sqrt(3)
    assert (means["low"], means["high"]) == pytest.approx((0.5 - half, 0.5 + half))
    assert (means["worst"], means["best"]) == (0.25, 0.75)
    assert (means["above"], means["below"]) == (0, 0), "one seed has no interval"


def test_ranks_count_only_complete_pairs_and_share_ties():
    rows = [("a", "x", 0, "2222"), ("a", "y", 0, "0000"), ("b", "x", 0, "0022"), ("b", "y", 0, "0022")]
    rows += [("c", "y", 0, "2222"), ("b", "x", 1, "2222")]  # a pair, and a seed, that lack an option
    assert mean_ranks(prepared(table(rows), "schedule")) == {"x": 1.25, "y": 1.75}
    assert mean_ranks(prepared(table(rows[4:]), "schedule")) == {}


def test_onset_that_predicts_the_gain_perfectly():
    rows = [(data, "constant", 0, "0000") for data in "abcd"]
    rows += [
        ("a", "hinge", 0, "2222"),
        ("b", "hinge", 0, "2220"),
        ("c", "hinge", 0, "2200"),
        ("d", "hinge", 0, "2000"),
    ]
    onsets = [0.1, 0.2, 0.7, np.nan, *[0.0] * 4]  # the last never learned: 1
    found = prepared(table(rows, onset=onsets, validation_accuracy="1:0.5"), "schedule")
    summaries, gains = summary(found), differences(found, "constant")
    (row,) = onset_correlation(summaries, gains, "constant").to_dict("records")
    assert (row["pairs"], row["correlation"]) == (4, pytest.approx(-1))
    assert row["p"] == pytest.approx(2 / 24), "two of the 24 orders are so extreme"
    assert onset_correlation(summaries, gains[:2], "constant").empty


def test_onset_of_runs_that_were_not_validated_is_not_known():
    rows = [("a", "x", 0, "02"), ("b", "x", 0, "02")]
    runs = table(rows, onset=[np.nan, np.nan], validation_accuracy=["", "1:0.1"])
    onsets = summary(prepared(runs, "schedule"))["onset"]
    assert np.isnan(onsets[0]) and onsets[1] == 1


def test_pairs_are_named_by_what_varies():
    several = table(ROWS).assign(backbone="lite0", epsilon=["4/255"] * 4 + ["8/255"] * 2)
    assert list(prepared(several, "schedule")["pair"].unique()) == ["easy, 4/255", "hard, 8/255"]
    assert set(prepared(table(ROWS[:4]), "schedule")["pair"]) == {"all"}


def test_interval_of_a_mean():
    low, high = mean_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx(stats.ttest_1samp([1.0, 2.0, 3.0], 0).confidence_interval(0.95))
    assert all(np.isnan(mean_interval([1.0])))
