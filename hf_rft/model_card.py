"""The model card: what a robust model claims, for people (text) and for machines (`model-index`).

Each part that hf_rft writes stands between two comments, and is replaced when it is written again; all other text
stays as it is.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .evaluation.report import RobustnessReport
from .markdown import code, one_line, plain
from .onset import evaluations, find_onset
from .threat_model import format_approximately, format_epsilon, parse_epsilon


TAGS = ["image-classification", "adversarial-robustness", "robust-fine-tuning", "hf_rft"]

NORM_NAMES = {"linf": "L-infinity", "l2": "L2", "l1": "L1"}

CITATION = r"""```bibtex
@inproceedings{ngnawe2026robust,
  title={Robust Fine-Tuning from Non-Robust Pretrained Models: Mitigating Suboptimal Transfer With Epsilon-Scheduling},
  author={Ngnaw{\'e}, Jonas and Heuillet, Maxime and Sahoo, Sabyasachi and Pequignot, Yann and Ahmad, Ola and
          Durand, Audrey and Precioso, Fr{\'e}d{\'e}ric and Gagn{\'e}, Christian},
  booktitle={International Conference on Learning Representations},
  year={2026}
}
```"""


# --- For machines ---


def eval_results(report: RobustnessReport) -> list[EvalResult]:
    """The entries of `model-index`: the accuracy at each epsilon, and expected robustness.

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
    results = [
        EvalResult(
            **common,
            metric_type="accuracy",
            metric_name=f"Accuracy at {report.norm} {epsilon}",
            metric_value=accuracy,
            metric_args={"epsilon": epsilon, **conditions, "confidence_interval": list(interval)},
        )
        for epsilon, accuracy, interval in zip(grid, report.accuracies, report.accuracy_intervals, strict=True)
    ]
    expected = EvalResult(
        **common,
        metric_type="expected_robustness",
        metric_name=f"Expected robustness, {report.norm} up to {grid[-1]}",
        metric_value=report.expected_robustness,
        metric_args={
            "epsilon": grid[-1],
            "epsilons": grid,
            **conditions,
            "confidence_interval": list(report.confidence_interval),
            "bounds": list(report.bracket),
        },
    )
    return [*results, expected]


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


def describe_robustness(report: RobustnessReport, curve: str | None = None) -> str:
    """The section about robustness.

    Args:
        curve (`str`, *optional*):
            File name of the picture of the curve.
    """
    settings, grid = report.settings, [format_epsilon(epsilon) for epsilon in report.epsilons]
    norm = NORM_NAMES[report.norm]
    rows = zip(grid, report.accuracies, report.accuracy_intervals, strict=True)
    table = ["| epsilon | accuracy | 95 % interval |", "| --- | --- | --- |"]
    table += [f"| {epsilon} | {_percent(accuracy)} | {_interval(interval)} |" for epsilon, accuracy, interval in rows]
    low, high = report.bracket
    parts = [
        "## Robustness",
        f"Threat model: an attacker who knows the model may change each image by at most epsilon in the **{norm}** "
        f"norm (pixels scaled to [0, 1]). **Expected robustness** up to {grid[-1]}, the mean accuracy over epsilon: "
        f"**{_percent(report.expected_robustness)}** (95 % interval {_interval(report.confidence_interval)}).",
        "\n".join(table),
    ]
    if curve:
        parts.append(f"![Accuracy over epsilon]({curve})")
    parts += [
        f"Measured on {len(report)} examples ({_dataset(settings.get('dataset', {}))}) with the tier "
        f"{code(settings['tier'])}: {plain(_attacks(settings['attacks']))}; seed {plain(settings['seed'])}. An "
        "example counts only if the model is right on it clean and under every attack. Any curve through these points "
        f"has a mean between {_percent(low)} and {_percent(high)}.",
        *([_NOT_HELD_OUT] if settings.get("dataset", {}).get("is_held_out") is False else []),
        "### Trust checks",
        _flags(report.flags),
        "### Limits of the claim",
        "The accuracies are upper bounds: a stronger attack may break more examples. They hold for this norm, up to "
        f"epsilon {grid[-1]}, and for images like those measured; nothing is said about other changes (rotations, "
        "patches, weather), other data, or an attacker who changes the training data."
        + ("" if settings["tier"] in ("standard", "full") else _WEAK_TIER),
        "### Reproduce the numbers",
        _reproduce(report),
    ]
    return "\n\n".join(parts)


