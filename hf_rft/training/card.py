"""The model card of a training run: what was trained, what the kept weights have seen, how robust they are."""

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, try_to_load_from_cache
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..attacks.base import attack_name
from ..data import bundled
from ..evaluation.plots import plot_epsilon_schedule
from ..evaluation.provenance import describe_dataset, versions
from ..hub.download import is_on_hub
from ..hub.evidence import CARD_NAME, CURVE_NAME, write_evidence
from ..hub.model_card import Progress, Training, make_card
from ..losses import LOSSES
from ..models.adapters import adapter_tags, describe_adapter, is_adapted
from ..utils.files import replacing, write_text
from .alarms import recorded_alarms
from .onset import describe_onset, eval_prefix


logger = logging.get_logger(__name__)

SCHEDULE_PLOT_NAME = "epsilon_schedule.png"

_OPTIMISATION = [
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "warmup",
    "weight_decay",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "label_smoothing_factor",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
    "world_size",
]

# Of our own arguments; what was measured is in the report.
_NOT_ABOUT_THE_WEIGHTS = {
    "best_model_at_any_epsilon",
    "abort_on_alarm",
    "hub_timeout",
    "resume",
    "save_adversarial_examples",
}


def write_card(
    trainer: Any,
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
) -> None:
    """Write README.md into the output folder, with robustness.json and its curve, and how the model was trained.

    Takes the arguments of [`~transformers.Trainer.create_model_card`]; `tasks` and `dataset_args` say nothing that the
    card does not say by itself. `robustness_report` is left out if it is not about the weights in the output folder.
    """
    folder = Path(trainer.args.output_dir)
    path, name = folder / CARD_NAME, folder.resolve().name
    existing = ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else None
    report = None
    if trainer.robustness_report is not None:
        try:
            report = write_evidence(folder, trainer.robustness_report, name=trainer.hub_model_id)
        except ValueError as error:
            logger.warning("The model card states no robustness: %s", error)
    started_from = finetuned_from or getattr(trainer.model.config, "_name_or_path", None) or ""
    base_model, base = (started_from, None) if is_on_hub(started_from) else (None, _in_words(started_from))
    # Evaluated again, after another run trained and saved it: that run's words stay.
    is_saved_model = Path(started_from).resolve() == folder.resolve() and trainer.state.global_step == 0
    described = describe_dataset(trainer.train_dataset)
    if dataset_tags is None and described["revision"] is not None:
        dataset_tags = described["name"]
    dataset = dataset or dataset_tags or described["name"]
    card = make_card(
        existing,
        name=model_name or name,
        report=report,
        curve=CURVE_NAME,
        training=None if is_saved_model else _describe_training(trainer, folder, base),
        model_id=trainer.hub_model_id or name,
        base_model=base_model,
        is_adapter=is_adapted(trainer.model),
        dataset=", ".join(_listed(dataset)) or None,
        metadata={
            "language": language,
            "license": license or _license_of(started_from),
            "tags": [*_listed(tags), *adapter_tags(trainer.model), "generated_from_trainer"],
            "datasets": _listed(dataset_tags) or None,
            "library_name": "peft" if is_adapted(trainer.model) else None,
        },
    )
    write_text(path, card.content)


def _describe_training(trainer: Any, folder: Path, base: str | None) -> Training:
    history, progress, num_classes = trainer.state.log_history, _progress(trainer), trainer.model.config.num_labels
    return Training(
        described_arguments(trainer),
        progress,
        best_by=trainer.args.metric_for_best_model,
        onset=describe_onset(history, num_classes, eval_prefix(trainer)),
        alarms=recorded_alarms(history) if progress.steps > 0 else None,
        command=trainer.command,
        schedule_plot=_write_schedule_plot(trainer, folder, progress),
        base=base,
        adapter=describe_adapter(trainer.model),
        versions=versions(),
    )


