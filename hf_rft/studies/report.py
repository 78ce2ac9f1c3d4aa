"""The report of a study: report.md with its figures, from results.csv and nothing else."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas

from ..utils.files import replacing, write_text
from ..utils.markdown import cell
from .plots import plot_adaptation, plot_curves, plot_differences, plot_levels, plot_onset
from .results import curves, factors_of, read_results
from .statistics import (
    MEASURES,
    differences,
    mean_ranks,
    onset_correlation,
    over_pairs,
    summary,
    with_pairs,
)


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

    table = with_pairs(table, factor)
    summaries = summary(table, factor)
    found = differences(table, factor, baseline)
    means = over_pairs(found, factor)
    correlations = onset_correlation(summaries, found, factor, baseline)
    figures = {
        "levels": partial(plot_levels, table, factor),
        "curves": partial(plot_curves, table, curves(table, factors), factor),
        "adaptation": partial(plot_adaptation, table, factor),
    }
    if not found.empty:
        figures["differences"] = partial(plot_differences, table, found, means, factor, baseline)
    if not correlations.empty:
        figures["onset"] = partial(plot_onset, summaries, found, factor, baseline)
    for name, plot in figures.items():
        with replacing(folder / f"{name}.png") as scratch:
            plot(scratch)

    parts = [f"# {factor}: {', '.join(options)}", _conditions(table), _levels(summaries, factor)]
    parts += ["![Expected robustness](levels.png)"]
    if not found.empty:
        parts += [_differences(found, means, summaries, factor, baseline), "![Differences](differences.png)"]
    parts += ["## Where on the curve\n\n![Accuracy over epsilon](curves.png)"]
    parts += ["## When the task is learned", _ADAPTATION, "![Validation accuracy over training](adaptation.png)"]
    if not correlations.empty:
        parts += [_correlations(correlations, factor, baseline), "![Onset and gain](onset.png)"]
    text = "\n\n".join(parts) + "\n"
    write_text(folder / "report.md", text)
    return text


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


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
            [row["pair"], row[factor], row["seeds"], *numbers, points(row["onset"]), f"{row['seconds'] / 60:.1f}"]
        )
    notes = "Accuracy in %, mean ± standard deviation over seeds; onset in % of training (100: never)."
    return f"## How robust\n\n{notes}\n\n{markdown_table(header, rows)}"


def _with_deviation(mean: float, deviation: float) -> str:
    return points(mean) + ("" if np.isnan(deviation) else f" ± {points(deviation)}")


def _differences(
    found: pandas.DataFrame, means: pandas.DataFrame, summaries: pandas.DataFrame, factor: str, baseline: str
) -> str:
    header = ["pair", factor, "seeds", "difference", "95 % over seeds", "95 % over examples"]
    rows = []
    for _, row in found.iterrows():
        over_seeds, over_examples = (
            interval(row["low"], row["high"]),
            interval(row["low_examples"], row["high_examples"]),
        )
        rows.append(
            [row["pair"], row[factor], row["seeds"], points(row["difference"], "+"), over_seeds, over_examples]
        )
    parts = [
        f"## Compared with {cell(baseline)}",
        "Difference in expected robustness, in points, on the same test images and with the same seeds. The interval "
        "over seeds is Student's t; that over examples holds for these seeds.",
        markdown_table(header, rows),
    ]
    if found["pair"].nunique() > 1:
        ranks = mean_ranks(summaries, factor)
        header = [factor, "pairs", "mean difference", "95 % over pairs", "better in", "surely better", "surely worse"]
        header += ["worst", "best", "mean rank"]
        rows = [
            [row[factor], row["pairs"], points(row["difference"], "+"), interval(row["low"], row["high"])]
            + [row["better"], row["surely_better"], row["surely_worse"]]
            + [points(row["worst"], "+"), points(row["best"], "+"), _rank(ranks, row[factor])]
            for _, row in means.iterrows()
        ]
        rows.append([baseline, *[""] * 8, _rank(ranks, baseline)])
        parts += [
            "### Over all pairs",
            "Surely: the interval over seeds lies on one side of 0. Ranks by expected robustness, over the pairs that "
            "have all options; 1 is best.",
            markdown_table(header, rows),
        ]
    return "\n\n".join(parts)


def _rank(ranks: pandas.Series, option: str) -> str:
    return f"{ranks[option]:.1f}" if option in ranks else ""


_ADAPTATION = (
    "Stars mark the onset: the first validation above twice the accuracy of always naming the largest class, or "
    "half-way from there to 100 % with few classes."
)


def _correlations(correlations: pandas.DataFrame, factor: str, baseline: str) -> str:
    rows = [
        [row[factor], row["pairs"], f"{row['correlation']:+.2f}", f"{row['p']:.2g}"]
        for _, row in correlations.iterrows()
    ]
    title = f"## Does the onset under {cell(baseline)} predict the gain over it?"
    note = "Spearman's correlation over pairs of the onset (mean over seeds) and the difference above."
    return f"{title}\n\n{note}\n\n{markdown_table([factor, 'pairs', 'correlation', 'p'], rows)}"
