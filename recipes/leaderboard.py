"""Print and plot the robustness reports of several models side by side.

    python recipes/leaderboard.py outputs/* my-name/robust-vit other/model@v1.2 --sort_by expected_robustness

Each entry is a folder with a robustness.json, such a file, or a repository on the Hub, at a revision after the "@".
Only reports with the same data, threat model and attacks share a table; the others are listed with what differs.
Writes leaderboard.md, leaderboard.json and leaderboard.png.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from hf_rft import RobustnessReport
from hf_rft.evidence import REPORT_NAME, hash_weight_files, read_report
from hf_rft.files import replacing, write_text
from hf_rft.hub import download
from hf_rft.plots import plot_robustness_curve
from hf_rft.threat_model import format_epsilon, parse_epsilon


SORT_KEYS = ("expected_robustness", "robust_accuracy", "clean_accuracy")

Refusal = dict[str, str]  # "entry" and "reason"
Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A report that could be read."""

    entry: str  # as it was given
    name: str
    report: RobustnessReport
    weights_checked: bool  # against the hashes in the report


# --- Comparing ---


def conditions(report: RobustnessReport) -> dict[str, Any]:
    """What two reports must have in common for their numbers to be comparable, as JSON values."""
    settings, dataset = report.settings, report.settings["dataset"]
    return {
        "norm": report.norm,
        "epsilons": [format_epsilon(epsilon) for epsilon in report.epsilons],
        "data (SHA-256)": dataset.get("sha256") if isinstance(dataset, dict) else None,
        "tier": settings["tier"],
        "attacks": settings["attacks"],
        "guess_steps": settings.get("guess_steps"),
        "number of examples": len(report),
    }


def first_difference(report: RobustnessReport, other: RobustnessReport) -> str | None:
    """The first condition in which `report` differs from `other`, with both values; None if they are comparable."""
    others = conditions(other)
    for name, mine in conditions(report).items():
        # Data without a hash are not known to be the same, even if neither report has one.
        if mine != others[name] or (name.startswith("data") and mine is None):
            return f"{name}: {_as_text(mine)} here, {_as_text(others[name])} in the first table"
    return None


