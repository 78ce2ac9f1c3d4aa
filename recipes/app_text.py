"""What the page of `app.py` says and draws: Markdown and a figure, from a report and the results of attacks."""

import html
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from app_attack import AttackResult

from hf_rft import RobustnessReport
from hf_rft.markdown import code, plain
from hf_rft.model_card import NORM_NAMES
from hf_rft.plots import draw_curves
from hf_rft.threat_model import format_epsilon


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def percent(share: float) -> str:
    """With a space that does not break; 100 % only where nothing is missing."""
    return (
        ">\N{NO-BREAK SPACE}99.9\N{NO-BREAK SPACE}%"
        if 0.9995 <= share < 1
        else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"
    )


def format_size(size: float, norm: str) -> str:
    """A measured size, to three digits."""
    return f"{255 * size:.3g}/255" if norm == "linf" else f"{size:.3g}"


def top_classes(logits: torch.Tensor, classes: Sequence[str], count: int = 5) -> dict[str, float]:
    """The likeliest classes with their probabilities."""
    probabilities, indices = logits.softmax(dim=0).topk(min(count, len(classes)))
    return {classes[int(index)]: float(share) for index, share in zip(indices, probabilities, strict=True)}


# --- The report ---


def describe_report(report: RobustnessReport) -> str:
    """What was measured, on what, how; and what the trust checks say."""
    settings = report.settings
    dataset = settings.get("dataset", {})
    data = f"*{plain(dataset.get('name') or 'a dataset without a name')}*"
    data += f" ({plain(dataset['split'])})" if dataset.get("split") else ""
    low, high = report.confidence_interval
    lines = [
        f"Measured on **{len(report)} examples** of {data}, {NORM_NAMES[report.norm]} up to "
        f"{format_epsilon(report.epsilons[-1])}, tier **{plain(settings.get('tier', 'unknown'))}** "
        f"({_attack_list(report)}): clean accuracy {percent(report.clean_accuracy)}, expected robustness "
        f"**{percent(report.expected_robustness)}** (95 % interval {percent(low)} to {percent(high)})."
    ]
    if report.flags is None:
        lines.append("The trust checks were not run: nobody looked whether gradients are masked.")
    for name, message in (report.flags or {}).items():
        lines.append(f"⚠️ **Do not trust these numbers yet** ({code(name)}): {plain(message)}")
    return "\n\n".join(lines)


def _attack_list(report: RobustnessReport) -> str:
    attacks = report.settings.get("attacks") or []
    listed = [
        f"{attack['attack']} {attack['steps']} steps"
        + (f" x {attack['restarts']}" if attack.get("restarts", 1) > 1 else "")
        for attack in attacks
    ]
    return plain(", ".join(listed)) or "attacks unknown"


def compare_strength(report: RobustnessReport, steps: int) -> str:
    """Whether one run of APGD is a weaker or a stronger attack than the report's."""
    attacks = report.settings.get("attacks") or []
    total = {attack["attack"]: attack["steps"] * attack.get("restarts", 1) for attack in attacks}
    mine = f"The attack here is one run of APGD with {steps} steps"
    theirs = f"the report's ({_attack_list(report)})"
    if total == {"apgd": steps}:
        return f"{mine}, as strong as {theirs}."
    if total.get("apgd", 0) >= steps:
        return f"{mine}, **weaker** than {theirs}: an image that withstands it here need not count as robust there."
    if total and set(total) <= {"fgsm", "pgd", "apgd"} and max(total.values()) < steps:
        return f"{mine}, **stronger** than {theirs}: it may fool the model where the report found it robust."
    return f"{mine}; whether {theirs} is stronger cannot be said."


def describe_threat(report: RobustnessReport, norm: str, epsilon: Fraction) -> str:
    """The chosen norm and epsilon, and what the report knows about them."""
    chosen = f"**epsilon = {format_epsilon(epsilon)}** ({NORM_NAMES[norm]})"
    if norm != report.norm:
        return (
            f"{chosen}: ⚠️ outside what was measured. The report is about {NORM_NAMES[report.norm]} and says nothing "
            f"about {NORM_NAMES[norm]}."
        )
    if epsilon > report.epsilons[-1]:
        return f"{chosen}: ⚠️ outside what was measured, which ends at {format_epsilon(report.epsilons[-1])}."
    if epsilon in report.epsilons:
        place = report.epsilons.index(epsilon)
        low, high = (percent(bound) for bound in report.accuracy_intervals[place])
        return f"{chosen}: accuracy {percent(report.accuracies[place])} in the report ({low} to {high})."
    below = max(index for index, known in enumerate(report.epsilons) if known < epsilon)
    more, less = (percent(accuracy) for accuracy in report.accuracies[below : below + 2])
    left, right = (format_epsilon(known) for known in report.epsilons[below : below + 2])
    return f"{chosen}: not measured itself; accuracy {more} at {left} and {less} at {right}."


