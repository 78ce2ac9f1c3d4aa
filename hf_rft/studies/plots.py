"""The pictures of a study's report, one per question."""

import math
from pathlib import Path

import numpy as np
import pandas

from ..evaluation.plots import add_legend, draw_curves, line_styles, new_figure, save_figure
from ..threat_model import parse_epsilon


def _styles(table: pandas.DataFrame) -> dict[str, dict[str, str]]:
    """Colour and marker of each option, the same in all pictures."""
    return dict(zip(table["option"].unique(), line_styles(), strict=False))


def _name_all(axes, styles: dict[str, dict[str, str]]) -> None:
    """Let the legend name every option, also those that these axes lack."""
    for option, style in styles.items():
        axes.plot([], [], label=option, **style)


def _grid(count: int, size: tuple[float, float]):
    """A figure with `count` equal axes, at most four in a row."""
    columns = min(count, 4)
    rows = math.ceil(count / columns)
    figure = new_figure(figsize=(max(size[0] * columns, 5.5), size[1] * rows + 0.6))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def plot_levels(table: pandas.DataFrame, path: Path) -> None:
    """How robust is each option? Expected robustness by pair: every seed, and the mean."""
    styles, pairs = _styles(table), list(table["pair"].unique())
    figure = new_figure(figsize=(7.5, 1.4 + 0.55 * len(pairs)))
    axes = figure.subplots()
    for (option, style), offset in zip(styles.items(), _offsets(len(styles)), strict=True):
        of_option = table[table["option"] == option]
        heights = [pairs.index(pair) + offset for pair in of_option["pair"]]
        axes.plot(100 * of_option["expected_robustness"], heights, ".", color=style["color"], alpha=0.4, markersize=5)
        means = of_option.groupby("pair", sort=False)["expected_robustness"].mean()
        heights = [pairs.index(pair) + offset for pair in means.index]
        axes.plot(100 * means, heights, linestyle="", markersize=6, label=option, **style)
    axes.set(xlabel="expected robustness (%)", xlim=(0, 100), ylim=(len(pairs) - 0.5, -0.5))
    axes.set_yticks(range(len(pairs)), pairs, parse_math=False)
    axes.grid(axis="x", alpha=0.3)
    add_legend(figure, axes, columns=4)
    save_figure(figure, path, dpi=150)


def _offsets(count: int) -> np.ndarray:
    """Heights of the options of a pair, around that of the pair."""
    return np.linspace(-0.3, 0.3, count) if count > 1 else np.zeros(1)


