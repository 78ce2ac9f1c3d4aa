"""Callbacks of every run: the schedule of epsilon, and what `Trainer` leaves undone."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .checkpoints import why_incomplete
from .schedules import EpsilonSchedule, check_schedule, checked_multiplier


logger = logging.get_logger(__name__)


def is_stream(state: TrainerState) -> bool:
    """Whether the training dataset has no length, so that nobody knows how many epochs there will be."""
    return state.num_train_epochs >= sys.maxsize


def _steps_per_epoch(state: TrainerState) -> int:
    """Optimizer steps in an epoch: exactly once a step was taken, at most as many as there are before.

    `state.epoch` counts micro-batches, of which the last step of an epoch may have fewer. So within an epoch it lies
    on or above the share of completed steps, by less than one step.
    """
    if not state.epoch or not state.global_step:
        return math.ceil(state.max_steps / max(state.num_train_epochs, 1))
    return math.ceil(round(state.global_step / state.epoch, 6))


class EpsilonScheduleCallback(TrainerCallback):
    """Says which share of epsilon the next training step uses.

    It has no state: everything follows from [`~transformers.TrainerState`], which the checkpoint restores. The trainer
    asks the callback it holds before every step, so a subclass that overrides `multiplier` can do what a function of
    progress cannot; without any such callback epsilon is constant.

    Args:
        schedule (`Callable[[float], float]`):
            Maps progress in [0, 1] to a multiplier of epsilon.
        interval (`str`, *optional*, defaults to `"step"`):
            `"step"` measures progress in completed optimizer steps, `"epoch"` in completed epochs (the paper's
            staircase).

    Raises:
        ValueError: for an unknown interval, or a schedule that cannot be called with progress alone.
    """

    def __init__(self, schedule: EpsilonSchedule, interval: str = "step"):
        if interval not in ("step", "epoch"):
            raise ValueError(f"`epsilon_schedule_interval={interval!r}` is unknown; choose 'step' or 'epoch'.")
        check_schedule(schedule)
        self.schedule = schedule
        self.interval = interval

    def progress(self, state: TrainerState) -> float:
        """Share of training completed before the next step, in [0, 1]."""
        if state.max_steps <= 0:
            return 0.0
        if self.interval == "step":
            return min(state.global_step / state.max_steps, 1.0)
        # `state.num_train_epochs` is rounded up.
        epochs = min(state.num_train_epochs, state.max_steps / _steps_per_epoch(state))
        return min(math.floor(state.epoch or 0.0) / epochs, 1.0)

    def multiplier(self, state: TrainerState) -> float:
        """The schedule's value for the next step.

        Raises:
            ValueError: if the schedule returns something that is no number from 0 to 1.
        """
        progress = self.progress(state)
        return checked_multiplier(self.schedule(progress), progress)

    def multiplier_of_step(self, state: TrainerState, step: int) -> float:
        """The schedule's value for a step of this run, counted from 0."""
        return self.multiplier(replace(state, global_step=step, epoch=step / _steps_per_epoch(state)))

    def grows(self, state: TrainerState) -> bool:
        """Whether training begins with a smaller epsilon than it ends with."""
        return self.multiplier_of_step(state, 0) < self.multiplier_of_step(state, state.max_steps - 1)

    def is_final(self, state: TrainerState) -> bool:
        """Whether the last step that was taken had the epsilon with which training ends."""
        multipliers = (self.multiplier_of_step(state, step) for step in (state.global_step - 1, state.max_steps - 1))
        return math.isclose(*multipliers, rel_tol=1e-6)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.interval == "epoch" and is_stream(state):
            raise ValueError(
                "`epsilon_schedule_interval='epoch'` needs a training dataset with a length, to know how many epochs "
                "there are; set it to 'step'."
            )
        at = {share: checked_multiplier(self.schedule(share), share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)}
        if getattr(args, "best_model_at_any_epsilon", False) and args.metric_for_best_model and self.grows(state):
            logger.warning(
                "`best_model_at_any_epsilon=True`: the best model, or an early stop, may come from the ramp, where "
                "models trained at different epsilons are compared, and a small epsilon favours clean accuracy."
            )
        logger.info("Epsilon by progress: " + ", ".join(f"{share:.0%} -> {value:.3g}x" for share, value in at.items()))