def group(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Sets of comparable reports, largest first; of equally large ones, that of the report given first."""
    groups: list[list[Candidate]] = []
    for candidate in candidates:
        for members in groups:
            if first_difference(candidate.report, members[0].report) is None:
                members.append(candidate)
                break
        else:
            groups.append([candidate])
    return sorted(groups, key=len, reverse=True)  # sorting is stable


def contributions(report: RobustnessReport) -> np.ndarray:
    """What each example adds to the expected robustness, which is the mean of these."""
    # The module holds the one definition; `evaluate` is slow to import.
    from hf_rft.metrics.expected_robustness.expected_robustness import expected_robustness

    withstands = report.broken_at[:, None] > np.arange(len(report.epsilons))
    return expected_robustness([float(epsilon) for epsilon in report.epsilons], withstands.astype(float))


def paired_difference(report: RobustnessReport, other: RobustnessReport) -> tuple[float, Interval]:
    """Expected robustness minus that of `other` on the same examples, with its 95 % bootstrap interval.

    An example that is hard for one model is often hard for the other, so the interval is narrower than the two
    models' own intervals suggest.
    """
    ours, theirs = contributions(report), contributions(other)
    differences = ours - theirs
    mean = float(differences.mean())
    if np.ptp(differences) == 0:  # nothing to resample, which scipy refuses or warns about
        return mean, (mean, mean)

    def statistic(ours, theirs, axis):
        return (ours - theirs).mean(axis=axis)

    result = bootstrap((ours, theirs), statistic, paired=True, method="percentile", n_resamples=2000, batch=100, rng=0)
    return mean, (float(result.confidence_interval.low), float(result.confidence_interval.high))


def rank(candidates: Sequence[Candidate], sort_by: str) -> list[Candidate]:
    """Best first; ties by robust accuracy, then by name."""
    return sorted(candidates, key=lambda one: (-getattr(one.report, sort_by), -one.report.robust_accuracy, one.name))


def make_rows(ranked: Sequence[Candidate]) -> list[dict[str, Any]]:
    """The lines of a table, as JSON values."""
    rows = []
    for place, candidate in enumerate(ranked, start=1):
        report, is_last = candidate.report, place == len(ranked)
        difference, interval = (None, None) if is_last else paired_difference(report, ranked[place].report)
        rows.append(
            {
                "rank": place,
                "name": candidate.name,
                "entry": candidate.entry,
                "clean_accuracy": report.clean_accuracy,
                "accuracies": report.accuracies,
                "accuracy_intervals": report.accuracy_intervals,
                "robust_accuracy": report.robust_accuracy,
                "expected_robustness": report.expected_robustness,
                "confidence_interval": report.confidence_interval,
                "difference_to_next": difference,
                "difference_interval": interval,
                "trust_checks": "not made" if report.flags is None else ", ".join(report.flags) or "none",
                "weights_checked": candidate.weights_checked,
            }
        )
    return rows


def make_leaderboard(candidates: Sequence[Candidate], not_read: Sequence[Refusal], sort_by: str) -> dict[str, Any]:
    """Everything that leaderboard.json says. There must be a candidate."""
    first, *others = group(candidates)
    tables = [first, *(members for members in others if len(members) > 1)]
    left_out = [members[0] for members in others if len(members) == 1]
    reasons = [
        {"entry": one.entry, "name": one.name, "reason": first_difference(one.report, first[0].report)}
        for one in left_out
    ]
    groups = [
        {"conditions": conditions(members[0].report), "rows": make_rows(rank(members, sort_by))} for members in tables
    ]
    return {"sort_by": sort_by, "groups": groups, "not_comparable": reasons, "not_read": list(not_read)}


# --- Writing ---


def markdown(leaderboard: dict[str, Any]) -> str:
    """One table a group, then what is in none of them, and why."""
    parts = ["# Robustness leaderboard"]
    parts += [_markdown_table(one, leaderboard["sort_by"]) for one in leaderboard["groups"]]
    for title, key in (("Not comparable", "not_comparable"), ("Not read", "not_read")):
        if leaderboard[key]:
            lines = [f"- {_cell(one.get('name', one['entry']))}: {_cell(one['reason'])}" for one in leaderboard[key]]
            parts.append(f"## {title}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _markdown_table(one: dict[str, Any], sort_by: str) -> str:
    shared, rows = one["conditions"], one["rows"]
    further = [f"at {epsilon}" for epsilon in shared["epsilons"][1:]]
    header = ["rank", "model", "clean", *further, "expected robustness", "minus the next row's", "failed trust checks"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        lines.append(
            [str(row["rank"]), row["name"], *(f"{100 * accuracy:.1f}" for accuracy in row["accuracies"])]
            + [_with_interval(row["expected_robustness"], row["confidence_interval"])]
            + [_with_interval(row["difference_to_next"], row["difference_interval"], sign="+"), row["trust_checks"]]
        )
    table = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
    title = f"## {shared['norm']} up to {shared['epsilons'][-1]}, tier {shared['tier']}"
    data = f"data {_as_text(shared['data (SHA-256)'])}"
    notes = f"In %, on {shared['number of examples']} examples ({data}), sorted by {sort_by.replace('_', ' ')}; in "
    notes += "brackets 95 % bootstrap intervals over examples, of differences over the same examples of both models."
    if unchecked := [row["name"] for row in rows if not row["weights_checked"]]:
        notes += f"\n\nOnly the report was read, the weights were not checked against it: {', '.join(unchecked)}. "
        notes += "`hf_rft.load_robust_model` does check them."
    return f"{_cell(title)}\n\n{table}\n\n{notes}"


def _with_interval(value: float | None, interval: Interval | None, sign: str = "") -> str:
    if value is None or interval is None:
        return ""
    low, high = interval
    return f"{100 * value:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def _as_text(value: Any) -> str:
    """A condition to be read: hashes shortened, what is not known said so."""
    if value is None:
        return "not known"
    if isinstance(value, str):
        return value if len(value) < 64 else value[:12]
    return json.dumps(value)


def _cell(text: str) -> str:
    """Reports from elsewhere may hold any text: one with a line's end or a bar would break the table."""
    return " ".join(text.split()).replace("|", "\\|")


def write_leaderboard(leaderboard: dict[str, Any], output_dir: Path) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "leaderboard.md", markdown(leaderboard))
    write_text(output_dir / "leaderboard.json", json.dumps(leaderboard, indent=2) + "\n")
    shared, rows = leaderboard["groups"][0]["conditions"], leaderboard["groups"][0]["rows"]
    epsilons = [parse_epsilon(epsilon) for epsilon in shared["epsilons"]]
    names = [row["name"].replace("$", r"\$") for row in rows]  # to matplotlib, a dollar begins a formula
    curves = {name: (epsilons, row["accuracies"]) for name, row in zip(names, rows, strict=True)}
    intervals = {name: row["accuracy_intervals"] for name, row in zip(names, rows, strict=True)}
    with replacing(output_dir / "leaderboard.png") as scratch:
        plot_robustness_curve(curves, shared["norm"], scratch, intervals=intervals)


