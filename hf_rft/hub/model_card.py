"""The model card: what a robust model claims, for people (text) and for machines (`model-index`).

The text is that of model_card_template.md. Each part of it stands between two comments, and is replaced when it is
written again; all other text stays as it is.
"""

import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.report import RobustnessReport
from ..evaluation.tables import describe_class, profile_rows
from ..threat_model import NORM_NAMES, format_approximately, format_epsilon, parse_epsilon
from ..utils.markdown import code, one_line, plain
from .reproduction import code_to_reproduce, quoted


TAGS = ["image-classification", "adversarial-robustness", "robust-fine-tuning", "hf_rft"]

# --- For machines ---


def eval_results(report: RobustnessReport) -> list[EvalResult]:
    """The entries of `model-index`: the accuracy at each epsilon, and expected robustness, also in a profile's norms.

    `metric_args` holds what the number depends on. `attack` and `steps` are lists where the tier has several attacks.
    """
    dataset, settings = report.settings.get("dataset", {}), report.settings
    attacks, steps, restarts = ([attack[key] for attack in settings["attacks"]] for key in _ATTACK_KEYS)
    conditions = {
        "norm": report.norm,
        "tier": settings["tier"],
        "attack": attacks[0] if len(attacks) == 1 else attacks,
        "steps": steps[0] if len(steps) == 1 else steps,
        "restarts": restarts[0] if len(restarts) == 1 else restarts,
        "num_examples": len(report),
        "seed": settings["seed"],
    }
    if report.external:
        conditions["external"] = [f"{found.attack} ({found.source})" for found in report.external]
    common = {
        "task_type": "image-classification",
        "task_name": "Image Classification",
        "dataset_type": dataset.get("name") or "unknown",
        "dataset_name": dataset.get("name") or "unknown",
        "dataset_config": dataset.get("config"),
        "dataset_split": dataset.get("split"),
        "dataset_revision": dataset.get("revision"),
    }
    grid = [format_epsilon(epsilon) for epsilon in report.epsilons]
    measured = [ours == claimed for ours, claimed in zip(report.accuracies, report.claimed_accuracies, strict=True)]
    results = []
    for place, (epsilon, accuracy) in enumerate(zip(grid, report.claimed_accuracies, strict=True)):
        interval = _uncertainty(confidence_interval=report.accuracy_intervals[place], is_ours=measured[place])
        results.append(
            EvalResult(
                **common,
                metric_type="accuracy",
                metric_name="Accuracy" if epsilon == "0" else f"Accuracy at {NORM_NAMES[report.norm]} {epsilon}",
                metric_value=accuracy,
                metric_args={"epsilon": epsilon, **conditions, **interval},
            )
        )
    expected = EvalResult(
        **common,
        metric_type="expected_robustness",
        metric_name=f"Expected robustness, {NORM_NAMES[report.norm]} up to {grid[-1]}",
        metric_value=report.claimed_expected_robustness,
        metric_args={
            "epsilon": grid[-1],
            "epsilons": grid,
            **conditions,
            **_uncertainty(
                confidence_interval=report.confidence_interval, bounds=report.bracket, is_ours=all(measured)
            ),
        },
    )
    others = report.profile.norms.values() if report.profile else ()
    return [*results, expected, *(result for other in others for result in eval_results(other))]


def _uncertainty(*, is_ours: bool, **bounds: Sequence[float]) -> dict[str, list[float]]:
    """Of a number that was measured here; those of an external evaluation are not known."""
    return {name: list(values) for name, values in bounds.items()} if is_ours else {}


_ATTACK_KEYS = ("attack", "steps", "restarts")


def _is_ours(result: EvalResult) -> bool:
    return result.metric_type == "expected_robustness" or "norm" in (result.metric_args or {})