def plot_differences(
    table: pandas.DataFrame,
    found: pandas.DataFrame,
    means: pandas.DataFrame,
    baseline: str,
    path: Path,
) -> None:
    """How much better than the baseline, and how sure? 95 % intervals over seeds; last, the mean over pairs."""
    styles = {option: style for option, style in _styles(table).items() if option in set(found["option"])}
    pairs = list(found["pair"].unique())
    rows = [*pairs, "mean over pairs"] if len(pairs) > 1 else pairs
    figure = new_figure(figsize=(7.5, 1.4 + 0.55 * len(rows)))
    axes = figure.subplots()
    for (option, style), offset in zip(styles.items(), _offsets(len(styles)), strict=True):
        shown = found[found["option"] == option]
        heights = [pairs.index(pair) + offset for pair in shown["pair"]]
        if len(pairs) > 1:
            shown = pandas.concat([shown, means[means["option"] == option]])
            heights.append(len(pairs) + offset)
        low, high = shown["difference"] - shown["low"], shown["high"] - shown["difference"]
        bars = 100 * np.nan_to_num(np.array([low, high], dtype=float))
        line = {"linestyle": "", "markersize": 5, "elinewidth": 1.2, "label": option, **style}
        axes.errorbar(100 * shown["difference"], heights, xerr=bars, **line)
    axes.axvline(0, color="grey", linewidth=1)
    if len(pairs) > 1:
        axes.axhline(len(pairs) - 0.5, color="grey", linewidth=0.8)
    # Intervals over few seeds may be wider than what is possible.
    left, right = axes.get_xlim()
    axes.set(xlim=(max(left, -100), min(right, 100)), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xlabel(f"expected robustness minus that of {baseline} (points)")
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    axes.grid(axis="x", alpha=0.3)
    add_legend(figure, axes, columns=4)
    save_figure(figure, path, dpi=150)


def plot_curves(table: pandas.DataFrame, curves: pandas.DataFrame, path: Path) -> None:
    """Where on the curve does the difference lie? Accuracy over epsilon, means over seeds, a panel per pair."""
    pairs = list(table["pair"].unique())
    figure, panels = _grid(len(pairs), (3.4, 2.9))
    styles = _styles(table)
    curves = curves.merge(table[["run", "pair", "option", "eval_norm"]], on="run")
    for axes, pair in zip(panels, pairs, strict=True):
        of_pair = curves[curves["pair"] == pair]
        lines = {}
        for option, of_option in of_pair.groupby("option", sort=False):
            means = of_option.groupby("at", sort=False)["accuracy"].mean()
            lines[option] = ([parse_epsilon(epsilon) for epsilon in means.index], list(means))
        draw_curves(axes, lines, of_pair["eval_norm"].iloc[0])
        for line, option in zip(axes.lines, lines, strict=True):
            line.set(label=None, **styles[option])
        axes.set_title(pair, fontsize="medium", parse_math=False)
    _name_all(panels[0], styles)
    add_legend(figure, panels[0], columns=4)
    save_figure(figure, path, dpi=150)


def plot_adaptation(table: pandas.DataFrame, path: Path) -> None:
    """When does each option learn the task? Clean validation accuracy over training, every seed; stars: onset."""
    pairs = list(table["pair"].unique())
    figure, panels = _grid(len(pairs), (3.4, 2.6))
    styles = _styles(table)
    for axes, pair in zip(panels, pairs, strict=True):
        for _, run in table[table["pair"] == pair].iterrows():
            points = [entry.split(":") for entry in run["validation_accuracy"].split()]
            if not points:  # the run was not validated
                continue
            progress, accuracies = 100 * np.array(points, dtype=float).T
            color = styles[run["option"]]["color"]
            axes.plot(progress, accuracies, color=color, alpha=0.7, linewidth=1.2)
            if not np.isnan(run["onset"]):
                at = 100 * run["onset"]
                axes.plot(at, np.interp(at, progress, accuracies), "*", color=color, markersize=9)
        axes.set(xlabel="share of training (%)", ylabel="clean validation (%)", xlim=(0, 100), ylim=(0, 100))
        axes.set_title(pair, fontsize="medium", parse_math=False)
        axes.grid(alpha=0.3)
    _name_all(panels[0], {option: {"color": style["color"]} for option, style in styles.items()})
    add_legend(figure, panels[0], columns=4)
    save_figure(figure, path, dpi=150)


def plot_onset(summaries: pandas.DataFrame, found: pandas.DataFrame, baseline: str, path: Path) -> None:
    """Does the onset under the baseline predict the gain? A point per pair and option."""
    onsets = summaries[summaries["option"] == baseline].set_index("pair")["onset"]
    figure = new_figure(figsize=(6.4, 4.4))
    axes = figure.subplots()
    for option, style in _styles(summaries).items():
        shown = found[found["option"] == option]
        if shown.empty:
            continue
        at, gains = 100 * onsets.loc[shown["pair"]], 100 * shown["difference"]
        axes.plot(at, gains, linestyle="", markersize=6, label=option, **style)
    axes.axhline(0, color="grey", linewidth=1)
    axes.set(xlabel=f"onset under {baseline} (% of training; 100: never)", xlim=(0, 104))
    axes.set_ylabel(f"expected robustness\nminus that of {baseline} (points)")
    axes.grid(alpha=0.3)
    add_legend(figure, axes, columns=4)
    save_figure(figure, path, dpi=150)
