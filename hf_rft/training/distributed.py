"""What several processes need: which parallelism is supported, and how DDP is to treat the model."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.utils import DistributedDataParallelKwargs, DynamoBackend
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.utils.data import BatchSampler, IterableDataset
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..models.classifier import blank_image, in_mode
from ..models.folding import exactly_foldable_pairs


logger = logging.get_logger(__name__)


def is_sharded(trainer: Trainer) -> bool:
    """Whether an engine divides weights, gradients or optimizer state over the processes."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def over_processes(args: Any, batch_size: int) -> int:
    """Examples in the batch of all processes together; `split_batches` makes the argument that number."""
    return batch_size * (1 if args.accelerator_config.split_batches else args.world_size)


def prepare_processes(trainer: Any) -> dict[str, Any]:
    """To be called before the model is wrapped: set the options of DDP, and say how the adversary may save time.

    Returns:
        `dict`: arguments of [`Adversary`]: `foldable_pairs`, or `compiler_options` with `torch_compile`.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if is_sharded(trainer):
        return {}
    if args.world_size > 1 and accelerator.ddp_handler is not None:
        set_ddp_options(accelerator.ddp_handler, args, trainer.model)
    dynamo = accelerator.state.dynamo_plugin
    if dynamo is not None and dynamo.backend != DynamoBackend.NO:
        # A graph for each size of a batch, never one for any size, which is slower: there are few sizes.
        if dynamo.dynamic is None:
            dynamo.dynamic = False
        return {"compiler_options": dynamo.to_kwargs()}
    if args.attack_model_mode == "train":  # with dropout, the graph in training mode is another one
        return {}
    return {"foldable_pairs": exactly_foldable_pairs(trainer.model)}


def set_ddp_options(ddp: DistributedDataParallelKwargs, args: Any, model: PreTrainedModel) -> None:
    """Switch off, where the arguments leave it open and it is safe, what DDP would do in every step for nothing.

    Buffers are sent from process 0 to the others; those of a frozen BatchNorm are equal anyway. Parameters that have
    no gradient are looked for in the whole graph; models without such parameters need no search.
    """
    if args.ddp_broadcast_buffers is None and args.freeze_batch_norm:
        ddp.broadcast_buffers = False
    if args.ddp_find_unused_parameters is None:
        ddp.find_unused_parameters = may_have_unused_parameters(model)


def may_have_unused_parameters(model: PreTrainedModel) -> bool:
    """Whether a trainable parameter has no part in the logits (the mask token of DINOv2, for example).

    One blank image tells. A model that cannot be asked in this way may have such parameters.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return False
    with torch.enable_grad(), in_mode(model, training=False):
        try:
            logits = model(pixel_values=blank_image(model)).logits
        except (RuntimeError, ValueError, AssertionError):  # an image of this size does not suit the model
            return True
        gradients = torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
    return any(gradient is None for gradient in gradients)


def leave_process_group(*, all_do: bool = True) -> None:
    """Close the connections to the other processes, if there are any, at the end of a program.

    Otherwise the end of one process races with what the others still read from it; with gloo, some are aborted
    (SIGABRT), and the launcher reports that instead of their exit status.

    Args:
        all_do (`bool`, *optional*, defaults to `True`):
            Whether all processes end here. One that ends alone leaves with gloo only: NCCL would wait for the others.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if all_do or torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


# --- Which examples of a batch count ---
#
# All processes need batches of one size, so accelerate completes the last global batch with examples from the first.
# Only the real ones count, so that several processes train on and measure what one would. In the global batch the
# repeated ones come last, and each process holds one consecutive piece of it.


@dataclass
class OptimizerStep:
    """What belongs to one optimizer step: the examples it learns from, and how strongly it attacks them."""

    examples: int  # of all micro-batches and processes
    real: list[int]  # of this process, in each micro-batch: those that do not merely complete it
    micro_batch: int = 0
    epsilon: float | None = None
    attack_steps: int = 0

    @classmethod
    def of(cls, real: list[int], accelerator: Accelerator) -> "OptimizerStep":
        """The step that learns from micro-batches with these numbers of examples; all processes ask together."""
        examples = sum(real)
        if accelerator.num_processes > 1:
            examples = int(accelerator.reduce(torch.tensor(examples, device=accelerator.device), "sum"))
        return cls(examples, real)


def own_real_examples(remainder: int, batch_size: int, process_index: int) -> int:
    """How many of this process's `batch_size` examples are real; there may be none.

    Args:
        remainder (`int`):
            Real examples in the batch of all processes together. 0 or less stands for all of them, as in accelerate.
    """
    if remainder <= 0:
        return batch_size
    return min(max(remainder - process_index * batch_size, 0), batch_size)


def completed(batches: list, counts: list[int], num_batches: int) -> tuple[list, list[int]]:
    """`num_batches` micro-batches, and how many examples of each count.

    Where a pass over a stream ends within an optimizer step, repetitions of which no example counts complete the step:
    the parent takes it after that many micro-batches only.
    """
    missing = num_batches - len(batches) if batches else 0
    return batches + missing * batches[-1:], counts + missing * [0]


def training_remainder(dataloader: Any, num_processes: int) -> int:
    """How many examples of the last global batch of a prepared `dataloader`, once it has been fetched, are real.

    accelerate's own `dataloader.remainder` is lost when training resumes within an epoch, and takes the sampler to be
    as long as the dataset.

    Returns:
        `int`: 0 or less if all are, or if nobody knows: of an iterable dataset with `dispatch_batches=False`, each
        process reads a part of unknown length.
    """
    sampler = dataloader.sampler if isinstance(dataloader.sampler, BatchSampler) else dataloader.batch_sampler
    is_split = getattr(sampler, "split_batches", False)
    # accelerate's samplers, of one process or of the rest of an epoch after resuming, wrap the one that was prepared.
    while (inner := getattr(sampler, "batch_sampler", None)) is not None:
        sampler, is_split = inner, is_split or getattr(inner, "split_batches", False)
    # One process reads for all of them, and notes what it found; a sampler of another kind tells no length.
    is_counted = isinstance(dataloader, DataLoaderDispatcher) or isinstance(dataloader.dataset, IterableDataset)
    if is_counted or getattr(sampler, "sampler", None) is None or sampler.batch_size is None:
        return dataloader.remainder
    if sampler.drop_last:
        return 0
    return len(sampler.sampler) % (sampler.batch_size * (1 if is_split else num_processes))


def with_real_examples(batches: Iterable, accelerator: Accelerator, counts: list[int]) -> Iterator:
    """The batches of one process, while `counts` grows by the number of real examples in each."""
    for batch in batches:
        size, state = len(batch["labels"]) if "labels" in batch else 0, accelerator.gradient_state
        if size > 0 and state.end_of_dataloader:
            remainder = training_remainder(state.active_dataloader, accelerator.num_processes)
            size = own_real_examples(remainder, size, accelerator.process_index)
        counts.append(size)
        yield batch


def first_examples(inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
    """A batch that holds the first `count` examples of another."""
    return {
        name: value[:count] if isinstance(value, torch.Tensor) and value.dim() > 0 else value
        for name, value in inputs.items()
    }


def filled_up(values: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Zeros behind the rows of a tensor, `batch_size` rows in all: what processes exchange must have one shape."""
    missing = batch_size - len(values)
    return values if missing == 0 else torch.cat([values, values.new_zeros(missing, *values.shape[1:])])