_NOT_HELD_OUT = (
    "**No test data were held out**: the numbers are from the validation images, by which checkpoints are compared "
    "during training. Expect lower ones on new images."
)

_WEAK_TIER = (
    " The attacks here are weaker than those usually asked of a claim (tier `standard`: APGD, then targeted APGD, 100 "
    "steps each): the numbers are optimistic."
)


class Progress(NamedTuple):
    """How far along its schedule a training came, and which weights it kept. Epsilons are the largest so far."""

    planned_steps: int
    steps: int
    epsilon: float
    kept_step: int
    kept_epsilon: float


def describe_training(
    arguments: Mapping[str, Any],
    *,
    progress: Progress | None = None,
    best_by: str | None = None,
    adaptation: str | None = None,
    alarms: Mapping[str, str] | None = None,
    command: str | None = None,
    schedule_plot: str | None = None,
) -> str:
    """The section about robust fine-tuning.

    Args:
        arguments (`Mapping`):
            Threat model, attack, loss and schedule, by their names in [`RobustTrainingArguments`]; JSON values.
        progress ([`Progress`], *optional*):
            Of the training. None: it went as the arguments say.
        best_by (`str`, *optional*):
            The metric by which the kept checkpoint was chosen.
        adaptation (`str`, *optional*):
            What [`describe_onset`] wrote.
        alarms (`Mapping`, *optional*):
            Name and message of the alarms that went off in training; None if there was no training.
        command (`str`, *optional*):
            The command that trained the model.
        schedule_plot (`str`, *optional*):
            File name of the picture of epsilon over steps.
    """
    parts = ["## Robust fine-tuning", *_what_ran(arguments, progress, best_by)]
    if schedule_plot:
        parts.append(f"![Epsilon over training steps]({schedule_plot})")
    if adaptation:
        parts.append(
            f"Onset of task adaptation (the epoch whose validation accuracy shows first learning): {adaptation}."
        )
    if alarms is not None:
        parts.append("Alarms in training:" + (f"\n\n{_flags(alarms)}" if alarms else " none."))
    if command:
        parts.append(f"```bash\n{command}\n```")
    parts.append("```yaml\n" + yaml.safe_dump(dict(arguments), sort_keys=False) + "```")
    return "\n\n".join(parts)


def _what_ran(arguments: Mapping[str, Any], progress: Progress | None, best_by: str | None) -> list[str]:
    """What the weights have been trained against, which may be less than was planned."""
    target = parse_epsilon(arguments["epsilon"])
    if progress is None:
        progress = Progress(1, 1, float(target), 1, float(target))
    if progress.steps == 0:
        return ["No training step was taken; these are the settings."]
    reached, seen = (format_approximately(epsilon, target) for epsilon in (progress.epsilon, progress.kept_epsilon))
    steps = f"{arguments['attack_steps']}-step"
    if arguments.get("attack_steps_schedule", "constant") != "constant":
        steps = f"{steps} (fewer while epsilon was smaller)"
    method = (
        f"loss `{arguments['robust_loss']}`, schedule `{arguments['epsilon_schedule_type']}` "
        "([Epsilon-Scheduling](https://huggingface.co/papers/2509.23325))"
    )
    is_as_planned = seen == format_epsilon(target)
    if seen == "0":
        first = f"Trained with hf_rft, but **without any attack**: epsilon was 0 all along; {method}."
    else:
        upto = f"up to {seen}" if is_as_planned else f"up to **{seen}** (target: {arguments['epsilon']})"
        first = (
            f"Trained with hf_rft against {NORM_NAMES[arguments['norm']]} perturbations {upto}: {steps} "
            f"`{arguments['attack']}`, {method}."
        )
    then = []
    if progress.steps < progress.planned_steps:
        then.append(
            f"Training stopped after {progress.steps} of {progress.planned_steps} steps, with epsilon at {reached}."
        )
    if progress.kept_step != progress.steps:
        chosen = f", the best checkpoint by `{best_by}`" if best_by else ""
        then.append(
            f"The weights are those after step {progress.kept_step} of {progress.planned_steps}{chosen}; until then "
            f"epsilon had been at most {seen}."
        )
    return [first, " ".join(then)] if then else [first]


