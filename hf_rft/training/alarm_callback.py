"""The callback that watches a run: it probes the model, records the onset of adaptation, and raises the alarms."""

import functools
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
    """Probes the model now and then, records the onset of adaptation, and raises the alarms.

    Every [`RobustTrainer`] has one; `trainer.remove_callback(AlarmCallback)` removes it. It reads its state from the
    log history when training begins, so a resumed run repeats nothing.

    Args:
        trainer ([`RobustTrainer`]):
            The trainer to watch.
    """

    def __init__(self, trainer: Any):
        self._trainer, self._probe = trainer, Probe(trainer)
        self._run: Run | None = None  # None outside training
        self._known: set[str] = set()  # names of the alarms raised so far, and "onset"

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        dataset, schedule = self._trainer.eval_dataset, self._trainer.epsilon_callback
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()), None)
        self._run = Run(
            num_classes=self._trainer.model.config.num_labels,
            chance_loss=functools.cache(self._chance_loss),
            max_steps=state.max_steps,
            num_epochs=1 if is_stream(state) else state.num_train_epochs,
            num_eval_examples=len(dataset) if hasattr(dataset, "__len__") else None,
            prefix=eval_prefix(self._trainer),
            epsilon_grows=schedule is not None and schedule.grows(state),
        )
        self._known = set(recorded_alarms(state.log_history))
        if any("adaptation_onset" in entry for entry in state.log_history):
            self._known.add("onset")

    # Between two steps, after the log and checkpoint of the previous one: a run resumed there makes the same probe.
    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # Not before the first step: a new head that starts at zero has zero gradients.
        if state.global_step > 0 and state.global_step % probe_interval(state.max_steps, state.num_train_epochs) == 0:
            self._make_probe()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step >= state.max_steps:  # no further step begins
            self._make_probe()

    def _make_probe(self) -> None:
        if metrics := self._probe():
            self._record(metrics)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if self._run is None or logs is None:  # the user called `evaluate` before or after training
            return
        if f"{self._run.prefix}_accuracy" in logs and "onset" not in self._known:
            onset = find_onset(state.log_history, self._run.num_classes, self._run.prefix)
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
                self._trainer.interruption.request(AlarmRaised(alarm.message))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._run = None

    @torch.no_grad()
    def _chance_loss(self) -> float:
        """The training loss of a model that gives every class the same probability."""
        trainer, args = self._trainer, self._trainer.args
        num_classes = trainer.model.config.num_labels
        labels = torch.arange(min(num_classes, 32), device=args.device)
        logits = torch.zeros(len(labels), num_classes, device=args.device)
        options = {"weight": args.robust_loss_weight, "label_smoothing": args.label_smoothing_factor}
        return trainer.robust_loss(logits, logits, labels, **options).mean().item()

    def _record(self, metrics: dict[str, float], message: str | None = None) -> None:
        """Log numbers. The message goes into the history only, since loggers expect numbers."""
        trainer = self._trainer
        position, should_log = len(trainer.state.log_history), trainer.control.should_log
        trainer.log(metrics)
        trainer.control.should_log = should_log  # this was not the training log that is due
        if message is not None:
            trainer.state.log_history[position]["message"] = message
