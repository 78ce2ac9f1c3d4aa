"""A report as JSON values, and back."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..attacks.base import Passes
from ..threat_model import format_epsilon, parse_epsilon


if TYPE_CHECKING:
    from .report import RobustnessReport

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
        values["external"] = [
            {**found._asdict(), "epsilon": format_epsilon(found.epsilon)} for found in report.external
        ]
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
    if version not in READABLE:
        raise ValueError(
            f"{where} has schema version {version}, this hf_rft reads versions {' and '.join(map(str, READABLE))}; "
            "update hf_rft."
        )
    try:
        columns = {name: values["per_example"][name] for name in _COLUMNS}
        margins = values["per_example"].get("margins")
        epsilons = [parse_epsilon(epsilon) for epsilon in values["epsilons"]]
        index = {format_epsilon(epsilon): place for place, epsilon in enumerate(epsilons)}
        broken_at = [len(epsilons) if epsilon is None else index[epsilon] for epsilon in columns["broken_at"]]
        distances = [np.inf if distance is None else distance for distance in columns["distances"]]
        lengths = {len(column) for column in [*columns.values(), *([] if margins is None else [margins])]}
        if len(lengths) != 1:
            raise ValueError(f"{where} is not a complete robustness report: its columns have different lengths.")
        external = [{**found, "epsilon": parse_epsilon(found["epsilon"])} for found in values.get("external", [])]
        profile = values.get("profile")
        if profile is not None:
            norms = {norm: from_values(other, where) for norm, other in profile["norms"].items()}
            profile = Profile(norms, dict(profile["corruptions"]))
        return RobustnessReport(
            norm=values["norm"],
            epsilons=epsilons,
            labels=np.array(columns["labels"]),
            clean_predictions=np.array(columns["clean_predictions"]),
            adversarial_predictions=np.array(columns["adversarial_predictions"]),
            broken_at=np.array(broken_at),
            distances=np.array(distances, dtype=float),
            flags=values["flags"],
            passes=Passes(**values["passes"]),
            settings=values["settings"],
            margins=None if margins is None else np.array(margins, dtype=float),
            profile=profile,
            external=[ExternalEvaluation(**found) for found in external],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is not a complete robustness report: {error} is missing or wrong.") from error
