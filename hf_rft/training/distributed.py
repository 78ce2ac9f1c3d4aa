"""Training with several processes: options of DDP and of the compiler, which examples of a batch are real, and errors
that all processes raise together.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.utils import DistributedDataParallelKwargs, DynamoBackend
from torch.utils.data import BatchSampler, IterableDataset
from transformers import PreTrainedModel, Trainer

from ..models.classifier import blank_image, in_mode
from ..models.folding import exactly_foldable_pairs


def is_sharded(trainer: Trainer) -> bool:
    """Whether weights, gradients or optimizer state are sharded over the processes."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def over_processes(args: Any, batch_size: int) -> int:
    """Number of examples in the global batch; with `split_batches`, `batch_size` already is that number."""
    return batch_size * (1 if args.accelerator_config.split_batches else args.world_size)


def prepare_processes(trainer: Any) -> dict[str, Any]:
    """Set the options of DDP, and choose what makes the attack faster. Call it before the model is wrapped.

    Returns:
        `dict`: arguments for [`Adversary`]: `compiler_options` with `torch_compile`, otherwise `foldable_pairs`.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if is_sharded(trainer):
        return {}
    if args.world_size > 1 and accelerator.ddp_handler is not None:
        set_ddp_options(accelerator.ddp_handler, args, trainer.model)
    dynamo = accelerator.state.dynamo_plugin
    if dynamo is not None and dynamo.backend != DynamoBackend.NO:
        # A graph per batch size, of which there are few: one for all sizes would be slower.
        if dynamo.dynamic is None:
            dynamo.dynamic = False
        return {"compiler_options": dynamo.to_kwargs()}
    if args.attack_model_mode == "train":  # folding is checked in evaluation mode only
        return {}
    return {"foldable_pairs": exactly_foldable_pairs(trainer.model)}


def set_ddp_options(ddp: DistributedDataParallelKwargs, args: Any, model: PreTrainedModel) -> None:
    """Switch off needless work of DDP, unless the arguments ask for it.

    DDP broadcasts buffers, although those of a frozen BatchNorm are equal anyway, and searches the graph for
    parameters without a gradient, which few models have.
    """
    if args.ddp_broadcast_buffers is None and args.freeze_batch_norm:
        ddp.broadcast_buffers = False
    if args.ddp_find_unused_parameters is None:
        ddp.find_unused_parameters = bool(args.head_warmup_steps) or may_have_unused_parameters(model)


def may_have_unused_parameters(model: PreTrainedModel) -> bool:
    """Whether the logits of a blank image do not depend on some trainable parameter, as the mask token of DINOv2.

    True as well for a model that does not take that image.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return False
    with torch.enable_grad(), in_mode(model, training=False):
        try:
            logits = model(pixel_values=blank_image(model)).logits
        except (RuntimeError, ValueError, AssertionError):  # the model does not take images of this size
            return True
        gradients = torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
    return any(gradient is None for gradient in gradients)


