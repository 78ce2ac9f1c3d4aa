"""A report as JSON values, and back."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..attacks.base import Passes
from ..threat_model import NORMS, format_epsilon, parse_epsilon
from .corruptions import KINDS, SEVERITIES


if TYPE_CHECKING:
    from .report import Profile, RobustnessReport

# Version 2 added the margins, the profile and external evaluations.
VERSION, READABLE = 2, (1, 2)
_COLUMNS = ("labels", "clean_predictions", "adversarial_predictions", "broken_at", "distances")


def to_values(report: "RobustnessReport") -> dict[str, Any]:
    """See [`RobustnessReport.to_dict`]."""
    columns = {
        "labels": report.labels.tolist(),
        "clean_predictions": report.clean_predictions.tolist(),
        "adversarial_predictions": report.adversarial_predictions.tolist(),
        "broken_at": [None if epsilon is None else format_epsilon(epsilon) for epsilon in report.per_example],
        "distances": [distance if np.isfinite(distance) else None for distance in report.distances.tolist()],
    }
    if report.margins is not None:
        columns["margins"] = report.margins.tolist()
    values = {
        "schema_version": VERSION,
        "norm": report.norm,
        "epsilons": [format_epsilon(epsilon) for epsilon in report.epsilons],
        "accuracies": report.accuracies,
        "accuracy_intervals": report.accuracy_intervals,
        "clean_accuracy": report.clean_accuracy,
        "robust_accuracy": report.robust_accuracy,
        "expected_robustness": report.expected_robustness,
        "bracket": report.bracket,
        "confidence_interval": report.confidence_interval,
        "expected_robustness_from_distances": report.expected_robustness_from_distances,
        "num_examples": len(report),
        "flags": report.flags,
        "passes": report.passes._asdict(),
        "settings": report.settings,
        "per_example": columns,
    }
    if report.external:
        values["external"] = [{**vars(found), "epsilon": format_epsilon(found.epsilon)} for found in report.external]
    if (profile := report.profile) is not None:
        values["profile"] = {
            "norms": {norm: to_values(other) for norm, other in profile.norms.items()},
            "union_accuracy": report.union_accuracy,
            "corruptions": profile.corruptions,
            "corruption_accuracy": report.corruption_accuracy,
            "corruption_drop": report.corruption_drop,
        }
    return values


def from_values(values: Any, where: str) -> "RobustnessReport":
    """The report; its numbers are recomputed from the examples. See [`RobustnessReport.load`].

    Raises:
        ValueError: beginning with `where`, if something is missing, or no version of the schema describes it.
    """
    from .report import ExternalEvaluation, Profile, RobustnessReport

    try:
        version = values["schema_version"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where} is not a robustness report ({type(error).__name__}: {error}).") from error
    if isinstance(version, bool) or version not in READABLE:
        raise ValueError(
            f"{where} has schema version {version}, this hf_rft reads versions {' and '.join(map(str, READABLE))}; "
            "update hf_rft."
        )
    try:
        columns = {name: values["per_example"][name] for name in _COLUMNS}
        epsilons = [parse_epsilon(epsilon) for epsilon in values["epsilons"]]
        index = {format_epsilon(epsilon): place for place, epsilon in enumerate(epsilons)}
        broken_at = [len(epsilons) if epsilon is None else index[epsilon] for epsilon in columns["broken_at"]]
        distances = [np.inf if distance is None else distance for distance in columns["distances"]]
        margins = values["per_example"].get("margins")
        report = RobustnessReport(
            norm=values["norm"],
            epsilons=epsilons,
            labels=_whole_numbers("labels", columns["labels"]),
            clean_predictions=_whole_numbers("clean_predictions", columns["clean_predictions"]),
            adversarial_predictions=_whole_numbers("adversarial_predictions", columns["adversarial_predictions"]),
            broken_at=np.array(broken_at),
            distances=np.array(distances, dtype=float),
            flags=values["flags"],
            passes=Passes(**values["passes"]),
            settings=values["settings"],
            margins=None if margins is None else np.array(margins, dtype=float),
            external=[ExternalEvaluation(**found) for found in values.get("external", [])],
        )
        lengths = {np.shape(column) for column in [*columns.values(), *([] if margins is None else [margins])]}
        if len(lengths) != 1:
            raise ValueError("its columns have different lengths")
        _check_class_names(report.settings)
        if (profile := values.get("profile")) is not None:
            norms = {norm: from_values(other, where) for norm, other in profile["norms"].items()}
            report.profile = Profile(norms, {kind: list(row) for kind, row in profile["corruptions"].items()})
            _check_profile(report, report.profile)
        return report
    except ValueError as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where} is not a complete robustness report: {error}.") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is not a complete robustness report: {error} is missing or wrong.") from error


def _whole_numbers(name: str, column: Any) -> np.ndarray:
    numbers = np.array(column)
    if numbers.dtype.kind not in "iu":
        raise ValueError(f"{name!r} does not hold whole numbers")
    return numbers


def _check_class_names(settings: Any) -> None:
    names = (settings.get("model") or {}).get("class_names", {})
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError("'class_names' does not hold a name for each number")


def _check_profile(report: "RobustnessReport", profile: "Profile") -> None:
    """Refuse a profile of other norms, examples or corruptions than its numbers are said to be about."""
    if set(profile.norms) != {*NORMS} - {report.norm}:
        raise ValueError(f"'profile' holds the norms {sorted(profile.norms)}, not all others than {report.norm}")
    for norm, other in profile.norms.items():
        is_same = np.array_equal(other.labels, report.labels)
        is_same = is_same and np.array_equal(other.clean_predictions, report.clean_predictions)
        if other.norm != norm or other.profile is not None or not is_same:
            raise ValueError(f"'profile' holds for {norm} a report of another norm or of other examples")
    kinds = [kind for group in KINDS.values() for kind in group]
    counts = [count for row in profile.corruptions.values() for count in row]
    is_count = all(isinstance(count, int) and 0 <= count <= len(report) for count in counts)
    if list(profile.corruptions) != kinds or {len(row) for row in profile.corruptions.values()} != {len(SEVERITIES)}:
        raise ValueError("'corruptions' does not hold each kind at each severity")
    if not is_count:
        raise ValueError(f"'corruptions' holds other values than numbers of examples up to {len(report)}")