def check_card(card: ModelCard, report: RobustnessReport, *, name: str) -> None:
    """Refuse a card whose numbers lack their threat model, or are not the report's.

    Raises:
        ValueError: naming the entry.
    """
    remedy = "Write the card again with `hf_rft.hub.attach_report`."
    stated = {}
    for result in cast(ModelCardData, card.data).eval_results or []:
        arguments = result.metric_args or {}
        if not _is_ours(result):
            continue
        if not arguments.get("norm") or not arguments.get("epsilon"):
            raise ValueError(
                f"The card of {name} states {result.metric_type} {result.metric_value} without a threat model (norm "
                f"and epsilon); such a number means nothing. {remedy}"
            )
        stated[result.metric_type, arguments["norm"], str(arguments["epsilon"])] = result.metric_value
    for result in eval_results(report):
        arguments = result.metric_args or {}
        key = (result.metric_type, arguments["norm"], arguments["epsilon"])
        if key not in stated:
            raise ValueError(
                f"The card of {name} lacks the threat model and the number of its report: {' '.join(key)}. {remedy}"
            )
        if not math.isclose(stated[key], result.metric_value, abs_tol=1e-6):
            raise ValueError(
                f"The card of {name} states {' '.join(key)}: {stated[key]}, its report {result.metric_value}. {remedy}"
            )


# --- For people ---


@dataclass(frozen=True)
class Progress:
    """How far along its schedule a training came, and which weights it kept. Epsilons are the largest so far."""

    planned_steps: int = 0
    steps: int = 0
    epsilon: float = 0.0
    kept_step: int = 0
    kept_epsilon: float = 0.0


@dataclass(frozen=True)
class Training:
    """What a card says about a training.

    Args:
        arguments (`Mapping`):
            Threat model, attack, loss and schedule, by their names in [`RobustTrainingArguments`]; JSON values.
        progress ([`Progress`], *optional*):
            Defaults to no step at all.
        best_by (`str`, *optional*):
            The metric by which the kept checkpoint was chosen.
        onset (`str`, *optional*):
            What [`describe_onset`] wrote.
        alarms (`Mapping`, *optional*):
            Name and message of the alarms that went off; None if there was no training.
        command (`str`, *optional*):
            The command that trained the model.
        schedule_plot (`str`, *optional*):
            File name of the picture of epsilon over steps.
        base (`str`, *optional*):
            In words, what was fine-tuned, if it is not on the Hub.
        adapter (`str`, *optional*):
            What the weights are, if they are not those of a whole model, such as `"an adapter of the kind LORA"`.
        versions (`Mapping`, *optional*):
            Of the packages.
    """

    arguments: Mapping[str, Any]
    progress: Progress = Progress()
    best_by: str | None = None
    onset: str | None = None
    alarms: Mapping[str, str] | None = None
    command: str | None = None
    schedule_plot: str | None = None
    base: str | None = None
    adapter: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


