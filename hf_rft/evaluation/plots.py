"""Figures: accuracy over epsilon, and training histories.

Each function returns the figure, and writes it if it is given a path, whose suffix sets the format. Figures are opaque
and white, so that dark and light pages show them alike.
"""

import itertools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..threat_model import NORM_NAMES, ThreatModel, format_approximately, format_epsilon
from .tables import conditions


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .report import AdversarialExamples, RobustnessReport

Curve = tuple[Sequence[Fraction], Sequence[float]]  # epsilons, accuracies in [0, 1]

# Okabe and Ito's colours, which colour-blind readers can distinguish, without yellow (too pale for a line).
_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_MARKERS = "osD^vPX*"
_CHARACTERS = 72  # in a line of a title


def new_figure(**options) -> "Figure":
    # Imported late: matplotlib is slow to import and not needed for training. Avoid pyplot, whose global state would
    # select a window system.
    from matplotlib.figure import Figure

    return Figure(layout="constrained", facecolor="white", **options)


def save_figure(figure: "Figure", path: str | Path | None, dpi: int) -> "Figure":
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)
    return figure


def line_styles() -> Iterator[dict[str, str]]:
    """Colour and marker of one line after the other; 56 lines before a pair repeats."""
    yield from (
        {"color": color, "marker": marker}
        for color, marker in zip(itertools.cycle(_COLORS), itertools.cycle(_MARKERS), strict=False)
    )


def _set_title(axes, title: str) -> None:
    lines = [part for line in title.splitlines() for part in textwrap.wrap(line, _CHARACTERS)]
    axes.set_title("\n".join(lines), fontsize="medium", parse_math=False)  # names may hold dollars


