"""Figures: accuracy over epsilon, and training histories."""

import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from .threat_model import format_epsilon, parse_epsilon


Curve = tuple[Sequence[Fraction], Sequence[float]]  # epsilons, accuracies in [0, 1]


def _figure(**options):
    # Imported when used: matplotlib is slow to import, and this module is not needed for training. The figure is made
    # without pyplot, whose global state would choose a window system.
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **options)


def draw_curves(axes, curves: Mapping[str, Curve], norm: str) -> None:
    """Accuracy in percent over epsilon, one line a name."""
    for name, (epsilons, accuracies) in curves.items():
        axes.plot([float(e) for e in epsilons], [100 * a for a in accuracies], marker="o", markersize=4, label=name)
    _set_epsilon_ticks(axes.xaxis, curves)
    axes.set(xlabel=f"epsilon ({norm}, pixels in [0, 1])", ylabel="accuracy (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize="small")


def _set_epsilon_ticks(axis, curves: Mapping[str, Curve]) -> None:
    """Ticks at the epsilons of the curves, written as the field does."""
    grid = sorted({epsilon for epsilons, _ in curves.values() for epsilon in epsilons})
    axis.set_ticks([float(epsilon) for epsilon in grid], [format_epsilon(epsilon) for epsilon in grid])


def plot_robustness_curve(curves: Mapping[str, Curve], norm: str, path: str | Path, title: str = "") -> None:
    """Write the accuracy-versus-epsilon curves to `path`; its ending says the format."""
    figure = _figure(figsize=(6, 4))
    axes = figure.subplots()
    draw_curves(axes, curves, norm)
    axes.set_title(title)
    figure.savefig(path, dpi=150)


def plot_comparison(runs: Mapping[str, Sequence[Mapping]], path: str | Path, norm: str) -> None:
    """Robustness curves, and training histories with the onset of task adaptation, of several recipes.

    Args:
        runs (`Mapping[str, Sequence[Mapping]]`):
            For each recipe one mapping a seed, with `accuracies` (epsilon as written -> accuracy), `validation` and
            `epsilon` (lists of (epoch, value)) and `onset` (epoch or None). Curves are means over seeds; histories
            show every seed.
    """
    figure = _figure(figsize=(15, 4.5))
    curve_axes, validation_axes, epsilon_axes = figure.subplots(1, 3)
    curves = {}
    for color, (name, of_seeds) in zip(itertools.cycle(_colors()), runs.items(), strict=False):
        written = list(of_seeds[0]["accuracies"])
        means = [sum(one["accuracies"][epsilon] for one in of_seeds) / len(of_seeds) for epsilon in written]
        curves[name] = ([parse_epsilon(epsilon) for epsilon in written], means)
        for number, one in enumerate(of_seeds):
            if not one["validation"]:  # the run was not evaluated while it trained
                continue
            epochs, accuracies = zip(*one["validation"], strict=True)
            label = name if number == 0 else None
            validation_axes.plot(epochs, [100 * a for a in accuracies], color=color, alpha=0.7, label=label)
            if one["onset"] is not None:
                at = 100 * accuracies[one["onset"] - 1]
                validation_axes.plot(epochs[one["onset"] - 1], at, "*", color=color, markersize=11)
        if of_seeds[0]["epsilon"]:
            epochs, epsilons = zip(*of_seeds[0]["epsilon"], strict=True)
            epsilon_axes.plot(epochs, epsilons, color=color, label=name)
    draw_curves(curve_axes, curves, norm)
    curve_axes.set_title("robustness (mean over seeds)")
    validation_axes.set(xlabel="epoch", ylabel="clean validation accuracy (%)", ylim=(0, 100))
    validation_axes.set_title("adaptation (star: onset)")
    _set_epsilon_ticks(epsilon_axes.yaxis, curves)
    epsilon_axes.set(xlabel="epoch", ylabel="training epsilon", title="schedule")
    for axes in (validation_axes, epsilon_axes):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _colors() -> list[str]:
    from matplotlib import rcParams

    return rcParams["axes.prop_cycle"].by_key()["color"]