# --- Reading ---


def find_report(entry: str, token: str | None = None) -> Path:
    """Path of the report; that of a repository is downloaded, without weights."""
    path = Path(entry)
    if path.is_file() or path.suffix == ".json":  # a mistyped file name is not looked for on the Hub
        return path
    if path.is_dir():
        return path / REPORT_NAME
    repo, _, revision = entry.partition("@")
    return download(repo, revision=revision or None, token=token, with_weights=False) / REPORT_NAME


def read_candidate(entry: str, path: Path) -> Candidate:
    """
    Raises:
        ValueError: if there is no report, it is damaged, or the weights beside it are others.
    """
    report = read_report(path, name=entry)
    report.summary()  # of a damaged report, numbers cannot be computed
    model = report.settings["model"]
    has_weights = any(path.parent.glob("*.safetensors"))
    if has_weights and model.get("files") != (found := hash_weight_files(path.parent)):
        raise ValueError(f"refused: the report is about the weights {model.get('files')}, beside it are {found}")
    return Candidate(entry, str(model.get("name") or entry), report, has_weights)


def read_all(entries: Sequence[str], token: str | None = None) -> tuple[list[Candidate], list[Refusal]]:
    """The reports that can be read, each once, and why the others cannot."""
    candidates: dict[Path, Candidate] = {}
    not_read: dict[str, str] = {}
    for entry in entries:
        try:
            path = find_report(entry, token)
            place = path.parent.resolve() / path.name
            if place not in candidates:
                candidates[place] = read_candidate(entry, path)
        # OSError: also of the Hub. The others: JSON of another shape, which a stranger's report may have.
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            not_read[entry] = f"{error}" or type(error).__name__
    occurrences = Counter(one.name for one in candidates.values())
    named = [
        replace(one, name=f"{one.name} ({one.entry})") if occurrences[one.name] > 1 else one
        for one in candidates.values()
    ]
    return named, [{"entry": entry, "reason": reason} for entry, reason in not_read.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="+", help="folder, robustness.json, or repository[@revision]")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/leaderboard"))
    parser.add_argument("--sort_by", choices=SORT_KEYS, default=SORT_KEYS[0])
    parser.add_argument("--token", help="of the Hub, for private repositories")
    args = parser.parse_args(arguments)
    candidates, not_read = read_all(args.entries, args.token)
    if not candidates:
        reasons = "\n".join(f"{one['entry']}: {one['reason']}" for one in not_read)
        sys.exit(f"No report could be read.\n{reasons}")
    leaderboard = make_leaderboard(candidates, not_read, args.sort_by)
    write_leaderboard(leaderboard, args.output_dir)
    print(markdown(leaderboard))


if __name__ == "__main__":
    main()
