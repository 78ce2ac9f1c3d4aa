"""The callbacks of `RobustTrainer`.

Here: for the epochs of the dataset, waiting for data, steps without an attack, and the best checkpoint.
"""

import math
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..schedules import is_stream
from .alarm_callback import AlarmCallback
from .averaging import WeightAveraging
from .checkpoints import why_incomplete
from .gallery import AdversarialGallery
from .head_warmup import HeadWarmup
from .weight_perturbation import WeightPerturbation


logger = logging.get_logger(__name__)


def callbacks_of(trainer: Any) -> list[TrainerCallback]:
    """The callbacks that the arguments of a trainer ask for, in their order."""
    args = trainer.args
    return [
        *([WeightAveraging(args.ema_decay)] if args.weight_averaging else []),
        DatasetEpochCallback(),
        BestCheckpointCallback(),
        DataWaitCallback(lambda: trainer.seconds_for_data),
        AttackCheckCallback(trainer),
        AlarmCallback(trainer),
        *([AdversarialGallery(trainer)] if args.save_adversarial_examples else []),
        *([HeadWarmup()] if args.head_warmup_steps else []),
        *([WeightPerturbation(trainer)] if args.awp_gamma else []),  # after the probe of the alarms
    ]


def notify(trainer: Any, event: str, **kwargs) -> None:
    """Call a method that callbacks of `Trainer` do not have, of those that have it.

    `on_adversarial_batch(args, state, control, *, pixels, adversarial, labels, **kwargs)` sees each micro-batch of
    adversarial examples, in pixels in [0, 1], before the model learns from it.
    """
    for callback in trainer.callback_handler.callbacks:
        if (method := getattr(callback, event, None)) is not None:
            method(trainer.args, trainer.state, trainer.control, **kwargs)


class DatasetEpochCallback(TrainerCallback):
    """Calls `set_epoch` of the training dataset, if it has one, and counts the passes over a stream.

    accelerate calls it too, but not for a dataset behind a sharded batch sampler (several processes), where random
    augmentation would repeat itself every epoch.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, train_dataloader=None, **kwargs
    ):
        set_epoch = getattr(getattr(train_dataloader, "dataset", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(math.floor(state.epoch or 0.0))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # `Trainer` counts a step as 1 / max_steps of an epoch, and does not notice that the pass is complete: a run
        # resumed here would start by completing it again.
        if is_stream(state) and not control.should_training_stop:
            state.epoch = math.floor(state.epoch or 0.0) + 1.0


class DataWaitCallback(TrainerCallback):
    """Warns, once, when the model waits for its data instead of learning.

    Args:
        waited (`Callable[[], float]`):
            Returns the seconds spent waiting for batches so far.
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
    """A warning if more than 10 % of the time was spent waiting; None otherwise, and in the first minute."""
    if elapsed < 60 or waited <= 0.1 * elapsed:
        return None
    return (
        f"{waited / elapsed:.0%} of the training time so far was spent waiting for batches. Raise "
        f"`dataloader_num_workers` (now {num_workers}), or resize the images beforehand."
    )


class AttackCheckCallback(TrainerCallback):
    """Raises, before the weights change, if a step that should run an attack ran none.

    Otherwise an override of `compute_loss` without `super()` would silently train without any attack.
    """

    def __init__(self, trainer: Any):
        self._trainer, self._before = trainer, 0

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        before, self._before = self._before, self._trainer.adversary.attacks
        threat_model, _ = self._trainer.adversary.strength(self._trainer.share_of_epsilon)
        if self._before == before and not threat_model.is_trivial:
            raise RuntimeError(
                f"{type(self._trainer).__name__} ran no attack in optimizer step {state.global_step + 1}, although "
                "epsilon is above 0: the model would not become robust. If it overrides `compute_loss` or "
                "`training_step`, call `super()` there; `super().compute_loss(..., return_outputs=True)` also returns "
                "the outputs for the attacked images. Pass another loss, such as one with class weights, as "
                "`RobustTrainer(robust_loss=...)`; to train without attacks set `robust_loss='standard'`."
            )


class BestCheckpointCallback(TrainerCallback):
    """Forgets a best checkpoint that a resumed run cannot load, and warns at the end if there is no best one."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        best = state.best_model_checkpoint
        if best is not None and (reason := why_incomplete(best)) is not None:
            logger.warning("The best checkpoint so far, %s, is ignored because it is not complete: %s.", best, reason)
            state.best_model_checkpoint = state.best_metric = state.best_global_step = None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if args.load_best_model_at_end and state.best_metric is None and state.is_world_process_zero:
            logger.warning(
                "There is no best model to load: no evaluation took place at the final epsilon. The model is that of "
                "the last step. Evaluate more often, let the schedule end earlier, or set "
                "`best_model_at_any_epsilon=True`."
            )
