"""Print and plot the robustness reports of several models side by side.

    hf-rft leaderboard outputs/* my-name/robust-vit other/model@v1.2 --sort_by expected_robustness

Each entry is a folder with a robustness.json, such a file, or a repository on the Hub, at a revision after the "@".
Only reports with the same data, threat model and attacks share a table; the others are listed with what differs.
Writes leaderboard.md, leaderboard.json and leaderboard.png.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..evaluation.differences import paired_difference
from ..evaluation.plots import plot_robustness_curve
from ..evaluation.report import RobustnessReport
from ..hub.download import download
from ..hub.evidence import REPORT_NAME, check_base, hash_weight_files, read_report
from ..hub.safe_loading import is_adapter
from ..threat_model import NORM_NAMES, NORMS, format_epsilon, parse_epsilon
from ..utils.files import check_writable, replacing, write_text
from ..utils.markdown import cell, markdown_table
from .parsing import Parser


SORT_KEYS = ("expected_robustness", "robust_accuracy", "clean_accuracy")
SHOWN = (*SORT_KEYS, "confidence_interval", "accuracies", "accuracy_intervals")
# Of a profile; never part of the ranking.
BEYOND = {"union_accuracy": "all norms", "corruption_accuracy": "corruptions"}


@dataclass(frozen=True, eq=False)
class Candidate:
    """A report that could be read."""

    entry: str  # as it was given
    name: str
    report: RobustnessReport
    weights_checked: bool  # against the hashes in the report


def conditions(report: RobustnessReport) -> dict[str, Any]:
    """What two reports must have in common for their numbers to be comparable, as JSON values."""
    settings, dataset = report.settings, report.settings["dataset"]
    dataset = dataset if isinstance(dataset, dict) else {}
    return {
        "norm": report.norm,
        "epsilons": [format_epsilon(epsilon) for epsilon in report.epsilons],
        "number of examples": len(report),
        "image shape": dataset.get("image_shape"),
        "data (SHA-256)": dataset.get("sha256"),
        "tier": settings["tier"],
        "attacks": settings["attacks"],
        "guess_steps": settings.get("guess_steps"),
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
    for one in candidates:
        fitting = [members for members in groups if first_difference(one.report, members[0].report) is None]
        if fitting:
            fitting[0].append(one)
        else:
            groups.append([one])
    return sorted(groups, key=len, reverse=True)  # sorting is stable


def numbers(report: RobustnessReport) -> dict[str, Any]:
    """What a row shows: the report's own numbers, but those of an external evaluation where they are lower."""
    is_lower = report.claimed_accuracies != report.accuracies
    claimed = {
        "expected_robustness": report.claimed_expected_robustness,
        "robust_accuracy": report.claimed_accuracies[-1],
        "accuracies": report.claimed_accuracies,
        "external": [f"{found.attack} ({found.source})" for found in report.external if is_lower],
    }
    if is_lower:  # an external evaluation says nothing about single examples
        claimed |= {"confidence_interval": None, "accuracy_intervals": None}
    return {**{number: getattr(report, number) for number in (*SHOWN, *BEYOND)}, **claimed}


def rank(candidates: Sequence[Candidate], sort_by: str) -> list[Candidate]:
    """Best first; ties by robust accuracy, then by name."""

    def key(one: Candidate) -> tuple[float, float, str]:
        shown = numbers(one.report)
        return -shown[sort_by], -shown["robust_accuracy"], one.name

    return sorted(candidates, key=key)


def make_rows(ranked: Sequence[Candidate]) -> list[dict[str, Any]]:
    """The lines of a table, as JSON values."""
    rows = []
    for place, candidate in enumerate(ranked, start=1):
        report, shown, lead = candidate.report, numbers(candidate.report), (None, None)
        if place < len(ranked) and not (shown["external"] or numbers(ranked[place].report)["external"]):
            lead = paired_difference(report, ranked[place].report)
        checks = ", ".join([*(report.flags or {}), *report.profile_flags]) or "none"
        checks = "not made" if report.flags is None else checks
        row = {"rank": place, "name": candidate.name, "entry": candidate.entry}
        row |= shown
        row |= {"difference_to_next": lead[0], "difference_interval": lead[1]}
        rows.append({**row, "trust_checks": checks, "weights_checked": candidate.weights_checked})
    return rows


