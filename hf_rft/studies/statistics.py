"""Comparing the options of one factor of a study: what holds, on which pair, and how sure it is.

A *pair* is one choice of all other factors, such as a backbone and its data. Runs are compared within a pair and a
seed, on the same test images. Differences are of expected robustness, in shares of 1.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas
from scipy import stats

from ..evaluation.differences import contributions, difference_interval
from ..threat_model import parse_epsilon
from .results import broken_at, factors_of


MEASURES = ("clean_accuracy", "robust_accuracy", "expected_robustness")
# What runs must have in common to be compared.
CONDITIONS = ("images", "eval_norm", "eval_epsilons", "attacks")


def prepared(table: pandas.DataFrame, factor: str) -> pandas.DataFrame:
    """The table with the columns `option`, that of `factor`, and `pair`, those of the other factors that ever vary."""
    others = [other for other in factors_of(table) if other != factor and table[other].nunique() > 1]
    names = table[others].agg(", ".join, axis=1) if others else "all"
    return table.assign(option=table[factor], pair=names)


def summary(runs: pandas.DataFrame) -> pandas.DataFrame:
    """Mean and standard deviation over seeds: one row for each pair and option.

    The onset of a run that never passed the threshold counts as 1, the end of training; that of a run that was not
    validated is missing.
    """
    was_validated = runs["validation_accuracy"] != ""
    groups = runs.assign(onset=runs["onset"].mask(was_validated & runs["onset"].isna(), 1.0))
    groups = groups.groupby(["pair", "option"], sort=False)
    columns = {"seeds": groups["seed"].nunique(), "seconds": groups["seconds"].mean(), "onset": groups["onset"].mean()}
    for measure in MEASURES:
        columns |= {measure: groups[measure].mean(), f"{measure}_std": groups[measure].std(ddof=1)}
    return pandas.DataFrame(columns).reset_index()


def differences(runs: pandas.DataFrame, baseline: str) -> pandas.DataFrame:
    """Each option minus the baseline, within pairs: one row for each pair and option.

    `low`, `high`: 95 % interval over seeds (Student's t), missing with one seed. `low_examples`, `high_examples`: over
    test images, for the models of these seeds. `not_compared` says why a row has no numbers; it is empty otherwise.
    """
    rows = []
    for (pair, option), own in runs.groupby(["pair", "option"], sort=False):  # pyright: ignore[reportGeneralTypeIssues]
        if option == baseline:
            continue
        others = runs[(runs["pair"] == pair) & (runs["option"] == baseline)]
        matched = own.merge(others, on="seed", suffixes=("", "_baseline"))
        row = {"pair": pair, "option": option, "seeds": len(matched), "not_compared": _why_not(matched)}
        if not row["not_compared"]:
            of_seeds = (matched["expected_robustness"] - matched["expected_robustness_baseline"]).to_numpy()
            of_images = _image_differences(matched)
            row["difference"] = of_seeds.mean()
            row["low"], row["high"] = mean_interval(of_seeds)
            row["low_examples"], row["high_examples"] = difference_interval(of_images)
        rows.append(row)
    columns = ["pair", "option", "seeds", "not_compared", "difference", "low", "high", "low_examples", "high_examples"]
    return pandas.DataFrame(rows, columns=columns)


def _why_not(matched: pandas.DataFrame) -> str:
    if matched.empty:
        return "no common seed"
    other = [column for column in CONDITIONS if (matched[column] != matched[f"{column}_baseline"]).any()]
    return f"other {other[0]}" if other else ""


def _image_differences(matched: pandas.DataFrame) -> np.ndarray:
    """One value per test image. An image that several seeds share is not several images: its mean counts."""
    parts = []
    for _, same_images in matched.groupby("images"):
        of_runs = [
            _contributions(run, "broken_at") - _contributions(run, "broken_at_baseline")
            for _, run in same_images.iterrows()
        ]
        parts.append(np.mean(of_runs, axis=0))
    return np.concatenate(parts)


def _contributions(run: pandas.Series, column: str) -> np.ndarray:
    epsilons = [parse_epsilon(epsilon) for epsilon in run["eval_epsilons"].split()]
    return contributions(epsilons, broken_at(run[column]))


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean by Student's t; nan with fewer than two values."""
    if len(values) < 2:
        return np.nan, np.nan
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def over_pairs(compared: pandas.DataFrame) -> pandas.DataFrame:
    """The mean of the differences over pairs, with its 95 % interval over pairs.

    `better`: pairs in which the option is better. `above`, `below`: pairs whose interval over seeds lies above, or
    below, 0, without a correction for the number of comparisons.
    """
    rows = []
    for option, of_pairs in compared.groupby("option", sort=False):
        values = of_pairs["difference"].to_numpy(dtype=float)
        low, high = mean_interval(values)
        row = {"option": option, "pairs": len(values), "difference": values.mean(), "low": low, "high": high}
        row |= {"better": int((values > 0).sum()), "above": int((of_pairs["low"] > 0).sum())}
        rows.append({**row, "below": int((of_pairs["high"] < 0).sum()), "worst": values.min(), "best": values.max()})
    columns = ["option", "pairs", "difference", "low", "high", "better", "above", "below", "worst", "best"]
    return pandas.DataFrame(rows, columns=columns)


def mean_ranks(runs: pandas.DataFrame) -> dict[str, float]:
    """Mean rank of each option by expected robustness, 1 the best, over pairs in which all options share a seed."""
    ranks = []
    for _, of_pair in runs.groupby("pair", sort=False):
        wide = of_pair.pivot(index="seed", columns="option", values="expected_robustness")
        means = wide.reindex(columns=runs["option"].unique()).dropna().mean()
        if not means.isna().any():
            ranks.append(means.rank(ascending=False))
    return {str(option): rank for option, rank in pandas.DataFrame(ranks).mean().items()} if ranks else {}


def onset_correlation(summaries: pandas.DataFrame, compared: pandas.DataFrame, baseline: str) -> pandas.DataFrame:
    """Over pairs: does the onset under the baseline predict how much an option gains?

    Spearman's correlation of the onset, its mean over seeds, with the difference, and its two-sided p by permutation.
    """
    onsets = summaries[summaries["option"] == baseline].set_index("pair")["onset"]
    rows = []
    for option, of_pairs in compared.groupby("option", sort=False):
        onset, gain = onsets.loc[of_pairs["pair"]].to_numpy(), of_pairs["difference"].to_numpy(dtype=float)
        ranked = pandas.DataFrame({"onset": onset, "gain": gain}).dropna().rank()
        if len(ranked) < 3 or (ranked.nunique() == 1).any():
            continue
        result = stats.permutation_test(
            (ranked["onset"].to_numpy(),),
            partial(_correlation, ranked["gain"].to_numpy()),
            permutation_type="pairings",
            rng=0,
        )
        rows.append({"option": option, "pairs": len(ranked), "correlation": result.statistic, "p": result.pvalue})
    return pandas.DataFrame(rows, columns=["option", "pairs", "correlation", "p"])


def _correlation(values: np.ndarray, others: np.ndarray) -> float:
    return float(np.corrcoef(values, others)[0, 1])
