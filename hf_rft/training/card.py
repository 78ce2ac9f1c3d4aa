"""The model card of a training run: what was trained, what the kept weights have seen, how robust they are."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments
from transformers.modelcard import TrainingSummary, make_markdown_table
from transformers.utils import logging

from ..attacks.base import attack_name
from ..evaluation.plots import plot_epsilon_schedule
from ..evaluation.provenance import versions
from ..hub.evidence import CARD_NAME, CURVE_NAME, write_evidence
from ..hub.model_card import Progress, Training, make_card
from ..losses import LOSSES
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
    "weight_decay",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "label_smoothing_factor",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
]


def write_card(trainer: Any, *args, **kwargs) -> None:
    """Write README.md into the output folder, with robustness.json and its curve, and how the model was trained.

    Takes the arguments of [`~transformers.Trainer.create_model_card`]. `robustness_report` is left out if it is not
    about the weights in the output folder.
    """
    summary = TrainingSummary.from_trainer(trainer, *args, **kwargs)
    if not _is_repo_id(summary.finetuned_from):  # a folder, gone in the meantime, or nothing at all
        summary.finetuned_from = None
    metadata = summary.create_metadata()
    for of_the_last_evaluation in ("model-index", "metrics"):  # numbers without a threat model
        metadata.pop(of_the_last_evaluation, None)
    folder = Path(trainer.args.output_dir)
    path = folder / CARD_NAME
    report = None
    if trainer.robustness_report is not None:
        try:
            report = write_evidence(folder, trainer.robustness_report, name=trainer.hub_model_id)
        except ValueError as error:
            logger.warning("The model card states no robustness: %s", error)
    history, progress, dataset = trainer.state.log_history, _progress(trainer), summary.dataset
    card = make_card(
        ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else None,
        name=summary.model_name,
        report=report,
        curve=CURVE_NAME,
        training=Training(
            described_arguments(trainer),
            progress,
            best_by=trainer.args.metric_for_best_model,
            onset=describe_onset(history, trainer.model.config.num_labels, eval_prefix(trainer)),
            alarms=recorded_alarms(history) if trainer.state.global_step > 0 else None,
            command=trainer.command,
            schedule_plot=_write_schedule_plot(trainer, folder, progress),
            history=make_markdown_table(summary.eval_lines),
            versions=versions(),
        ),
        base_model=summary.finetuned_from,
        dataset=dataset if isinstance(dataset, str | None) else ", ".join(dataset),
        metadata=metadata,
    )
    write_text(path, card.content)


def described_arguments(trainer: Any) -> dict[str, Any]:
    """What made the model robust, and the optimisation around it; JSON values."""
    inherited = {field.name for field in fields(TrainingArguments)}
    own = [field.name for field in fields(trainer.args) if field.name not in inherited | {"hub_timeout"}]
    values = trainer.args.to_dict()
    # Where a function was passed, the argument says nothing.
    values["attack"] = attack_name(trainer.adversary.attack)
    if trainer.robust_loss is not LOSSES[trainer.args.robust_loss]:
        values["robust_loss"] = attack_name(trainer.robust_loss.function)
    if trainer.has_own_schedule:
        values |= {"epsilon_schedule_type": "custom", "epsilon_schedule_kwargs": None}
    values["world_size"] = trainer.args.world_size
    return {name: values[name] for name in [*own, *_OPTIMISATION, "world_size"] if values.get(name) is not None}


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
        )
    return SCHEDULE_PLOT_NAME


def _is_repo_id(name: str | None) -> bool:
    try:
        validate_repo_id(name or "")
    except ValueError:
        return False
    return True
