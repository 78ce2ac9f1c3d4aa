"""The report of a study: report.md with its figures, from results.csv and nothing else."""

from functools import partial
from pathlib import Path

import numpy as np
import pandas

from ..utils.files import replacing, write_text
from ..utils.markdown import cell, markdown_table
from .plots import plot_adaptation, plot_curves, plot_differences, plot_levels, plot_onset
from .results import curves, factors_of, read_results
from .statistics import MEASURES, differences, mean_ranks, onset_correlation, over_pairs, prepared, summary


def write_report(folder: Path, compare: str | None = None, baseline: str | None = None) -> str:
    """Write report.md and its figures beside results.csv; return the text.

    Args:
        folder (`Path`):
            Holds results.csv.
        compare (`str`, *optional*):
            The factor whose options are compared; the last one by default.
        baseline (`str`, *optional*):
            The option that the others are compared with; the first one by default.

    Raises:
        OSError: if there is no results.csv.
        ValueError: if it has no runs, no such factor, or no such option.
    """
    table = read_results(folder / "results.csv")
    if table.empty:
        raise ValueError(f"{folder / 'results.csv'} has no runs yet.")
    factors = factors_of(table)
    factor = factors[-1] if compare is None else compare
    if factor not in factors:
        raise ValueError(f"--compare {factor} is not a factor of the study; there are {', '.join(factors)}.")
    options = list(table[factor].unique())
    baseline = options[0] if baseline is None else baseline
    if baseline not in options:
        raise ValueError(f"--baseline {baseline} is not an option of {factor}; there are {', '.join(options)}.")

    runs = prepared(table, factor)
    summaries = summary(runs)
    found = differences(runs, baseline)
    compared = found[found["not_compared"] == ""]
    means = over_pairs(compared)
    correlations = onset_correlation(summaries, compared, baseline)
    figures = {
        "levels": partial(plot_levels, runs),
        "curves": partial(plot_curves, runs, curves(table, factors)),
        "adaptation": partial(plot_adaptation, runs),
    }
    if not compared.empty:
        figures["differences"] = partial(plot_differences, runs, compared, means, baseline)
    if not correlations.empty:
        figures["onset"] = partial(plot_onset, summaries, compared, baseline)
    for name, plot in figures.items():
        with replacing(folder / f"{name}.png") as scratch:
            plot(scratch)

    parts = [f"# {factor}: {', '.join(options)}", _conditions(table), _levels(summaries, factor)]
    parts += ["![Expected robustness](levels.png)"]
    if not found.empty:
        parts += [_differences(found, factor, baseline)]
    if not compared.empty:
        parts += ["![Differences](differences.png)"]
    if compared["pair"].nunique() > 1:
        parts += [_over_pairs(means, mean_ranks(runs), factor, baseline)]
    parts += ["## Where on the curve\n\n![Accuracy over epsilon](curves.png)"]
    parts += ["## When the task is learned", _ADAPTATION, "![Validation accuracy over training](adaptation.png)"]
    if not correlations.empty:
        parts += [_correlations(correlations, factor, baseline), "![Onset and gain](onset.png)"]
    text = "\n\n".join(parts) + "\n"
    write_text(folder / "report.md", text)
    return text


def points(share: float, sign: str = "") -> str:
    """In percent; empty if it is not known."""
    return "" if np.isnan(share) else f"{100 * share:{sign}.1f}"


def interval(low: float, high: float) -> str:
    return "" if np.isnan(low) else f"[{points(low, '+')}, {points(high, '+')}]"


def _conditions(table: pandas.DataFrame) -> str:
    """What all numbers have in common, and what they were made with."""

    def shown(column: str) -> str:
        return ", ".join(map(str, table[column].unique()))

    hours = table["seconds"].sum() / 3600
    checks = table[table["trust_checks"] != ""]
    text = (
        f"{len(table)} runs, seeds {shown('seed')}. Evaluation: {shown('eval_norm')}, tier {shown('tier')}, "
        f"{shown('num_examples')} examples a run. {hours:.1f} hours of training; commit {shown('commit')}, torch "
        f"{shown('torch')}."
    )
    if len(checks):
        counts = checks["trust_checks"].str.split().explode().value_counts()
        failed = ", ".join(f"{name} ({count})" for name, count in counts.items())
        text += f" Trust checks failed in {len(checks)} runs: {failed}."
    return text