def make_card(
    existing: ModelCard | None = None,
    *,
    name: str,
    report: RobustnessReport | None = None,
    curve: str | None = None,
    training: Training | None = None,
    model_id: str | None = None,
    base_model: str | None = None,
    is_adapter: bool = False,
    dataset: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> ModelCard:
    """The card of a model.

    Args:
        existing (`ModelCard`, *optional*):
            The card so far. Its text stays but for the parts between hf_rft comments; one without such a part gets it
            at the end, except for the summary, the claim and how to use the model. A template that nobody filled in is
            replaced.
        name (`str`):
            The title of a new card.
        report ([`RobustnessReport`], *optional*):
            Evidence. Its entries in `model-index` replace those of an earlier report; others stay. Without one, no
            robustness is claimed any more.
        curve (`str`, *optional*):
            File name of the picture of the curve.
        training ([`Training`], *optional*):
            None: the part about training stays as it is.
        model_id (`str`, *optional*):
            Repository or folder from which the card's code loads the model. Defaults to the report's name for it, or
            `name`.
        base_model (`str`, *optional*):
            The repository of the model that was fine-tuned.
        is_adapter (`bool`, *optional*, defaults to `False`):
            Whether the weights are an adapter's, which peft loads, not `pipeline`.
        dataset (`str`, *optional*):
            What it was fine-tuned on.
        metadata (`Mapping`, *optional*):
            Further entries of the front matter, such as `license`; tags are added to those that are there.
    """
    model_id = model_id or (report.settings.get("model", {}).get("name") if report else None) or name
    facts = {"name": name, "report": report, "curve": curve, "training": training, "model_id": model_id}
    text = _rendered(**facts, base_model=base_model, is_adapter=is_adapter, dataset=dataset)
    card = ModelCard("---\n{}\n---\n" if existing is None else existing.content, ignore_metadata_errors=True)
    data = cast(ModelCardData, card.data)
    if existing is None or _UNFILLED.search(card.text):
        card.text = text
        data.eval_results = None
    else:
        card.text = _with_parts_of(card.text, text, keep=() if training else ("summary", "training"))
    _forget_paths(data)
    given = {key: value for key, value in (metadata or {}).items() if value is not None}
    tags = [*(data.tags or []), *given.pop("tags", []), *TAGS]
    data.tags = list(dict.fromkeys(tags))
    for key, value in {"base_model": base_model, **given}.items():
        if value is not None:
            data[key] = value
    # With these `pipeline(model=...)` knows what to do.
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or "image-classification"
    others = [result for result in data.eval_results or [] if not _is_ours(result)]
    data.eval_results = [*others, *(eval_results(report) if report else [])] or None
    if data.eval_results:  # `model-index` belongs to a model with a name
        data.model_name = getattr(data, "model_name", None) or one_line(name)
    return card


# In the cards that `Trainer`, PEFT and huggingface_hub write: they ask to be proofread, and for this to be removed.
_UNFILLED = re.compile(r"model card has been generated automatically according to|^# Model Card for Model ID$", re.M)
_PART = re.compile(r"<!-- hf_rft: (?P<name>\w+) -->\n.*?<!-- hf_rft: end of (?P=name) -->", re.DOTALL)


def _forget_paths(data: ModelCardData) -> None:
    """peft names the base model by its path on this machine."""
    base = data.base_model
    if isinstance(base, str) and (os.path.isabs(base) or os.path.isdir(base)):
        data.base_model = None
        data.tags = [tag for tag in data.tags or [] if not tag.endswith(f":{base}")]


def describe_robustness(report: RobustnessReport, curve: str | None = None) -> str:
    """The part about robustness alone, without its comments."""
    text = make_card(name="", report=report, curve=curve).text
    part = next(part[0] for part in _PART.finditer(text) if part["name"] == "robustness")
    return "\n".join(part.splitlines()[1:-1]).strip()


def _with_parts_of(text: str, rendered: str, keep: Sequence[str]) -> str:
    """The text with each part as it was rendered: in place of the one that is there, or at the end."""
    parts = {part["name"]: part[0] for part in _PART.finditer(rendered) if part["name"] not in keep}
    text = _PART.sub(lambda part: parts.pop(part["name"], part[0]), text)
    parts = {name: part for name, part in parts.items() if name not in ("summary", "claim", "use")}  # the author wrote
    return "\n\n".join([text.rstrip(), *parts.values()]) + "\n"


def _rendered(**facts) -> str:
    text = _template().render(**facts)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


@functools.cache
def _template():
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Of a name: the part would seem to end there.
        finalize=lambda value: value.replace("<!--", "< !--") if isinstance(value, str) else value,
    )
    environment.filters |= {
        "code": code,
        "code_to_reproduce": code_to_reproduce,
        "described_class": describe_class,
        "epsilon": format_epsilon,
        "interval": lambda bounds: f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %",
        "norm": NORM_NAMES.__getitem__,
        "percent": lambda share: f"{100 * share:.1f} %",
        "plain": plain,
        "profile_rows": profile_rows,
        "quoted": quoted,
        "towards": lambda epsilon, target: format_approximately(epsilon, parse_epsilon(target)),
        "versions": lambda versions: ", ".join(f"{package} {version}" for package, version in versions.items()),
        "yaml": lambda values: yaml.safe_dump(dict(values), sort_keys=False),
    }
    return environment.get_template("model_card_template.md")