class DatasetEpochCallback(TrainerCallback):
    """Tells the training dataset which epoch begins, if it has a `set_epoch`, and counts the passes over a stream.

    Accelerate tells it too, but not a dataset behind a sharded batch sampler (several processes), where random
    augmentation would then repeat itself every epoch.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, train_dataloader=None, **kwargs
    ):
        set_epoch = getattr(getattr(train_dataloader, "dataset", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(math.floor(state.epoch or 0.0))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # `Trainer` counts a step as 1 / max_steps of an epoch, and so never learns that the pass is complete: a run
        # resumed here would begin by ending it once more.
        if is_stream(state) and not control.should_training_stop:
            state.epoch = math.floor(state.epoch or 0.0) + 1.0


class DataWaitCallback(TrainerCallback):
    """Warns, once, when the model waits for its data instead of learning.

    Args:
        waited (`Callable[[], float]`):
            Seconds spent waiting for batches so far.
    """

    def __init__(self, waited: Callable[[], float]):
        self._waited = waited
        self._begin: float | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._begin, self._waited_before = time.perf_counter(), self._waited()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self._begin is None or not state.is_local_process_zero:
            return
        waited, elapsed = self._waited() - self._waited_before, time.perf_counter() - self._begin
        if message := data_wait_message(waited, elapsed, args.dataloader_num_workers):
            logger.warning(message)
            self._begin = None


def data_wait_message(waited: float, elapsed: float, num_workers: int) -> str | None:
    """What to do if more than a tenth of the time went into waiting; None if less, or in the first minute."""
    if elapsed < 60 or waited <= 0.1 * elapsed:
        return None
    return (
        f"{waited / elapsed:.0%} of the training time so far went into waiting for batches. Raise "
        f"`dataloader_num_workers` (now {num_workers}), or prepare smaller images beforehand."
    )


class AttackCheckCallback(TrainerCallback):
    """Ends training, before the weights change, if a step in which an attack was due ran none.

    An override of `compute_loss` that forgets `super()` would otherwise train without any attack, and nobody would
    notice.

    Args:
        attacks (`Callable[[], int]`):
            Number of attacks that have run so far.
        is_due (`Callable[[], bool]`):
            Whether the current optimizer step needs one.
        trainer_name (`str`):
            For the message.
    """

    def __init__(self, attacks: Callable[[], int], is_due: Callable[[], bool], trainer_name: str):
        self._attacks, self._is_due, self._trainer_name = attacks, is_due, trainer_name
        self._before = 0

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        before, self._before = self._before, self._attacks()
        if self._before == before and self._is_due():
            raise RuntimeError(
                f"{self._trainer_name} ran no attack in optimizer step {state.global_step + 1}, where the schedule "
                "asks for one: this would be training without robustness. If it overrides `compute_loss` or "
                "`training_step`, call `super()` there; `super().compute_loss(..., return_outputs=True)` also returns "
                "the outputs for the attacked images. Another loss, such as one with class weights, is better passed "
                "as `RobustTrainer(robust_loss=...)`; to train without attacks set `robust_loss='standard'`."
            )


class BestCheckpointCallback(TrainerCallback):
    """Forgets a best checkpoint that a resumed run can no longer load, so that another one becomes the best, and says
    if none was found.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        best = state.best_model_checkpoint
        if best is not None and (reason := why_incomplete(best)) is not None:
            logger.warning("The best checkpoint so far, %s, is ignored, it is not complete: %s.", best, reason)
            state.best_model_checkpoint = state.best_metric = state.best_global_step = None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if args.load_best_model_at_end and state.best_metric is None and state.is_world_process_zero:
            logger.warning(
                "There is no best model to load: no evaluation was made once epsilon had its final value. The model "
                "is that of the last step. Evaluate more often, let the schedule end earlier, or set "
                "`best_model_at_any_epsilon=True`."
            )