def leave_process_group(*, all_do: bool = True) -> None:
    """Close the connections to the other processes, if there are any, at the end of a program.

    Otherwise gloo may abort the processes that still read from one that has ended (SIGABRT), and the launcher reports
    that instead of their exit status.

    Args:
        all_do (`bool`, *optional*, defaults to `True`):
            Whether all processes end here. If not, only gloo's connections are closed: NCCL waits for all processes.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if all_do or torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


# --- Which examples of a batch are real ---
#
# All processes need batches of the same size, so accelerate pads the last global batch with examples from the first.
# Only the real examples count, so that several processes train and evaluate as one would. The padding is at the end of
# the global batch, of which each process holds one consecutive piece.


@dataclass
class OptimizerStep:
    """The number of examples of one optimizer step, and how strongly they are attacked."""

    examples: int  # real ones, of all micro-batches and processes
    real: list[int]  # real ones in each micro-batch of this process
    micro_batch: int = 0
    epsilon: float | None = None
    attack_steps: int = 0
    # For weight perturbation, which passes through all micro-batches before the step does.
    batches: list[Any] = field(default_factory=list)
    is_ascent: bool = False
    crafted: dict[int, torch.Tensor] = field(default_factory=dict)  # adversarial examples of each micro-batch

    @classmethod
    def of(cls, real: list[int], accelerator: Accelerator) -> "OptimizerStep":
        """The step with these numbers of real examples in its micro-batches; all processes must call this."""
        examples = sum(real)
        if accelerator.num_processes > 1:
            examples = int(accelerator.reduce(torch.tensor(examples, device=accelerator.device), "sum"))
        return cls(examples, real)


def own_real_examples(remainder: int, batch_size: int, process_index: int) -> int:
    """How many of this process's `batch_size` examples are real, given the number in the global batch.

    As in accelerate, a `remainder` of 0 or less means that all are.
    """
    if remainder <= 0:
        return batch_size
    return min(max(remainder - process_index * batch_size, 0), batch_size)


def completed(batches: list, counts: list[int], num_batches: int) -> tuple[list, list[int]]:
    """Repeat the last micro-batch, without real examples, until there are `num_batches`.

    This is needed where a stream ends within an optimizer step: `Trainer` always waits for that many micro-batches.
    """
    missing = num_batches - len(batches) if batches else 0
    return batches + missing * batches[-1:], counts + missing * [0]


def training_remainder(dataloader: Any, num_processes: int) -> int:
    """How many examples of the last global batch of a prepared `dataloader`, once it has been fetched, are real.

    accelerate's own `dataloader.remainder` is lost when training resumes within an epoch, and assumes that the sampler
    is as long as the dataset.

    Returns:
        `int`: 0 or less if all are, or if it is unknown (an iterable dataset with `dispatch_batches=False`).
    """
    sampler = dataloader.sampler if isinstance(dataloader.sampler, BatchSampler) else dataloader.batch_sampler
    is_split = getattr(sampler, "split_batches", False)
    # accelerate wraps the sampler: once per process, and once more to skip batches after resuming.
    while (inner := getattr(sampler, "batch_sampler", None)) is not None:
        sampler, is_split = inner, is_split or getattr(inner, "split_batches", False)
    # A dispatcher counts what it reads; other kinds of samplers have no length.
    is_counted = isinstance(dataloader, DataLoaderDispatcher) or isinstance(dataloader.dataset, IterableDataset)
    if is_counted or getattr(sampler, "sampler", None) is None or sampler.batch_size is None:
        return dataloader.remainder
    if sampler.drop_last:
        return 0
    return len(sampler.sampler) % (sampler.batch_size * (1 if is_split else num_processes))


def with_real_examples(batches: Iterable, accelerator: Accelerator, counts: list[int]) -> Iterator:
    """The batches of this process; the number of real examples in each is appended to `counts`."""
    for batch in batches:
        size, state = len(batch["labels"]) if "labels" in batch else 0, accelerator.gradient_state
        if size > 0 and state.end_of_dataloader:
            remainder = training_remainder(state.active_dataloader, accelerator.num_processes)
            size = own_real_examples(remainder, size, accelerator.process_index)
        counts.append(size)
        yield batch


def first_examples(inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The first `count` examples of a batch."""
    return {
        name: value[:count] if isinstance(value, torch.Tensor) and value.dim() > 0 else value
        for name, value in inputs.items()
    }


def filled_up(values: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The tensor padded with zeros to `batch_size` rows, since processes exchange tensors of one shape."""
    missing = batch_size - len(values)
    return values if missing == 0 else torch.cat([values, values.new_zeros(missing, *values.shape[1:])])


# --- Losses and gradients that are not finite ---


class NonFiniteError(ArithmeticError):
    """A loss or gradient is infinite or NaN; the weights are those of the last optimizer step."""


def check_finite(what: str, values: torch.Tensor, when: str, world_size: int = 1) -> None:
    """Refuse NaN and infinity.

    Args:
        what, when (`str`):
            For the message: what the values are; step and micro-batch.
        values (`torch.Tensor`):
            Values of any shape.
        world_size (`int`, *optional*, defaults to 1):
            Number of processes if each has values of its own.

    Raises:
        NonFiniteError: on every process if any of them found one.
    """
    bad = (~values.isfinite()).flatten()
    found = bad.any().to(torch.int32)
    if world_size > 1:
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    if not found:
        return
    positions = bad.nonzero().flatten().tolist()
    where = "on another process"
    if positions:
        values = values.detach().flatten()[bad]
        where = f"{values[0].item()}" + (f" for examples {positions} of the batch" if len(bad) > 1 else "")
    raise NonFiniteError(
        f"The {what} is not finite {when}: {where}. No optimizer step was taken and no checkpoint written. Check the "
        "images, then resume from the last checkpoint (`resume_from_checkpoint=True`) with a lower `learning_rate`, a "
        "`max_grad_norm`, or `bf16` instead of `fp16`."
    )
