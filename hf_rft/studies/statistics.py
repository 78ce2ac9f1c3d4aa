"""Comparing the options of one factor of a study: what holds, on which pair, and how sure it is.

A *pair* is one choice of all other factors, such as a backbone and its data. Runs are compared within a pair and a
seed, on the same test images. Differences are of expected robustness, in shares of 1.
"""

from collections.abc import Sequence

import numpy as np
import pandas
from scipy import stats

from ..evaluation.differences import contributions, difference_interval
from ..threat_model import parse_epsilon
from .results import broken_at, factors_of


MEASURES = ("clean_accuracy", "robust_accuracy", "expected_robustness")


def with_pairs(table: pandas.DataFrame, factor: str) -> pandas.DataFrame:
    """The table with a column `pair`: the options of the other factors, without those that never vary."""
    others = [other for other in factors_of(table) if other != factor and table[other].nunique() > 1]
    names = table[others].agg(", ".join, axis=1) if others else "all"
    return table.assign(pair=names)


def summary(table: pandas.DataFrame, factor: str) -> pandas.DataFrame:
    """Mean and standard deviation over seeds: one row for each pair and option."""
    groups = table.groupby(["pair", factor], sort=False)
    columns = {"seeds": groups["seed"].nunique(), "seconds": groups["seconds"].mean()}
    for measure in MEASURES:
        columns |= {measure: groups[measure].mean(), f"{measure}_std": groups[measure].std(ddof=1)}
    columns["onset"] = table.fillna({"onset": 1.0}).groupby(["pair", factor], sort=False)["onset"].mean()
    return pandas.DataFrame(columns).reset_index()


def differences(table: pandas.DataFrame, factor: str, baseline: str) -> pandas.DataFrame:
    """Each option minus the baseline, within pairs: one row for each pair and option.

    `low`, `high`: 95 % interval over seeds (Student's t), missing with one seed. `low_examples`, `high_examples`: over
    the examples of all seeds, for these seeds.

    Raises:
        ValueError: if two runs to be compared were evaluated on other images, epsilons or attacks.
    """
    rows = []
    for (pair, option), runs in table.groupby(["pair", factor], sort=False):
        if option == baseline:
            continue
        others = table[(table["pair"] == pair) & (table[factor] == baseline)]
        matched = runs.merge(others, on="seed", suffixes=("", "_baseline"))
        if matched.empty:
            continue
        _check_comparable(matched, pair, option, baseline)
        of_seeds = (matched["expected_robustness"] - matched["expected_robustness_baseline"]).to_numpy()
        of_examples = np.concatenate([_example_differences(run) for _, run in matched.iterrows()])
        low, high = mean_interval(of_seeds)
        low_examples, high_examples = difference_interval(of_examples)
        rows.append(
            {
                **{"pair": pair, factor: option, "seeds": len(of_seeds), "difference": of_seeds.mean()},
                **{"low": low, "high": high, "low_examples": low_examples, "high_examples": high_examples},
            }
        )
    columns = ["pair", factor, "seeds", "difference", "low", "high", "low_examples", "high_examples"]
    return pandas.DataFrame(rows, columns=columns)


def _check_comparable(matched: pandas.DataFrame, pair: str, option: str, baseline: str) -> None:
    for column in ("images", "eval_epsilons", "eval_norm", "tier"):
        if (matched[column] != matched[f"{column}_baseline"]).any():
            raise ValueError(
                f"{pair}: the runs of {option} and {baseline} have other {column}, so they cannot be compared; make "
                "them with the same flags of evaluation."
            )


def _example_differences(run: pandas.Series) -> np.ndarray:
    epsilons = [parse_epsilon(epsilon) for epsilon in run["eval_epsilons"].split()]
    ours, theirs = (contributions(epsilons, broken_at(run[name])) for name in ("broken_at", "broken_at_baseline"))
    return ours - theirs


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean by Student's t; nan with fewer than two values."""
    if len(values) < 2:
        return np.nan, np.nan
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def over_pairs(found: pandas.DataFrame, factor: str) -> pandas.DataFrame:
    """The mean of the differences over pairs, with its interval over pairs, and in how many the option is better.

    `surely_better`, `surely_worse`: pairs whose interval over seeds lies above, or below, 0.
    """
    rows = []
    for option, of_pairs in found.groupby(factor, sort=False):
        low, high = mean_interval(of_pairs["difference"].to_numpy())
        row = {factor: option, "pairs": len(of_pairs), "difference": of_pairs["difference"].mean()}
        row |= {"low": low, "high": high, "better": int((of_pairs["difference"] > 0).sum())}
        row |= {"surely_better": int((of_pairs["low"] > 0).sum()), "surely_worse": int((of_pairs["high"] < 0).sum())}
        rows.append({**row, "worst": of_pairs["difference"].min(), "best": of_pairs["difference"].max()})
    columns = ["pairs", "difference", "low", "high", "better", "surely_better", "surely_worse", "worst", "best"]
    return pandas.DataFrame(rows, columns=[factor, *columns])


def mean_ranks(summaries: pandas.DataFrame, factor: str) -> pandas.Series:
    """Mean rank of each option over the pairs that have all options; 1 is the best expected robustness."""
    wide = summaries.pivot(index="pair", columns=factor, values="expected_robustness").dropna()
    return wide.rank(axis=1, ascending=False).mean().sort_values()


def onset_correlation(
    summaries: pandas.DataFrame, found: pandas.DataFrame, factor: str, baseline: str
) -> pandas.DataFrame:
    """Over pairs: does the onset under the baseline predict how much an option gains? Spearman's correlation.

    The onset is the mean over seeds; a run that never passed counts as 1, the end of training.
    """
    onsets = summaries[summaries[factor] == baseline].set_index("pair")["onset"]
    rows = []
    for option, of_pairs in found.groupby(factor, sort=False):
        onset, gain = onsets.loc[of_pairs["pair"]].to_numpy(), of_pairs["difference"].to_numpy()
        if len(gain) >= 3 and np.ptp(onset) > 0 and np.ptp(gain) > 0:
            correlation, p = stats.spearmanr(onset, gain)
            rows.append({factor: option, "pairs": len(gain), "correlation": correlation, "p": p})
    return pandas.DataFrame(rows, columns=[factor, "pairs", "correlation", "p"])
