"""How a run survives being killed: it resumes from the last complete checkpoint.

`RobustTrainer` calls these functions around those of `Trainer`; checkpoints.py defines what a complete checkpoint is.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import cast

import torch
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..hub.safe_loading import is_adapter
from ..models.adapters import is_adapted
from ..schedules import is_stream
from ..utils.files import write_text
from .adversary import AdversarialAccuracy
from .averaging import save_trained_weights
from .checkpoints import (
    check_resumable,
    last_complete_checkpoint,
    mark_complete,
    remove_checkpoint,
    rotate_checkpoints,
)
from .interruption import InterruptionCallback


logger = logging.get_logger(__name__)

COUNTS_NAME = "accuracy_since_log.json"


def find_checkpoint(trainer: Trainer) -> Path | None:
    """The last complete checkpoint of `output_dir`, the same for all processes; None if there is none."""
    args = trainer.args
    checkpoint = last_complete_checkpoint(args.output_dir)
    if args.world_size > 1:
        number = int(checkpoint.name.rpartition("-")[2]) if checkpoint else -1
        numbers = cast(torch.Tensor, trainer.accelerator.gather(torch.tensor([number], device=args.device))).tolist()
        if len(set(numbers)) > 1:
            raise ValueError(
                f"The processes see different last checkpoints in `output_dir={args.output_dir!r}` (steps {numbers}, "
                "-1 for none); put it on storage that all machines share."
            )
    return checkpoint


def checkpoint_to_resume(trainer: Trainer, resume_from_checkpoint: str | PathLike | bool | None) -> str | None:
    """Path of the checkpoint that `train(resume_from_checkpoint=...)` asks for; None to start from the beginning.

    Raises:
        ValueError: if there is no such checkpoint, or training cannot resume from it.
    """
    if resume_from_checkpoint is True:
        resume_from_checkpoint = find_checkpoint(trainer)
        if resume_from_checkpoint is None:
            raise ValueError(
                f"`resume_from_checkpoint=True`, but `output_dir={trainer.args.output_dir!r}` holds no complete "
                "checkpoint; leave it out to start from the beginning."
            )
    if not resume_from_checkpoint:
        return None
    check_resumable(resume_from_checkpoint)
    if is_adapter(resume_from_checkpoint) != is_adapted(trainer.model):
        kinds = ("an adapter", "a whole model") if is_adapted(trainer.model) else ("a whole model", "an adapter")
        raise ValueError(
            f"`resume_from_checkpoint={str(resume_from_checkpoint)!r}` holds {kinds[1]}, but the trainer trains "
            f"{kinds[0]}; resume with the same settings (`--lora_r`), or start anew in another `output_dir`."
        )
    if trainer.is_world_process_zero():
        logger.warning("Training resumes from %s.", resume_from_checkpoint)
    return str(resume_from_checkpoint)


def stream_position(
    trainer: Trainer, checkpoint: str | None, max_steps: int, num_train_epochs: int
) -> tuple[int, int] | None:
    """Where to resume in a stream: completed passes, and batches of the current one; None where `Trainer` knows.

    `Trainer` assumes that a stream is one endless pass; the saved state says how far the current one has come.
    """
    if checkpoint is None or not is_stream(trainer.state):
        return None
    if trainer.state.global_step >= max_steps:
        return num_train_epochs, 0  # training is complete
    # `Trainer` counts a step as 1 / max_steps of an epoch; the user may have changed `max_steps` since.
    saved = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    passes = math.floor(saved.epoch)
    steps = round((saved.epoch - passes) * saved.max_steps)
    return passes, 0 if trainer.args.ignore_data_skip else steps * trainer.args.gradient_accumulation_steps


def accuracy_since_log(trainer: Trainer, checkpoint: str | None) -> AdversarialAccuracy:
    """What the next training log counts from: nothing, or what a checkpoint between two logs had counted."""
    path = Path(checkpoint or "", COUNTS_NAME)
    if checkpoint is None or not path.is_file() or trainer.args.process_index > 0:  # the counts are of all processes
        return AdversarialAccuracy()
    return AdversarialAccuracy(*json.loads(path.read_text()))


@contextlib.contextmanager
def saved_whole(
    trainer: Trainer, trial, interruption: InterruptionCallback, accuracy: AdversarialAccuracy
) -> Iterator[None]:
    """Around `Trainer._save_checkpoint`: mark the checkpoint as complete, and only then delete old ones.

    Raises:
        OSError: if it could not be written; the message names the last complete one.
    """
    args, accelerator = trainer.args, trainer.accelerator
    folder = Path(trainer._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    if args.should_save:
        remove_checkpoint(folder)  # left by a killed attempt or an earlier run
    accelerator.wait_for_everyone()
    limit, args.save_total_limit = args.save_total_limit, None  # `Trainer` would delete old ones too early
    try:
        yield
        counts = accuracy.counts(accelerator)
        accelerator.wait_for_everyone()
        if args.should_save:
            write_text(folder / COUNTS_NAME, json.dumps(counts))
            save_trained_weights(trainer, folder)
            mark_complete(folder)
    except Exception as error:
        if args.should_save:
            remove_checkpoint(folder)
        last = last_complete_checkpoint(folder.parent)
        left = f"The last complete checkpoint is {last}" if last else "There is no complete checkpoint"
        raise OSError(
            f"{folder.name} could not be written after step {trainer.state.global_step}: {error}. {left}; free space "
            f"(or make `output_dir={args.output_dir!r}` writable) and resume."
        ) from error
    finally:
        args.save_total_limit = limit
    if args.should_save:
        best = trainer.state.best_model_checkpoint
        rotate_checkpoints(folder.parent, limit, keep=[best] if best else [])
    accelerator.wait_for_everyone()  # no process continues or ends before the checkpoint is complete
    if interruption.requested is not None:
        interruption.requested.checkpoint = str(folder)