def add_legend(figure: "Figure", axes, columns: int, side: str = "lower") -> None:
    """Outside of the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    options = {"loc": f"outside {side} center", "ncols": columns, "fontsize": "small", "frameon": False}
    for text in figure.legend(handles, labels, **options).get_texts():
        text.set_parse_math(False)


def draw_curves(axes, curves: Mapping[str, Curve], norm: str) -> None:
    """Draw accuracy in percent over epsilon, one line per name."""
    for style, (name, (epsilons, accuracies)) in zip(line_styles(), curves.items(), strict=False):
        at = [float(epsilon) for epsilon in epsilons]
        axes.plot(at, [100 * accuracy for accuracy in accuracies], markersize=5, label=name, **style)
    _set_epsilon_ticks(axes.xaxis, curves)
    name = NORM_NAMES.get(norm, norm)
    axes.set(xlabel=f"epsilon ({name}, pixels in [0, 1])", ylabel="accuracy (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)


def _set_epsilon_ticks(axis, curves: Mapping[str, Curve]) -> None:
    """Put ticks at the epsilons of the curves, in the usual notation; where they crowd, some stay without a label."""
    grid = sorted({epsilon for epsilons, _ in curves.values() for epsilon in epsilons})
    labels, width, end = [], grid[-1] / 11, 2 * grid[-1]
    for epsilon in reversed(grid):  # the last one and 0 always have one
        has_room = end - epsilon >= width and (epsilon >= width or epsilon == 0)
        labels.insert(0, format_epsilon(epsilon) if has_room else "")
        end = epsilon if has_room else end
    axis.set_ticks([float(epsilon) for epsilon in grid], labels)


def _shade(axes, line, low: Sequence[float], high: Sequence[float], label: str | None = None) -> None:
    """From `low` to `high`, accuracies in [0, 1], around a line."""
    bounds = ([100 * bound for bound in side] for side in (low, high))
    axes.fill_between(line.get_xdata(), *bounds, color=line.get_color(), alpha=0.15, linewidth=0, label=label)


def plot_robustness_curve(
    curves: Mapping[str, Curve],
    norm: str,
    path: str | Path | None = None,
    title: str = "",
    intervals: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    num_classes: int | None = None,
) -> "Figure":
    """Plot accuracy over epsilon.

    `intervals` holds the confidence intervals at each epsilon, for any of the curves; they are shaded. A dashed line
    shows the accuracy of guessing, where `num_classes` is known.
    """
    figure = new_figure(figsize=(6.4, 4.4))
    axes = figure.subplots()
    draw_curves(axes, curves, norm)
    for line, name in zip(list(axes.lines), curves, strict=True):
        if intervals and name in intervals:
            label = "95 % interval over examples" if len(curves) == 1 else None
            _shade(axes, line, *zip(*intervals[name], strict=True), label=label)
    if num_classes is not None:
        label = f"chance (1 in {num_classes} classes)"
        axes.axhline(100 / num_classes, linestyle="--", color="grey", linewidth=1, label=label)
    _set_title(axes, title)
    add_legend(figure, axes, columns=2)
    return save_figure(figure, path, dpi=150)


def plot_report(report: "RobustnessReport", path: str | Path | None = None, title: str | None = None) -> "Figure":
    """Plot the curve of one report. By default, the title says what was measured, and how."""
    model = report.settings.get("model", {})
    name, num_classes = model.get("name") or "model", model.get("num_classes")
    if title is None:
        low, high = (100 * bound for bound in report.confidence_interval)
        title = (
            f"expected robustness {100 * report.expected_robustness:.1f} % (95 % interval {low:.1f} to {high:.1f} %)"
        )
        if "attacks" in report.settings:
            title += f"\n{conditions(report, NORM_NAMES[report.norm])}"
    return plot_robustness_curve(
        {name: (report.epsilons, report.accuracies)},
        report.norm,
        path,
        title,
        intervals={name: report.accuracy_intervals},
        # Older reports, and those of models without a configuration, do not know it.
        num_classes=num_classes if isinstance(num_classes, int) and num_classes > 1 else None,
    )


def plot_profile(report: "RobustnessReport", path: str | Path | None = None, title: str | None = None) -> "Figure":
    """Plot a profile: the curve of each norm over the share of its largest epsilon, and a heat map of corruptions.

    Raises:
        ValueError: if the report has no profile.
    """
    if report.profile is None:
        raise ValueError("The report has no profile; evaluate with `profile=True`.")
    figure = new_figure(figsize=(10.5, 4.8))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    for style, each in zip(line_styles(), [report, *report.profile.norms.values()], strict=False):
        largest = each.epsilons[-1]
        shares = [float(epsilon / largest) for epsilon in each.epsilons]
        label = f"{NORM_NAMES[each.norm]}, up to {format_epsilon(largest)}"
        (line,) = left.plot(
            shares, [100 * accuracy for accuracy in each.accuracies], markersize=5, label=label, **style
        )
        _shade(left, line, *zip(*each.accuracy_intervals, strict=True))
    union = f"all norms: {100 * (report.union_accuracy or 0):.1f} %"
    left.axhline(100 * (report.union_accuracy or 0), linestyle="--", color="grey", linewidth=1, label=union)
    left.set(xlabel="epsilon, as a share of the norm's largest", ylabel="accuracy (%)", ylim=(0, 100))
    left.grid(alpha=0.3)
    left.legend(fontsize="small")

    kinds = list(report.profile.corruptions)
    shares = [[100 * right / len(report) for right in row] for row in report.profile.corruptions.values()]
    right.imshow(shares, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for row, column in itertools.product(range(len(kinds)), range(len(shares[0]))):
        share = shares[row][column]
        right.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize="x-small", color=_on_viridis(share))
    right.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds], fontsize="small")
    right.set_xticks(range(len(shares[0])), range(1, len(shares[0]) + 1))
    right.set(xlabel="severity")
    name = report.settings.get("model", {}).get("name") or "model"
    _set_title(left, title or f"{name}: {len(report)} examples")
    mean = 100 * (report.corruption_accuracy or 0)
    _set_title(right, f"accuracy (%) under common corruptions, mean {mean:.1f}")
    return save_figure(figure, path, dpi=150)


def _on_viridis(share: float) -> str:
    """A colour that can be read on that of the share, in percent."""
    return "white" if share < 60 else "black"


def plot_epsilon_schedule(
    steps: Sequence[int],
    epsilons: Sequence[float],
    threat_model: ThreatModel,
    path: str | Path | None = None,
    *,
    done: tuple[int, float] | None = None,
    kept: tuple[int, float] | None = None,
    epochs: float | None = None,
) -> "Figure":
    """Plot the training epsilon over optimizer steps, with the target epsilon as a dashed line.

    Args:
        steps, epsilons (`Sequence`):
            The whole planned schedule: numbers of completed steps, and the epsilon after each.
        done (`tuple`, *optional*):
            Number of steps trained, if fewer than planned, and the epsilon reached; the rest of the schedule is drawn
            dotted.
        kept (`tuple`, *optional*):
            The step whose weights were kept, and the largest epsilon they were trained with.
        epochs (`float`, *optional*):
            The epochs that all steps make; they are shown below the steps.
    """
    import numpy as np

    figure = new_figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    last, reached = done or (steps[-1], epsilons[-1])
    count, color = sum(step <= last for step in steps), _COLORS[0]
    axes.plot(steps[:count], epsilons[:count], color=color, label="trained")
    target = format_epsilon(threat_model.epsilon)
    axes.axhline(float(threat_model.epsilon), linestyle="--", color="grey", linewidth=1, label=f"target: {target}")
    if last < steps[-1]:
        axes.plot(steps[count - 1 :], epsilons[count - 1 :], ":", color=color, label="planned, not trained")
        epsilon = format_approximately(reached, threat_model.epsilon)
        axes.axvline(last, color=color, linewidth=1, label=f"stopped: step {last}, epsilon {epsilon}")
    if kept is not None:
        epsilon = format_approximately(kept[1], threat_model.epsilon)
        label = f"weights kept: step {kept[0]}, trained up to epsilon {epsilon}"
        height = float(np.interp(kept[0], steps, epsilons))
        axes.plot([kept[0]], [height], "D", color=_COLORS[1], markersize=8, label=label, clip_on=False, zorder=3)
    axes.yaxis.set_ticks([0, float(threat_model.epsilon)], ["0", target])
    name = NORM_NAMES[threat_model.norm]
    axes.set(xlabel="optimizer step", ylabel=f"epsilon ({name})", xlim=(0, max(steps[-1], 1)))
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    if epochs:
        share = epochs / max(steps[-1], 1)
        below = axes.secondary_xaxis(
            "bottom", functions=(partial(np.multiply, share), partial(np.multiply, 1 / share))
        )
        below.spines.bottom.set_position(("outward", 38))  # below the steps and their label
        below.set_xlabel("epoch")
    add_legend(figure, axes, columns=2, side="upper")
    return save_figure(figure, path, dpi=150)


def plot_adversarial_examples(
    examples: "AdversarialExamples", labels: Sequence[int], names: Mapping[int, str], path: str | Path | None = None
) -> "Figure":
    """Plot a page of adversarial examples: clean image, magnified perturbation, adversarial image.

    Args:
        examples ([`~hf_rft.evaluation.report.AdversarialExamples`]):
            One row per example.
        labels (`Sequence[int]`):
            True classes of the whole dataset, by position.
        names (`Mapping[int, str]`):
            The model's class names.
    """
    figure = new_figure(figsize=(7.5, 2.6 * len(examples.positions)))
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
            predicted.append(f"predicted: {_class_name(names, label)} ({confidence.item():.0%})")
        titles = (
            f"image {position}: {_class_name(names, labels[position])}\n{predicted[0]}",
            f"perturbation × {1 / (2 * largest):.0f}\nlargest {255 * largest:.2g}/255",
            f"adversarial\n{predicted[1]}",
        )
        for axes, image, title in zip(grid[row], images, titles, strict=True):
            shown = image.movedim(0, -1).clamp(0, 1).float().numpy()
            axes.imshow(shown, cmap="gray" if shown.shape[-1] == 1 else None, vmin=0, vmax=1)
            axes.set_title(title, fontsize="small", parse_math=False)  # names may hold dollars
            axes.set_axis_off()
    return save_figure(figure, path, dpi=100)


def _class_name(names: Mapping[int, str], label) -> str:
    return textwrap.shorten(str(names.get(int(label), int(label))), 22, placeholder="…")
