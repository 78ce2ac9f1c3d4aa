"""How `RobustTrainer` survives being killed: checkpoints that are complete or ignored, and resuming from them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from .callbacks import is_stream
from .checkpoints import (
    check_resumable,
    last_complete_checkpoint,
    mark_complete,
    remove_checkpoint,
    restore_weights,
    rotate_checkpoints,
)
from .interruption import InterruptionCallback, preemption_requests, start_worker_in_own_group
from .training_args import RobustTrainingArguments


logger = logging.get_logger(__name__)


class ResumeMixin(Trainer):
    """The part of [`RobustTrainer`] that writes checkpoints and goes on from them."""

    args: RobustTrainingArguments
    model: PreTrainedModel
    interruption: InterruptionCallback
    _is_sharded: bool

    def train(self, resume_from_checkpoint: str | PathLike | bool | None = None, *args, **kwargs) -> TrainOutput:
        """As [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint folder, or True for the last complete one of `output_dir`.

        Raises:
            TrainingPreempted: after SIGTERM; the optimizer step in progress was taken and a checkpoint written.
            AlarmRaised: with `abort_on_alarm`, likewise.
            NonFiniteError: if a loss or gradient is not finite; the step was not taken.
            ValueError: if there is no such checkpoint, or it is not complete.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.find_checkpoint()
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"`resume_from_checkpoint=True`, but `output_dir={self.args.output_dir!r}` holds no complete "
                    "checkpoint; leave it out to start anew."
                )
        if resume_from_checkpoint:
            check_resumable(resume_from_checkpoint)
            resume_from_checkpoint = str(resume_from_checkpoint)
            if self.is_world_process_zero():
                logger.warning("Training goes on from %s.", resume_from_checkpoint)
        self.interruption.reset()
        with preemption_requests(self.interruption):
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.interruption.requested is not None:  # too late to stop: this was the end
            raise self.interruption.requested
        return output

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial):
        """The parent takes a stream to be one endless pass; how far the present one has come is in the state."""
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        if checkpoint is None or not is_stream(self.state):
            return epochs, batches
        if self.state.global_step >= max_steps:
            return num_train_epochs, 0  # nothing is left to do
        # The parent counts a step as this share of an epoch; the user may have changed `max_steps` since.
        saved = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        passes = math.floor(saved.epoch)
        steps = round((saved.epoch - passes) * saved.max_steps)
        return passes, 0 if self.args.ignore_data_skip else steps * self.args.gradient_accumulation_steps

    def _get_dataloader(self, *args, **kwargs):
        dataloader = super()._get_dataloader(*args, **kwargs)
        if self.args.dataloader_num_workers > 0:
            # Behind accelerate's adapter, which reads attributes of the loader it holds, but does not set them.
            loader = getattr(dataloader, "base_dataloader", dataloader)
            loader.worker_init_fn = partial(start_worker_in_own_group, loader.worker_init_fn)
        return dataloader

    def find_checkpoint(self) -> Path | None:
        """The last complete checkpoint of `output_dir`, the same for all processes; None if there is none."""
        checkpoint = last_complete_checkpoint(self.args.output_dir)
        if self.args.world_size > 1:
            number = int(checkpoint.name.rpartition("-")[2]) if checkpoint else -1
            numbers = cast(torch.Tensor, self.accelerator.gather(torch.tensor([number], device=self.args.device)))
            numbers = numbers.tolist()
            if len(set(numbers)) > 1:
                raise ValueError(
                    f"The processes see different last checkpoints in `output_dir={self.args.output_dir!r}` (steps "
                    f"{numbers}, -1 for none); put it on storage that all machines share."
                )
        return checkpoint

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            remove_checkpoint(folder)  # of an attempt that was killed, or of an earlier run
        self.accelerator.wait_for_everyone()
        try:
            with self._without_rotation():  # which would delete old ones before the new one is complete
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(folder)
        except Exception as error:
            raise self._failed_save(folder, error) from error
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(folder.parent, self.args.save_total_limit, keep=[best] if best else [])
        self.accelerator.wait_for_everyone()  # no process goes on, or ends, before the checkpoint is complete
        if self.interruption.requested is not None:
            self.interruption.requested.checkpoint = str(folder)

    def _failed_save(self, folder: Path, error: Exception) -> OSError:
        """Say what is left, and free the space that the torn checkpoint takes."""
        if self.args.should_save:
            remove_checkpoint(folder)
        last = last_complete_checkpoint(folder.parent)
        left = f"The last complete checkpoint is {last}" if last else "There is no complete checkpoint"
        return OSError(
            f"{folder.name} could not be written after step {self.state.global_step}: {error}. {left}; make room (or "
            f"`output_dir={self.args.output_dir!r}` writable) and resume."
        )

    @contextmanager
    def _without_rotation(self) -> Iterator[None]:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    # --- Restoring weights ---

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self._is_sharded or not restore_weights(model or self.model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if self._is_sharded or not restore_weights(self.model, self.state.best_model_checkpoint):
            super()._load_best_model()