def make_leaderboard(candidates: Sequence[Candidate], not_read: Sequence[dict], sort_by: str) -> dict[str, Any]:
    """Everything that leaderboard.json says. There must be a candidate."""
    first, *others = group(candidates)
    tables, left_out = [], []
    for members in (first, *others):
        one = members[0]
        if members is first or len(members) > 1:
            tables.append({"conditions": conditions(one.report), "rows": make_rows(rank(members, sort_by))})
        else:
            reason = first_difference(one.report, first[0].report)
            left_out.append({"entry": one.entry, "name": one.name, "reason": reason})
    return {"sort_by": sort_by, "groups": tables, "not_comparable": left_out, "not_read": list(not_read)}


def markdown(leaderboard: dict[str, Any]) -> str:
    """One table a group, then what is in none of them, and why."""
    parts = ["# Robustness leaderboard"]
    parts += [_markdown_table(one, leaderboard["sort_by"]) for one in leaderboard["groups"]]
    for title, key in (("Not comparable", "not_comparable"), ("Not read", "not_read")):
        if leaderboard[key]:
            lines = [f"- {cell(one.get('name', one['entry']))}: {cell(one['reason'])}" for one in leaderboard[key]]
            parts.append(f"## {title}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _markdown_table(one: dict[str, Any], sort_by: str) -> str:
    shared, rows = one["conditions"], one["rows"]
    further = [f"at {epsilon}" for epsilon in shared["epsilons"][1:]]
    beyond = {key: title for key, title in BEYOND.items() if any(row[key] is not None for row in rows)}
    header = ["rank", "model", "clean", *further, "expected robustness", "minus the next row's", *beyond.values()]
    header.append("failed trust checks")
    lines = []
    for row in rows:
        expected = _with_interval(row["expected_robustness"], row["confidence_interval"] or [])
        lead = _with_interval(row["difference_to_next"], row["difference_interval"], sign="+")
        accuracies = (f"{100 * accuracy:.1f}" for accuracy in row["accuracies"])
        others = ("" if row[key] is None else f"{100 * row[key]:.1f}" for key in beyond)
        name = f"{row['name']} *" if row["external"] else row["name"]
        lines.append([str(row["rank"]), name, *accuracies, expected, lead, *others, row["trust_checks"]])
    table = markdown_table(header, lines)
    notes = f"In %, on {shared['number of examples']} examples, sorted by {sort_by.replace('_', ' ')}; in "
    notes += "brackets 95 % intervals over examples, of differences over the same examples of both models."
    for row in rows:
        if row["external"]:
            notes += f"\n\n\\* {cell(row['name'])}: with the lower accuracies of {cell('; '.join(row['external']))}."
    if beyond:
        notes += " All norms: share that withstands L-inf, L2 and L1 at comparable radii; corruptions: the mean over "
        notes += "15 common kinds at 5 severities."
    if unchecked := [cell(row["name"]) for row in rows if not row["weights_checked"]]:
        notes += f"\n\nOnly the report was read, the weights were not checked against it: {', '.join(unchecked)}. "
        notes += "`hf_rft.load_robust_model` does check them."
    title = cell(f"{NORM_NAMES[shared['norm']]} up to {shared['epsilons'][-1]}, tier {shared['tier']}")
    return f"## {title}\n\n{table}\n\n{notes}"


def _with_interval(value: float | None, interval: Sequence[float], sign: str = "") -> str:
    if value is None:
        return ""
    bounds = ", ".join(f"{100 * bound:{sign}.1f}" for bound in interval)
    return f"{100 * value:{sign}.1f}" + f" [{bounds}]" * bool(bounds)


def _as_text(value: Any) -> str:
    """A condition to be read: hashes shortened, what is not known said so."""
    if value is None:
        return "not known"
    return (value if len(value) < 64 else value[:12]) if isinstance(value, str) else json.dumps(value)


def write_leaderboard(leaderboard: dict[str, Any], output_dir: Path) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "leaderboard.md", markdown(leaderboard))
    write_text(output_dir / "leaderboard.json", json.dumps(leaderboard, indent=2) + "\n")
    shared, rows = leaderboard["groups"][0]["conditions"], leaderboard["groups"][0]["rows"]
    epsilons = [parse_epsilon(epsilon) for epsilon in shared["epsilons"]]
    names = [row["name"] for row in rows]
    threat = f"{NORM_NAMES[shared['norm']]}, tier {shared['tier']}"
    title = f"{shared['number of examples']} examples, {threat}; shaded: 95 % intervals over examples"
    curves = dict(zip(names, [(epsilons, row["accuracies"]) for row in rows], strict=True))
    intervals = {row["name"]: row["accuracy_intervals"] for row in rows if row["accuracy_intervals"]}
    with replacing(output_dir / "leaderboard.png") as scratch:
        plot_robustness_curve(curves, shared["norm"], scratch, title, intervals)


