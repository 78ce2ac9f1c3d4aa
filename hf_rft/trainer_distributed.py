"""What `RobustTrainer` has to know about processes: the bare model, and the batch that all processes have together."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from accelerate.utils import DynamoBackend
from transformers import PreTrainedModel, Trainer
from transformers.trainer_pt_utils import AcceleratorConfig

from .distributed import WholeCopy, set_ddp_options
from .folding import FoldablePair, exactly_foldable_pairs, folded
from .model_state import under_attack
from .pixel_space import PixelNormalization
from .training_args import RobustTrainingArguments


class DistributedMixin(Trainer):
    """The part of [`RobustTrainer`] that differs between one process and several.

    The model is attacked bare: what DDP, FSDP or DeepSpeed put around it would exchange gradients or weights in every
    step of an attack.
    """

    args: RobustTrainingArguments
    model: PreTrainedModel
    pixel_normalization: PixelNormalization
    _whole_copy: WholeCopy | None = None
    _foldable_pairs: Sequence[FoldablePair] = ()
    _training_attack_logits: Callable[..., torch.Tensor] | None = None  # `_logits`, compiled

    def _set_up_processes(self) -> None:
        """To be called before the model is wrapped."""
        if self.is_fsdp_enabled:
            self._whole_copy = WholeCopy(self.model)
        elif self.args.world_size > 1 and self.accelerator.ddp_handler is not None and not self.is_deepspeed_enabled:
            set_ddp_options(self.accelerator.ddp_handler, self.args, self.model)
        if self._is_sharded:
            return
        dynamo = self.accelerator.state.dynamo_plugin
        if dynamo is not None and dynamo.backend != DynamoBackend.NO:
            # A graph for each size of a batch, never one for any size, which is slower: there are few sizes.
            if dynamo.dynamic is None:
                dynamo.dynamic = False
            # The pass that an attack repeats; nothing in it depends on epsilon. It is not folded: inductor fuses
            # BatchNorm, and CUDA graphs want weights that stay where they are.
            # torch keeps a limited number of graphs of a function: those of earlier trainers make room.
            torch._dynamo.reset_code(DistributedMixin._logits.__code__)  # pyright: ignore[reportPrivateImportUsage]
            self._training_attack_logits = torch.compile(self._logits, **dynamo.to_kwargs())
        elif self.args.attack_model_mode == "eval":  # with dropout, the graph in training mode is another one
            self._foldable_pairs = exactly_foldable_pairs(self.model)

    @property
    def _is_sharded(self) -> bool:
        """Whether an engine divides weights, gradients or optimizer state over the processes."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def _bare_model(self) -> PreTrainedModel:
        return self.model if self._whole_copy is None else self._whole_copy.model

    @contextlib.contextmanager
    def _whole_weights(self) -> Iterator[PreTrainedModel]:
        """The bare model with all of its weights; every process must ask at the same time."""
        if self._whole_copy is None:
            yield self.model
            return
        # Unlike the model itself, the copy was not prepared for mixed precision.
        with self._whole_copy.holding(self.model) as model, self.accelerator.autocast():
            yield model

    @contextlib.contextmanager
    def _under_attack(self, *, training: bool) -> Iterator[None]:
        with self._whole_weights() as model, under_attack(model, training=training):
            yield

    def _folded(self) -> contextlib.AbstractContextManager[None]:
        """Saves the BatchNorms, while training and under attack only: evaluation takes the model as it is."""
        return folded(self._foldable_pairs)

    def _forward(self, pixels: torch.Tensor, **extra_inputs) -> torch.Tensor:
        """Pixels in [0, 1] to logits, through the bare model."""
        return self._logits(self._pixel_values(pixels), **extra_inputs)

    def _forward_for_training_attack(self, pixels: torch.Tensor, **extra_inputs) -> torch.Tensor:
        """The same in `attack_dtype`, and compiled with `torch_compile`."""
        dtype = getattr(torch, self.args.attack_dtype) if self.args.attack_dtype else None
        with torch.autocast(pixels.device.type, dtype) if dtype else contextlib.nullcontext():
            pixel_values = self._pixel_values(pixels)
            if self._training_attack_logits is None:
                return self._logits(pixel_values, **extra_inputs)
            # What a CUDA graph returns is overwritten by its next run: logits, and the gradient, which normalisation
            # outside of the graph computes anew.
            return self._training_attack_logits(pixel_values, **extra_inputs).clone()

    def _pixel_values(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.pixel_normalization.from_pixels(pixels).to(self._bare_model.dtype)

    def _logits(self, pixel_values: torch.Tensor, **extra_inputs) -> torch.Tensor:
        return self._bare_model(pixel_values=pixel_values, **extra_inputs).logits

    def _over_processes(self, batch_size: int) -> int:
        """Examples in the batch of all processes together; `split_batches` makes the argument that number."""
        config = cast(AcceleratorConfig, self.args.accelerator_config)
        return batch_size * (1 if config.split_batches else self.args.world_size)
