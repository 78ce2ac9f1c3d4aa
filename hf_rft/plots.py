"""Figures: accuracy over epsilon, and training histories."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from .threat_model import format_epsilon


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
    grid = sorted({epsilon for epsilons, _ in curves.values() for epsilon in epsilons})
    axes.set_xticks([float(epsilon) for epsilon in grid], [format_epsilon(epsilon) for epsilon in grid])
    axes.set(xlabel=f"epsilon ({norm}, pixels in [0, 1])", ylabel="accuracy (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()


def plot_robustness_curve(curves: Mapping[str, Curve], norm: str, path: str | Path, title: str = "") -> None:
    """Write the accuracy-versus-epsilon curves to `path`; its ending says the format."""
    figure = _figure(figsize=(6, 4))
    axes = figure.subplots()
    draw_curves(axes, curves, norm)
    axes.set_title(title)
    figure.savefig(path, dpi=150)
