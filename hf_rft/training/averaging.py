"""Weight averaging: an exponential moving average of the weights (EMA) is evaluated, saved, and chosen as the best
model, while training goes on with its own weights.

Averages of adversarially trained weights are more robust, and suffer less from robust overfitting (Gowal et al. 2020,
https://huggingface.co/papers/2010.03593, section 4.4).
"""

import contextlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from ..models.adapters import is_adapted
from .checkpoints import restore_weights


# In a checkpoint, the weights that training goes on with; the model beside them is the average.
TRAINED_NAME = "trained_weights.safetensors"


def warmed_up(decay: float, updates: int) -> float:
    """The decay after a number of updates: smaller at first, so that the average forgets the pretrained weights."""
    return min(decay, (1 + updates) / (10 + updates))


class WeightAveraging(TrainerCallback):
    """Averages the weights after every optimizer step; floating-point buffers (BatchNorm's statistics) alike.

    Args:
        decay (`float`):
            Weight of the former average, in [0, 1); see [`warmed_up`].
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.resumes_from: str | None = None  # a checkpoint with an average
        self.average: AveragedModel | None = None  # None outside training

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs
    ):
        self.average = AveragedModel(model, multi_avg_fn=self._update, use_buffers=True).requires_grad_(False)
        if self.resumes_from is not None:
            average: Any = self.average.module
            if is_adapted(average):
                average.load_adapter(self.resumes_from, average.active_adapter)
            elif not restore_weights(average, self.resumes_from):  # a module of the user's own
                load_model(average, Path(self.resumes_from, SAFE_WEIGHTS_NAME))
            cast(torch.Tensor, self.average.n_averaged).fill_(state.global_step)
            self.resumes_from = None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs
    ):
        if self.average is not None:
            self.average.update_parameters(model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs
    ):
        is_best_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if self.average is not None and not is_best_loaded:  # the best model is an average already
            model.load_state_dict(self.average.module.state_dict())
        self.average = None

    def _update(self, averages: Any, values: Any, updates: torch.Tensor | int) -> None:
        if not averages[0].is_floating_point():  # counts and indices
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)
            return
        get_ema_multi_avg_fn(warmed_up(self.decay, int(updates)))(averages, values, updates)

    @contextlib.contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights, then its own again."""
        if self.average is None:
            yield
            return
        _exchange(model, self.average.module)
        try:
            yield
        finally:
            _exchange(model, self.average.module)


@torch.no_grad()
def _exchange(one: nn.Module, other: nn.Module) -> None:
    """Exchange values, tensor by tensor, in place: optimizers, DDP and CUDA graphs refer to the tensors."""
    pairs = zip(chain(one.parameters(), one.buffers()), chain(other.parameters(), other.buffers()), strict=True)
    for tensor, partner in pairs:
        value = tensor.clone()
        tensor.copy_(partner)
        partner.copy_(value)


def averaging_of(trainer: Any) -> WeightAveraging | None:
    """The callback of a trainer; None if it averages nothing."""
    return next((one for one in trainer.callback_handler.callbacks if isinstance(one, WeightAveraging)), None)


def averaged(trainer: Any) -> contextlib.AbstractContextManager[None]:
    """The context in which a trainer's model is evaluated and saved: with averaged weights, if it averages them."""
    averaging = averaging_of(trainer)
    return contextlib.nullcontext() if averaging is None else averaging.in_place_of(trainer.model)


def save_trained_weights(trainer: Any, folder: Path) -> None:
    """Write the weights that training goes on with, if the saved model is an average."""
    averaging = averaging_of(trainer)
    if averaging is not None and averaging.average is not None:
        save_model(trainer.model, str(folder / TRAINED_NAME))


def restore_trained_weights(trainer: Any, checkpoint: str) -> None:
    """After the model of a checkpoint was loaded: if it is an average, load the weights that training goes on with."""
    path, averaging = Path(checkpoint, TRAINED_NAME), averaging_of(trainer)
    if not path.is_file():
        return
    load_model(trainer.model, path)
    if averaging is not None:
        averaging.resumes_from = checkpoint