# --- Checks ---


def check_parallelism(trainer: Any) -> None:
    """Refuse what would train or measure something else than one process does, or wait for ever.

    DDP, FSDP2 and DeepSpeed ZeRO-1 and -2 remain.

    Raises:
        ValueError: naming the setting, why it cannot be supported, and the remedy.
    """
    args, state = trainer.args, trainer.accelerator.state
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (DataParallel) are not supported; start one process a GPU "
            "with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one."
        )
    if args.world_size > 1 and not args.accelerator_config.even_batches:
        raise ValueError(
            "`even_batches=False` lets some processes run out of batches while the others wait for their gradients; "
            "leave it True: the examples that complete the last batch count for nothing."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    sizes = {name: getattr(parallelism, name, None) or 1 for name in ("tp_size", "cp_size", "sp_size")}
    divided = {name: size for name, size in sizes.items() if size > 1}
    if divided or getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            f"Several processes that share one batch ({divided or 'a model divided when it was loaded'}) are not "
            "supported: loss and noise take each process to have examples of its own. Use data parallelism alone: "
            "DDP, FSDP2 or DeepSpeed ZeRO-2."
        )
    if trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
        raise ValueError(
            "DeepSpeed `zero_stage: 3` is not supported: all processes gather the weights in each pass together, but "
            "an attack may take more passes on one process than on another. Set `zero_stage: 2`, or use FSDP2 "
            "(recipes/accelerate_configs/fsdp.yaml)."
        )
    if trainer.is_fsdp_enabled:
        _check_fsdp(trainer, state.fsdp_plugin)
    if (
        args.world_size > 1
        and isinstance(trainer.train_dataset, torch.utils.data.IterableDataset)
        and args.accelerator_config.dispatch_batches is False
    ):
        logger.warning(
            "With `dispatch_batches=False` each process reads its own part of the iterable `train_dataset`. Should "
            "the parts end unevenly, examples are repeated, and nobody can tell which; leave `dispatch_batches` out "
            "to train as one process would."
        )


def _check_fsdp(trainer: Any, plugin: Any) -> None:
    problem = None
    if plugin.fsdp_version != 2:
        problem = f"`fsdp_version: {plugin.fsdp_version}` flattens weights, so that none is whole; set it to 2"
    elif "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        problem = (
            f"`fsdp_state_dict_type: {plugin.state_dict_type}` saves no model that `from_pretrained` could load; set "
            "it to FULL_STATE_DICT"
        )
    elif plugin.cpu_ram_efficient_loading:
        problem = "`fsdp_cpu_ram_efficient_loading: true` leaves processes without weights at first; set it to false"
    elif isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        problem = "`fsdp_offload_params: true` would bring all weights back for each attack anyway; set it to false"
    elif trainer.args.torch_compile:
        problem = "`torch_compile=True` has not been tried with divided weights; set it to False"
    else:
        try:  # accelerate calls this method of every model, and some have none
            trainer.model.get_input_embeddings()
        except NotImplementedError:
            problem = (
                f"accelerate cannot divide a {type(trainer.model).__name__}, which has no `get_input_embeddings`; use "
                "DDP (recipes/accelerate_configs/multi_gpu.yaml)"
            )
    if problem is not None:
        raise ValueError(f"FSDP: {problem}.")


class NonFiniteError(ArithmeticError):
    """A loss or gradient is infinite or not a number; the weights are those of the last optimizer step."""


def check_finite(what: str, values: torch.Tensor, when: str, world_size: int = 1) -> None:
    """Refuse NaN and infinity; where `world_size` processes have values of their own, on all of them or none.

    Args:
        what (`str`):
            What `values` are, for the message.
        values (`torch.Tensor`):
            Of this process; any shape.
        when (`str`):
            Step and micro-batch.

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
        f"The {what} is not finite {when}: {where}. No optimizer step was taken from it and no checkpoint written. Go "
        "on from the last checkpoint with `resume_from_checkpoint=True`, after looking at the images, with a lower "
        "`learning_rate`, a `max_grad_norm`, or `bf16` in place of `fp16`."
    )