def find_report(entry: str, token: str | None = None) -> Path:
    """Path of the report; that of a repository is downloaded, without weights."""
    path = Path(entry)
    if path.is_dir():
        return path / REPORT_NAME
    if path.is_file() or path.suffix == ".json":  # a mistyped file name is not looked for on the Hub
        return path
    repo, _, revision = entry.partition("@")
    return download(repo, revision=revision or None, token=token, with_weights=False) / REPORT_NAME


def read_candidate(entry: str, path: Path) -> Candidate:
    """The report, checked against the weights beside it if there are any; an error says what is wrong with it."""
    report = read_report(path, name=entry)
    report.summary()  # refuses a grid or examples from which no numbers follow
    if report.norm not in NORMS or not isinstance(report.flags, dict | None):
        raise ValueError(f"{path} is damaged: its norm is {report.norm!r}, its flags are {report.flags!r}.")
    model, has_weights = report.settings["model"], any(path.parent.glob("*.safetensors"))
    if has_weights and model.get("files") != (found := hash_weight_files(path.parent)):
        raise ValueError(f"refused: it is about the weights {model.get('files')}, beside it are {found}")
    if has_weights and is_adapter(path.parent):
        check_base(path.parent, report, name=entry)
    return Candidate(entry, str(model.get("name") or entry), report, has_weights)


def read_all(entries: Sequence[str], token: str | None = None) -> tuple[list[Candidate], list[dict]]:
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
    found = list(candidates.values())
    found = [replace(one, name=f"{one.name} ({one.entry})") if occurrences[one.name] > 1 else one for one in found]
    return found, [{"entry": entry, "reason": reason} for entry, reason in not_read.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "entries", nargs="+", help="Folders, robustness.json files, or repositories, each with @revision if need be."
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/leaderboard"), help="Where the table goes.")
    parser.add_argument("--sort_by", choices=SORT_KEYS, default=SORT_KEYS[0], help="Best first, by this.")
    parser.add_argument("--token", help="Hub token, for private repositories.")
    args = parser.parse_args(arguments)
    check_writable("--output_dir", args.output_dir)
    candidates, not_read = read_all(args.entries, args.token)
    if not candidates:
        sys.exit("\n".join(["No report could be read.", *(f"{one['entry']}: {one['reason']}" for one in not_read)]))
    leaderboard = make_leaderboard(candidates, not_read, args.sort_by)
    write_leaderboard(leaderboard, args.output_dir)
    print(markdown(leaderboard))