def _listed(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _in_words(started_from: str) -> str | None:
    """What training started from, if that is not on the Hub; without any path of this machine."""
    if bundled.is_model(started_from):
        return "EfficientNet-Lite0 with ImageNet weights"
    if not os.path.isdir(started_from):
        return None
    state = Path(started_from, TRAINER_STATE_NAME)
    if state.is_file():  # a checkpoint
        step = json.loads(state.read_text(encoding="utf-8")).get("global_step")
        return f"a checkpoint of an earlier training (step {step}), about which this card knows nothing else"
    return None


def _license_of(started_from: str) -> str | None:
    """The license of the base model, if its card is on this machine."""
    path = Path(started_from, CARD_NAME)
    if is_on_hub(started_from):
        path = Path(str(try_to_load_from_cache(started_from, CARD_NAME)))  # "None" or an object if it is not there
    return ModelCard.load(path, ignore_metadata_errors=True).data.get("license") if path.is_file() else None


def described_arguments(trainer: Any) -> dict[str, Any]:
    """What made the model robust, and the optimisation around it; JSON values."""
    inherited = {field.name for field in fields(TrainingArguments)}
    own = [field.name for field in fields(trainer.args) if field.name not in inherited]
    own = [name for name in own if not name.startswith("eval_") and name not in _NOT_ABOUT_THE_WEIGHTS]
    values = trainer.args.to_dict()
    # Where a function was passed, the argument says nothing.
    values["attack"] = attack_name(trainer.adversary.attack)
    if trainer.robust_loss is not LOSSES[trainer.args.robust_loss]:
        values["robust_loss"] = attack_name(trainer.robust_loss.function)
    if trainer.has_own_schedule:
        values |= {"epsilon_schedule_type": "custom", "epsilon_schedule_kwargs": None}
    values["world_size"] = trainer.args.world_size
    if 0 < values["warmup_steps"] < 1:
        values["warmup"] = f"{100 * values.pop('warmup_steps'):g} % of the steps"
    if values["max_steps"] > 0:
        del values["num_train_epochs"]  # it does not count
    else:
        del values["max_steps"]
    if values["weight_averaging"] is None:
        values["ema_decay"] = None
    for name in ("head_warmup_steps", "mixup_alpha", "cutmix_alpha"):
        values[name] = values[name] or None  # 0: off
    if values["awp_gamma"] is None:
        values["awp_warmup_steps"] = None
    stated = [name for name in own if values[name] is not None]
    return {name: values[name] for name in [*stated, *(name for name in _OPTIMISATION if values.get(name))]}


def _progress(trainer: Any) -> Progress:
    """What was trained, and which weights the model now has."""
    state = trainer.state
    if state.global_step == 0:
        return Progress()
    has_best = trainer.args.load_best_model_at_end and state.best_model_checkpoint and not trainer.is_in_train
    kept_step = cast(int, state.best_global_step) if has_best else state.global_step
    steps = [*_drawn_steps(trainer), kept_step - 1, state.global_step - 1]
    epsilons = {step: _epsilon_after(trainer, step) for step in steps if step < state.global_step}
    return Progress(
        planned_steps=state.max_steps,
        steps=state.global_step,
        epsilon=max(epsilons.values()),
        kept_step=kept_step,
        kept_epsilon=max(epsilon for step, epsilon in epsilons.items() if step < kept_step),
    )


def _drawn_steps(trainer: Any) -> list[int]:
    last = trainer.state.max_steps
    return sorted({round(share * last / 200) for share in range(201)} | {trainer.state.global_step})


def _epsilon_after(trainer: Any, step: int) -> float:
    """Epsilon of the training step that came, or would have come, after `step` steps."""
    callback, done = trainer.epsilon_callback, trainer.state
    if not trainer.robust_loss.needs_adversarial:
        return 0.0
    if callback is None:
        return float(trainer.threat_model.epsilon)
    state = replace(
        done,
        global_step=step,
        epoch=round((done.epoch or 0.0) * step / done.global_step, 6),
        log_history=[entry for entry in done.log_history if entry.get("step", 0) <= step],
    )
    return callback.multiplier(state) * float(trainer.threat_model.epsilon)


def _write_schedule_plot(trainer: Any, folder: Path, progress: Progress) -> str | None:
    """Epsilon over the steps that were planned, with those that were trained and the kept one."""
    if progress.steps == 0 or not trainer.robust_loss.needs_adversarial:
        return None
    steps = _drawn_steps(trainer)
    epsilons = [_epsilon_after(trainer, step) for step in steps]
    with replacing(folder / SCHEDULE_PLOT_NAME) as scratch:
        plot_epsilon_schedule(
            steps,
            epsilons,
            trainer.threat_model,
            scratch,
            done=(progress.steps, progress.epsilon),
            kept=(progress.kept_step, progress.kept_epsilon),
            epochs=(trainer.state.epoch or 0.0) * trainer.state.max_steps / progress.steps,
        )
    return SCHEDULE_PLOT_NAME
