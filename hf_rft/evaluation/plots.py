"""Figures: accuracy over epsilon, and training histories."""

import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from ..threat_model import ThreatModel, format_approximately, format_epsilon, parse_epsilon


if TYPE_CHECKING:
    from .report import AdversarialExamples

Curve = tuple[Sequence[Fraction], Sequence[float]]  # epsilons, accuracies in [0, 1]


def _figure(**options):
    # Imported late: matplotlib is slow to import and not needed for training. Avoid pyplot, whose global state would
    # select a window system.
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **options)


def _save(figure, path: str | Path, dpi: int) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)


def draw_curves(axes, curves: Mapping[str, Curve], norm: str) -> None:
    """Draw accuracy in percent over epsilon, one line per name."""
    for name, (epsilons, accuracies) in curves.items():
        axes.plot([float(e) for e in epsilons], [100 * a for a in accuracies], marker="o", markersize=4, label=name)
    _set_epsilon_ticks(axes.xaxis, curves)
    axes.set(xlabel=f"epsilon ({norm}, pixels in [0, 1])", ylabel="accuracy (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize="small")


def _set_epsilon_ticks(axis, curves: Mapping[str, Curve]) -> None:
    """Put ticks at the epsilons of the curves, in the usual notation."""
    grid = sorted({epsilon for epsilons, _ in curves.values() for epsilon in epsilons})
    axis.set_ticks([float(epsilon) for epsilon in grid], [format_epsilon(epsilon) for epsilon in grid])


def plot_robustness_curve(
    curves: Mapping[str, Curve],
    norm: str,
    path: str | Path,
    title: str = "",
    intervals: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> None:
    """Plot accuracy over epsilon to `path`; its suffix sets the format.

    `intervals` holds the confidence intervals at each epsilon, for any of the curves; they are shaded.
    """
    figure = _figure(figsize=(6, 4))
    axes = figure.subplots()
    draw_curves(axes, curves, norm)
    for line, (name, (epsilons, _)) in zip(list(axes.lines), curves.items(), strict=True):
        if intervals and name in intervals:
            low, high = ([100 * bound for bound in side] for side in zip(*intervals[name], strict=True))
            at = [float(epsilon) for epsilon in epsilons]
            axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_title(title, parse_math=False)
    _save(figure, path, dpi=150)


def plot_epsilon_schedule(
    steps: Sequence[int],
    epsilons: Sequence[float],
    threat_model: ThreatModel,
    path: str | Path,
    *,
    done: tuple[int, float] | None = None,
    kept: tuple[int, float] | None = None,
) -> None:
    """Plot the training epsilon over optimizer steps to `path`, with the target epsilon as a dashed line.

    Args:
        steps, epsilons (`Sequence`):
            The whole planned schedule: numbers of completed steps, and the epsilon after each.
        done (`tuple`, *optional*):
            Number of steps trained, if fewer than planned, and the epsilon reached; the rest of the schedule is drawn
            dotted.
        kept (`tuple`, *optional*):
            The step whose weights were kept, if not the last one, and the largest epsilon they were trained with.
    """
    figure = _figure(figsize=(6, 2.5))
    axes = figure.subplots()
    last, reached = done or (steps[-1], epsilons[-1])
    count = sum(step <= last for step in steps)
    (trained,) = axes.plot(steps[:count], epsilons[:count], label="trained")
    color = trained.get_color()
    target = format_epsilon(threat_model.epsilon)
    if last < steps[-1]:
        axes.plot(steps[count - 1 :], epsilons[count - 1 :], ":", color=color, label="planned, not trained")
        epsilon = format_approximately(reached, threat_model.epsilon)
        axes.axvline(last, color=color, linewidth=1, label=f"stopped: step {last}, epsilon {epsilon}")
    if kept is not None and kept[0] != last:
        epsilon = format_approximately(kept[1], threat_model.epsilon)
        axes.axvline(kept[0], color="C3", linewidth=2, label=f"weights kept: step {kept[0]}, epsilon {epsilon}")
    axes.axhline(float(threat_model.epsilon), linestyle="--", color="grey", linewidth=1)
    axes.yaxis.set_ticks([0, float(threat_model.epsilon)], ["0", target])
    axes.set(xlabel="optimizer step", ylabel=f"epsilon ({threat_model.norm})")
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize="small", frameon=False)
    _save(figure, path, dpi=150)


def plot_adversarial_examples(
    examples: "AdversarialExamples", labels: Sequence[int], names: Mapping[int, str], path: str | Path
) -> None:
    """Plot a page of adversarial examples: clean image, magnified perturbation, adversarial image.

    Args:
        examples ([`~hf_rft.evaluation.report.AdversarialExamples`]):
            One row per example.
        labels (`Sequence[int]`):
            True classes of the whole dataset, by position.
        names (`Mapping[int, str]`):
            The model's class names.
        path (`str` or `Path`):
            The suffix sets the format.
    """
    figure = _figure(figsize=(7.5, 2.6 * len(examples.positions)))
    grid = figure.subplots(len(examples.positions), 3, squeeze=False)
    probabilities = examples.logits.softmax(dim=1), examples.adversarial_logits.softmax(dim=1)
    for row, position in enumerate(examples.positions):
        clean, adversarial = examples.pixels[row], examples.adversarial[row]
        change = adversarial - clean
        largest = change.abs().max().item() or 0.5  # no perturbation is shown as plain grey
        images = (clean, 0.5 + change / (2 * largest), adversarial)
        predicted = []
        for of_image in probabilities:
            confidence, label = of_image[row].max(dim=0)
            predicted.append(f"{names.get(int(label), int(label))} ({confidence.item():.0%})")
        true = names.get(int(labels[position]), int(labels[position]))
        titles = (
            f"number {position}, a {true}\ntaken for {predicted[0]}",
            f"perturbation x {1 / (2 * largest):.0f}\nlargest {255 * largest:.2g}/255",
            f"adversarial\ntaken for {predicted[1]}",
        )
        for axes, image, title in zip(grid[row], images, titles, strict=True):
            shown = image.movedim(0, -1).clamp(0, 1).float().numpy()
            axes.imshow(shown, cmap="gray" if shown.shape[-1] == 1 else None, vmin=0, vmax=1)
            axes.set_title(title, fontsize="small", parse_math=False)  # names may hold dollars
            axes.set_axis_off()
    _save(figure, path, dpi=100)


def plot_comparison(runs: Mapping[str, Sequence[Mapping]], path: str | Path, norm: str) -> None:
    """Plot robustness curves, and training histories with the onset of task adaptation, for several recipes.

    Args:
        runs (`Mapping[str, Sequence[Mapping]]`):
            For each recipe, one mapping per seed with `accuracies` (epsilon as text -> accuracy), `validation` and
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
    _save(figure, path, dpi=150)


def _colors() -> list[str]:
    from matplotlib import rcParams

    return rcParams["axes.prop_cycle"].by_key()["color"]
