"""A robust head start: only the classification head learns at first, from adversarial examples.

A new head sends random gradients into the pretrained weights. RoLI (Hua et al. 2024,
https://huggingface.co/papers/2312.05716) starts from a head that was trained on adversarial examples, in that paper on
top of a robust model.
"""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..models.parts import head_parameters
from ..utils.values import number_of_steps


class HeadWarmup(TrainerCallback):
    """Freezes all but the head in the first optimizer steps; see `head_warmup_steps` of the arguments."""

    def __init__(self):
        self._frozen: list[nn.Parameter] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs):
        self._thaw()  # an earlier training may have been interrupted

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs):
        if state.global_step >= number_of_steps(args.head_warmup_steps, state.max_steps):
            self._thaw()
        elif not self._frozen:
            head = head_parameters(model)
            self._frozen = [one for one in model.parameters() if one.requires_grad and one not in head]
            for parameter in self._frozen:
                parameter.requires_grad_(False)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs):
        self._thaw()

    def _thaw(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []
