"""The callback that watches a run: it probes the model, records the onset of adaptation, and sounds the alarms."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..schedules import is_stream
from .alarms import Run, alarm_entry, detect, recorded_alarms
from .interruption import AlarmRaised
from .onset import eval_prefix, find_onset
from .probe import Probe, probe_interval


logger = logging.get_logger(__name__)


class AlarmCallback(TrainerCallback):
    """Probes the model now and then, records the onset of adaptation, and sounds the alarms.

    [`RobustTrainer`] has one; `trainer.remove_callback(AlarmCallback)` does without. What it knows it reads from the
    history when training begins, so a resumed run repeats nothing.

    Args:
        num_classes, chance_loss, num_eval_examples, prefix, epsilon_grows:
            See [`Run`].
        probe (`Callable`):
            Returns what [`hf_rft.training.probe.Probe`] does: shares under names that begin with `probe_`, the same on
            all processes; an empty dictionary if there is nothing to probe.
        record (`Callable`):
            `(metrics, message=None)`: logs numbers, and adds a text to the entry in the history.
        interrupt (`Callable`):
            Asked to end training, with the error to raise, if `args.abort_on_alarm`.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        chance_loss: Callable[[], float],
        probe: Callable[[], dict[str, float]],
        record: Callable[..., None],
        interrupt: Callable[[AlarmRaised], None],
        num_eval_examples: int | None = None,
        prefix: str = "eval",
        epsilon_grows: Callable[[], bool] | None = None,
    ):
        self._num_classes, self._chance_loss = num_classes, functools.cache(chance_loss)
        self._num_eval_examples, self._prefix = num_eval_examples, prefix
        self._epsilon_grows = epsilon_grows
        self._probe, self._record, self._interrupt = probe, record, interrupt
        self._run: Run | None = None  # while training
        self._known: set[str] = set()  # names of the alarms that went off, and "onset"

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._run = Run(
            self._num_classes,
            self._chance_loss,
            state.max_steps,
            1 if is_stream(state) else state.num_train_epochs,
            self._num_eval_examples,
            self._prefix,
            self._epsilon_grows,
        )
        self._known = set(recorded_alarms(state.log_history))
        if any("adaptation_onset" in entry for entry in state.log_history):
            self._known.add("onset")

    # Between two steps, after the log and the checkpoint of the one before: a run resumed there makes the same probe.
    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # Not before the first step: where a new head starts from zero, so does every gradient.
        if state.global_step > 0 and state.global_step % probe_interval(state.max_steps, state.num_train_epochs) == 0:
            self._make_probe()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step >= state.max_steps:  # no further step begins
            self._make_probe()

    def _make_probe(self) -> None:
        if metrics := self._probe():
            self._record(metrics)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if self._run is None or logs is None:  # an evaluation by hand, before or after training
            return
        if f"{self._prefix}_accuracy" in logs and "onset" not in self._known:
            onset = find_onset(state.log_history, self._num_classes, self._prefix)
            if onset is not None:
                self._known.add("onset")
                self._record({"adaptation_onset": onset})
        for alarm in detect(state.log_history, self._run, logs):
            if alarm.name in self._known:
                continue
            self._known.add(alarm.name)
            if state.is_world_process_zero:
                logger.warning(alarm.message)
            self._record(alarm_entry(alarm.name), message=alarm.message)
            if getattr(args, "abort_on_alarm", False):
                self._interrupt(AlarmRaised(alarm.message))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._run = None


def make_alarm_callback(trainer: Any) -> AlarmCallback:
    """The [`AlarmCallback`] of a [`RobustTrainer`]."""
    dataset, num_classes = trainer.eval_dataset, trainer.model.config.num_labels
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()), None)

    @torch.no_grad()
    def chance_loss() -> float:
        labels = torch.arange(min(num_classes, 32), device=trainer.args.device)
        logits = torch.zeros(len(labels), num_classes, device=trainer.args.device)
        args = trainer.args
        options = {"weight": args.robust_loss_weight, "label_smoothing": args.label_smoothing_factor}
        return trainer.robust_loss(logits, logits, labels, **options).mean().item()

    def record(metrics: dict[str, float], message: str | None = None) -> None:
        # A text is kept in the history only, for tools that read logs want numbers.
        position, should_log = len(trainer.state.log_history), trainer.control.should_log
        trainer.log(metrics)
        trainer.control.should_log = should_log  # the log that is due is another one
        if message is not None:
            trainer.state.log_history[position]["message"] = message

    return AlarmCallback(
        num_classes=num_classes,
        chance_loss=chance_loss,
        probe=Probe(trainer),
        record=record,
        interrupt=trainer.interruption.request,
        num_eval_examples=len(dataset) if hasattr(dataset, "__len__") else None,
        prefix=eval_prefix(trainer),
        epsilon_grows=lambda: trainer.epsilon_callback is not None and trainer.epsilon_callback.grows(trainer.state),
    )
