"""Which examples of a batch count, where several processes share the last one of an epoch.

All processes need batches of one size, so accelerate completes the last global batch with examples from the first.
They have been seen already: here they are told from the others, the real ones, so that several processes train on and
measure what one would. In the global batch they come last, and each process holds one consecutive piece of it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import BatchSampler, IterableDataset


def own_real_examples(remainder: int, batch_size: int, process_index: int) -> int:
    """How many of this process's `batch_size` examples are real; there may be none.

    Args:
        remainder (`int`):
            Real examples in the batch of all processes together. 0 or less stands for all of them, as in accelerate.
    """
    if remainder <= 0:
        return batch_size
    return min(max(remainder - process_index * batch_size, 0), batch_size)


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