def _levels(summaries: pandas.DataFrame, factor: str) -> str:
    header = [
        "pair",
        factor,
        "seeds",
        "clean",
        "at the largest epsilon",
        "expected robustness",
        "onset",
        "minutes of training",
    ]
    rows = []
    for _, row in summaries.iterrows():
        numbers = [_with_deviation(row[name], row[f"{name}_std"]) for name in MEASURES]
        rows.append(
            [row["pair"], row["option"], row["seeds"], *numbers, points(row["onset"]), f"{row['seconds'] / 60:.1f}"]
        )
    notes = "Accuracy in %, mean ± standard deviation over seeds; onset in % of training (100: never)."
    return f"## How robust\n\n{notes}\n\n{markdown_table(header, rows)}"


def _with_deviation(mean: float, deviation: float) -> str:
    return points(mean) + ("" if np.isnan(deviation) else f" ± {points(deviation)}")


def _differences(found: pandas.DataFrame, factor: str, baseline: str) -> str:
    header = ["pair", factor, "seeds", "difference", "95 % over seeds", "95 % over examples"]
    rows = []
    for _, row in found.iterrows():
        over_seeds = interval(row["low"], row["high"])
        over_examples = interval(row["low_examples"], row["high_examples"])
        difference = row["not_compared"] or points(row["difference"], "+")
        rows.append([row["pair"], row["option"], row["seeds"], difference, over_seeds, over_examples])
    return "\n\n".join(
        [
            f"## Compared with {cell(baseline)}",
            "Difference in expected robustness, in points, on the same test images and with the same seeds. The "
            "interval over seeds is Student's t. That over examples holds for the models of these seeds; test sets "
            "drawn by several seeds overlap, which makes it a little too narrow.",
            markdown_table(header, rows),
        ]
    )


def _over_pairs(means: pandas.DataFrame, ranks: dict[str, float], factor: str, baseline: str) -> str:
    header = [factor, "pairs", "mean difference", "95 % over pairs", "better in", "interval above 0"]
    header += ["interval below 0", "worst", "best", "mean rank"]
    rows = [
        [row["option"], row["pairs"], points(row["difference"], "+"), interval(row["low"], row["high"])]
        + [row["better"], row["above"], row["below"], points(row["worst"], "+"), points(row["best"], "+")]
        + [_rank(ranks, row["option"])]
        for _, row in means.iterrows()
    ]
    rows.append([baseline, *[""] * 8, _rank(ranks, baseline)])
    return "\n\n".join(
        [
            "## Over all pairs",
            "Pairs count as independent, though some share a backbone or data. Intervals above and below 0: over "
            "seeds, without a correction for the number of comparisons. Ranks by expected robustness, 1 the best, "
            "over the pairs in which all options have a seed in common.",
            markdown_table(header, rows),
        ]
    )


def _rank(ranks: dict[str, float], option: str) -> str:
    return f"{ranks[option]:.1f}" if option in ranks else ""


_ADAPTATION = "Stars mark the onset: the first validation that is clearly better than always naming the largest class."


def _correlations(correlations: pandas.DataFrame, factor: str, baseline: str) -> str:
    rows = [
        [row["option"], row["pairs"], f"{row['correlation']:+.2f}", f"{row['p']:.2g}"]
        for _, row in correlations.iterrows()
    ]
    title = f"## Does the onset under {cell(baseline)} predict the gain over it?"
    note = (
        "Spearman's correlation over pairs of the onset (mean over seeds) and the difference above; two-sided p by "
        "permutation. Both rest on the same baseline runs, whose noise alone correlates them a little."
    )
    return f"{title}\n\n{note}\n\n{markdown_table([factor, 'pairs', 'correlation', 'p'], rows)}"
