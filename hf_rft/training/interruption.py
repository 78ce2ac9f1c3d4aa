"""Stopping a training run early without losing anything.

A signal or an alarm requests the stop. The optimizer step in progress is completed, a checkpoint written, and then
`train` raises. (transformers' `enable_jit_checkpoint` saves before the step that it then takes, and returns as if
training had ended.)
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging


logger = logging.get_logger(__name__)


class TrainingInterrupted(RuntimeError):
    """Training stopped before its end, after a checkpoint was written.

    Attributes:
        checkpoint (`str`, *optional*):
            Folder of that checkpoint, for `resume_from_checkpoint`.
    """

    checkpoint: str | None = None

    def __str__(self) -> str:
        return super().__str__() + (f" Everything up to here is in {self.checkpoint}." if self.checkpoint else "")


class TrainingPreempted(TrainingInterrupted):
    """The process received SIGTERM, which clusters send before they reclaim a machine."""


class TrainingCancelled(TrainingInterrupted):
    """Somebody pressed Ctrl-C (SIGINT), inside [`cancellation_requests`]."""


class AlarmRaised(TrainingInterrupted):
    """An alarm was raised and `abort_on_alarm` is set."""


_KINDS = (TrainingPreempted, AlarmRaised, TrainingCancelled)


class InterruptionCallback(TrainerCallback):
    """Ends training with a checkpoint once a stop has been requested."""

    def __init__(self):
        self.requested: TrainingInterrupted | None = None
        self._is_agreed = False  # by all processes, so that all of them save and leave at the same step
        self._is_training = False

    def request(self, reason: TrainingInterrupted) -> None:
        """Stop after the optimizer step in progress, save, and raise `reason`. Later requests are ignored."""
        if self.requested is None:
            self.requested = reason

    def reset(self) -> None:
        """Forget a request from an earlier training."""
        self.requested, self._is_agreed = None, False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._is_training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        return self._stop_if_requested(args, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        return self._stop_if_requested(args, control) if self._is_training else control

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        return self._stop_if_requested(args, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self._is_agreed and self.requested is not None:
            raise self.requested

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._is_training = False

    def _stop_if_requested(self, args: TrainingArguments, control: TrainerControl) -> TrainerControl:
        # Signals reach processes at different moments: a process without a request learns of it here.
        kind = 0
        if self.requested is not None:
            kind = 1 + next(i for i, kind in enumerate(_KINDS) if isinstance(self.requested, kind))
        if args.world_size > 1:
            kinds = torch.tensor(kind, device=args.device)
            torch.distributed.all_reduce(kinds, torch.distributed.ReduceOp.MAX)
            kind = int(kinds)
        if kind > 0:
            self.request(_KINDS[kind - 1]("Another process of this run was asked to stop."))
            self._is_agreed = True
        if self._is_agreed:
            control.should_save = control.should_training_stop = True
        return control


def start_worker_in_own_group(initialize: Callable[[int], None] | None, worker_id: int) -> None:
    """Move a data loader's worker out of the process group of training.

    Launchers and users send SIGTERM to that group: it would kill the workers, and so training, before the step in
    progress is completed.
    """
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    if initialize is not None:
        initialize(worker_id)


def with_workers_in_own_group(dataloader: Any) -> Any:
    """The prepared data loader, whose workers signals to the process group of training do not reach."""
    # accelerate's adapter passes on reads of attributes, but not writes.
    loader = getattr(dataloader, "base_dataloader", dataloader)
    if loader.num_workers > 0:
        loader.worker_init_fn = partial(start_worker_in_own_group, loader.worker_init_fn)
    return dataloader


def preemption_requests(interruption: InterruptionCallback) -> contextlib.AbstractContextManager[None]:
    """Treat SIGTERM as a request to stop during the block, and restore the previous handler afterwards.

    Only the main thread can receive signals; in other threads this does nothing.
    """
    reason = TrainingPreempted("Training received SIGTERM and stopped after this step.")
    return _handling(signal.SIGTERM, lambda *_: interruption.request(reason))


def cancellation_requests(interruption: InterruptionCallback) -> contextlib.AbstractContextManager[None]:
    """Treat Ctrl-C as a request to stop during the block, and a second one as a `KeyboardInterrupt`.

    For programs: in a notebook, and by default, Ctrl-C ends training at once, without a checkpoint.
    """

    def on_sigint(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logger.warning("Stopping after this step, with a checkpoint. Ctrl-C again stops at once, without one.")
        interruption.request(TrainingCancelled("Training was interrupted (Ctrl-C) and stopped after this step."))

    return _handling(signal.SIGINT, on_sigint)


@contextlib.contextmanager
def _handling(number: signal.Signals, handler: Callable[..., Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL if previous is None else previous)
