"""A report as a table: text to print, or pandas."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..threat_model import NORM_NAMES, format_epsilon


if TYPE_CHECKING:
    import pandas

    from .report import RobustnessReport


def to_pandas(report: "RobustnessReport", per: str) -> "pandas.DataFrame":
    """See [`RobustnessReport.to_pandas`]."""
    import pandas  # slow to import

    written, grid = [*map(format_epsilon, report.epsilons)], [*map(float, report.epsilons)]
    withstands = report.broken_at[:, None] > np.arange(len(grid))
    if per == "example":
        columns = {
            "label": report.labels,
            "correct_clean": withstands[:, 0],
            "broken_at": np.array([*grid, np.inf])[report.broken_at],
            "distance": report.distances,
        }
        if report.margins is not None:
            columns["margin"] = report.margins
        predictions = zip(written, report.predictions.T, strict=True)
        columns |= {f"prediction_at_{epsilon}": predicted for epsilon, predicted in predictions}
        return pandas.DataFrame(columns).rename_axis("example")
    if per == "epsilon":
        low, high = zip(*report.accuracy_intervals, strict=True)
        columns = {"epsilon": grid, "written": written, "accuracy": report.accuracies, "low": low, "high": high}
        return pandas.DataFrame({**columns, "num_robust": withstands.sum(axis=0)})
    if per == "class":
        return pandas.DataFrame(class_rows(report)).set_index("class")
    raise ValueError(f"`per={per!r}` is unknown; choose 'example', 'class' or 'epsilon'.")


def class_rows(report: "RobustnessReport") -> list[dict[str, Any]]:
    """For each class that occurs among the labels, what `to_pandas("class")` says."""
    from ..metrics.expected_robustness.expected_robustness import confidence_interval

    classes, counts = np.unique(report.labels, return_counts=True)
    names, largest = report.settings.get("model", {}).get("class_names") or {}, len(report.epsilons) - 1
    rows = []
    for label, count in zip(classes.tolist(), counts.tolist(), strict=True):
        broken_at = report.broken_at[report.labels == label]
        clean, robust = float((broken_at > 0).mean()), float((broken_at > largest).mean())
        # Each interval is wide enough that all of them hold at once: one of many classes is low by chance.
        low, high = confidence_interval(robust, count, 1 - 0.05 / len(classes))
        shares = {"clean_accuracy": clean, "robust_accuracy": robust, "low": low, "high": high}
        rows.append({"class": label, "name": names.get(str(label), str(label)), "count": count, **shares})
    return rows


def conditions(report: "RobustnessReport", norm: str | None = None) -> str:
    """Examples, threat model and attacks, in one line."""
    settings = report.settings
    attacks = ", ".join(
        f"{attack['attack']} ({attack['steps']} steps"
        + (f", {attack['restarts']} restarts)" if attack["restarts"] > 1 else ")")
        for attack in settings["attacks"]
    )
    return (
        f"{len(report)} examples, {norm or report.norm}, tier {settings['tier']}: {attacks}; seed {settings['seed']}"
    )


def to_text(report: "RobustnessReport") -> str:
    """See [`RobustnessReport.table`]."""
    lines = [conditions(report)]
    rows = zip(report.epsilons, report.accuracies, report.accuracy_intervals, strict=True)
    lines += [
        f"  accuracy at {format_epsilon(epsilon):<8} {100 * accuracy:5.1f} %   [{100 * low:.1f}, {100 * high:.1f}]"
        for epsilon, accuracy, (low, high) in rows
    ]
    low, high = report.confidence_interval
    lower, upper = report.bracket
    lines += [
        f"  expected robustness  {100 * report.expected_robustness:5.1f} %   [{100 * low:.1f}, {100 * high:.1f}], "
        f"any curve through these points: {100 * lower:.1f} to {100 * upper:.1f}",
        "  (in brackets 95 % intervals over examples)",
    ]
    if (worst := report.worst_class) is not None:
        lines.append(f"  {describe_class(worst, report)}")
    for found in report.external:
        at = f"{100 * found.robust_accuracy:.1f} % at {format_epsilon(found.epsilon)}"
        lines.append(printable(f"  external evaluation: {found.attack} found {at} ({found.source})"))
    if report.profile is not None:
        lines += ["Beyond that threat model:", *_profile_lines(report)]
    flags = {**(report.flags or {}), **report.profile_flags}
    lines += [f"  WARNING {name}: {message}" for name, message in flags.items()]
    return "\n".join(lines)


def printable(text: str) -> str:
    """In one line, without control characters: names come from files of others."""
    return "".join(character for character in text if character.isprintable())


def describe_class(row: Mapping[str, Any], report: "RobustnessReport") -> str:
    """`worst class: cat, 31.2 % of 16 at 8/255 [9.0, 62.4]`."""
    accuracy, low, high = (100 * row[key] for key in ("robust_accuracy", "low", "high"))
    largest = format_epsilon(report.epsilons[-1])
    name = printable(row["name"])
    return f"worst class: {name}, {accuracy:.1f} % of {row['count']} at {largest} [{low:.1f}, {high:.1f}]"


def profile_rows(report: "RobustnessReport") -> list[tuple[str, float, tuple[float, float]]]:
    """What a profile says, in words, with its accuracy and the 95 % interval over examples."""
    from ..metrics.expected_robustness.expected_robustness import confidence_interval

    profile, rows = report.profile, []
    if profile is None:
        return rows
    for norm, other in profile.norms.items():
        largest = format_epsilon(other.epsilons[-1])
        rows.append((f"{NORM_NAMES[norm]} {largest}", other.robust_accuracy, other.accuracy_intervals[-1]))
    union, corrupted = report.union_accuracy or 0.0, report.corruption_accuracy or 0.0
    rows.append(("all norms at once", union, confidence_interval(union, len(report))))
    # An example is as good as one draw, however often it is corrupted.
    rows.append(("common corruptions, mean", corrupted, confidence_interval(corrupted, len(report))))
    return rows


def _profile_lines(report: "RobustnessReport") -> list[str]:
    lines = [
        f"  {name:<28}{100 * accuracy:5.1f} %   [{100 * low:.1f}, {100 * high:.1f}]"
        for name, accuracy, (low, high) in profile_rows(report)
    ]
    lost = report.corruption_drop
    return lines if lost is None else [*lines, f"  corruptions cost {100 * lost:.1f} % of the clean accuracy"]