def draw_report(report: RobustnessReport, norm: str, epsilon: Fraction) -> "Figure":
    """The report's curve with its 95 % intervals, and the chosen epsilon on it, if it is one of the report's norm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained", dpi=110)
    axes = figure.subplots()
    draw_curves(axes, {"": (report.epsilons, report.accuracies)}, report.norm)
    grid = [float(known) for known in report.epsilons]
    low, high = ([100 * bound for bound in side] for side in zip(*report.accuracy_intervals, strict=True))
    axes.fill_between(grid, low, high, alpha=0.15, linewidth=0)
    end = grid[-1]
    if norm == report.norm:
        at, end = float(epsilon), max(end, float(epsilon))
        axes.axvline(at, color="tab:red", linestyle="--", linewidth=1)
        if at <= grid[-1]:
            # Between two points nothing is known but that the curve falls; the line stands for that.
            right = next(index for index, known in enumerate(grid) if known >= at)
            left = max(right - 1, 0)
            share = (at - grid[left]) / (grid[right] - grid[left]) if right else 0.0
            accuracy = (1 - share) * report.accuracies[left] + share * report.accuracies[right]
            axes.plot(at, 100 * accuracy, marker="o", markersize=11, color="tab:red", markerfacecolor="none")
        words = "chosen" if at <= grid[-1] else "chosen, not measured"
        is_right = at > end / 2
        axes.annotate(
            f"{words}: {format_epsilon(epsilon)}",
            (at, 4),
            xytext=(-6 if is_right else 6, 0),
            textcoords="offset points",
            ha="right" if is_right else "left",
            color="tab:red",
        )
    axes.set_title("accuracy in the report, with 95 % intervals", fontsize="medium")
    axes.set_xlim(-0.03 * end, 1.03 * end)
    # Labels of about a fifteenth of the width each: where epsilons lie closer together, turn them.
    if min(b - a for a, b in zip(grid, grid[1:], strict=False)) < end / 12:
        axes.tick_params(axis="x", labelrotation=45, labelsize="small")
    return figure


# --- The attacks ---


def describe_pixels(pixels: torch.Tensor) -> str:
    """Size of the image that a model sees, `(channels, height, width)`."""
    channels, height, width = pixels.shape[-3:]
    return f"{width} x {height} pixels, {'grey' if channels == 1 else f'{channels} channels'}"


def describe_result(result: AttackResult, classes: Sequence[str]) -> str:
    """Whether the model was fooled, and by how much of a perturbation."""
    norm, epsilon = result.threat_model.norm, result.threat_model.epsilon
    limit = f"{NORM_NAMES[norm]} {format_epsilon(epsilon)} ({result.steps} steps)"
    clean, adversarial, rounded = (
        _prediction(logits, classes) for logits in (result.logits, result.adversarial_logits, result.rounded_logits)
    )
    if result.errs_already:
        true = plain(classes[result.label])
        return f"**Wrong without any perturbation**: taken for {clean}, but the true class is *{true}*. Not attacked."
    if epsilon == 0:
        return f"**Epsilon is 0**: this is the clean image, taken for {clean}."
    if result.is_fooled:
        verdict = f"**Fooled** at {limit}: {clean} becomes {adversarial}."
    else:
        now = result.adversarial_logits.softmax(dim=0)[result.label].item()
        verdict = f"**Withstands** this attack at {limit}: still {clean}, now {percent(now)}."
    rounding = ""
    if (result.rounded_logits.argmax().item() != result.label) != result.is_fooled:
        rounding = f" But rounded to 8 bits, as the picture shows it, it is taken for {rounded}."
    return f"{verdict} Perturbation: {format_size(result.distance, norm)}.{rounding}"


def _prediction(logits: torch.Tensor, classes: Sequence[str]) -> str:
    ((name, probability),) = top_classes(logits, classes, count=1).items()
    return f"*{plain(name)}* ({percent(probability)})"


# --- Status ---


def status_line(message: str, kind: str = "info", *, share: float | None = None) -> str:
    """HTML of the line above the results: `"info"`, `"error"`, or `"busy"` with a bar that is filled to `share`."""
    bar = "" if share is None else f'<progress max="1" value="{min(share, 1):.3f}"></progress>'
    return f'<div class="status {kind}" role="status">{html.escape(message)}{bar}</div>'