def describe_onset(history: Sequence[Mapping[str, Any]], num_classes: int, prefix: str = "eval") -> str:
    """In which epoch a run began to learn its task, by its `log_history`."""
    onset = find_onset(history, num_classes, prefix)
    if onset is not None:
        return f"epoch {onset}"
    return "never (transfer failure)" if evaluations(history, prefix) else "not measured"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(bounds: tuple[float, float]) -> str:
    low, high = bounds
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def _attacks(attacks: list[dict[str, Any]]) -> str:
    return ", then ".join(
        f"{attack['attack']} ({attack['steps']} steps"
        + (f", {attack['restarts']} restarts)" if attack["restarts"] > 1 else ")")
        for attack in attacks
    )


def _dataset(dataset: Mapping[str, Any]) -> str:
    words = [code(dataset.get("name") or "unknown")]
    words += [f"{key} {code(dataset[key])}" for key in ("config", "split", "revision") if dataset.get(key)]
    return ", ".join(words)


def _flags(flags: Mapping[str, str] | None) -> str:
    if flags is None:
        return (
            "Not made. `evaluate_robustness` looks for masked gradients, random outputs, wrong pixel scaling and "
            "other reasons to distrust the numbers."
        )
    if not flags:
        return (
            "Passed: no sign of masked gradients, random outputs or wrong pixel scaling; the attacks break (nearly) "
            "every example at a huge epsilon, and get stronger with it."
        )
    return "\n".join(f"- **{plain(name)}**: {plain(message)}" for name, message in flags.items())


def _reproduce(report: RobustnessReport) -> str:
    settings = report.settings
    attacks = [tuple(attack[key] for key in _ATTACK_KEYS) for attack in settings["attacks"]]
    tier = settings["tier"] if settings["tier"] != "custom" else attacks
    grid = [format_epsilon(epsilon) for epsilon in report.epsilons]
    versions = ", ".join(f"{package} {version}" for package, version in settings.get("versions", {}).items())
    data = settings.get("dataset", {}).get("sha256")
    return f"""```python
from hf_rft import evaluate_robustness, load_robust_model

model, processor, report = load_robust_model({settings["model"].get("name", "this model")!r})
again = evaluate_robustness(
    model,
    dataset,  # the examples named above
    processor,
    norm={report.norm!r},
    epsilons={grid!r},
    tier={tier!r},
    seed={settings["seed"]!r},
)
```

Versions: {plain(versions)}.""" + (f" Hash of the examples: {code(data)}." if data else "")


# --- Both ---


def update_card(
    card: ModelCard, report: RobustnessReport | None = None, *, training: str | None = None, curve: str | None = None
) -> None:
    """Put robustness, training and citation into the card; parts that are not given stay as they are.

    Args:
        card (`ModelCard`):
            Changed in place.
        report ([`RobustnessReport`], *optional*):
            Evidence. Its entries replace those of an earlier report; others in `model-index` stay.
        training (`str`, *optional*):
            What [`describe_training`] wrote.
        curve (`str`, *optional*):
            File name of the picture of the curve.
    """
    data = cast(ModelCardData, card.data)
    tags = data.tags or []
    data.tags = [*tags, *(tag for tag in TAGS if tag not in tags)]
    # With these `pipeline(model=...)` knows what to do.
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or "image-classification"
    if report is not None:
        # `model-index` belongs to a model with a name.
        data.model_name = getattr(data, "model_name", None) or one_line(report.settings["model"].get("name", "model"))
        others = [result for result in data.eval_results or [] if not _is_ours(result)]
        data.eval_results = [*others, *eval_results(report)]
        card.text = _with_part(card.text, "robustness", describe_robustness(report, curve))
    if training is not None:
        card.text = _with_part(card.text, "training", training)
    card.text = _with_part(card.text, "citation", f"## Citation\n\n{CITATION}")


def _with_part(text: str, name: str, part: str) -> str:
    """The text with the part between its two comments: in place of the one that is there, or at the end."""
    begin, end = f"<!-- hf_rft: {name} -->", f"<!-- hf_rft: end of {name} -->"
    part = part.replace("<!--", "< !--")  # of a name: the part would seem to end there
    block = f"{begin}\n\n{part}\n\n{end}"
    known = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if known.search(text):
        return known.sub(lambda _: block, text, count=1)
    return f"{text.rstrip()}\n\n{block}\n".lstrip("\n")
