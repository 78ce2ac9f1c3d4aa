"""Random augmentation that does not depend on resuming, prefetching or data loader workers."""

from collections.abc import Callable
from typing import Any

import torch

from ..utils.noise import AUGMENTATION, mix_seed
from .images import read_example


class SeededAugmentation(torch.utils.data.Dataset):
    """A dataset whose random `transform` is a function of seed, epoch and example index.

    The transform may draw from torch's global generator, as torchvision's do: that is seeded for this example and
    epoch, and restored afterwards. (A generator that simply kept running would not resume exactly, because batches are
    prefetched.)

    Args:
        dataset (`datasets.Dataset` or `torch.utils.data.Dataset`):
            Maps an index to an example.
        transform (`Callable`):
            Maps an example to what the model trains on.
        seed (`int`):
            Non-negative.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Any], seed: int):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        # In shared memory, so that persistent data loader workers see the next epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Called at the start of every epoch, by accelerate's data loader and by `DatasetEpochCallback`."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        example = read_example(self.dataset, index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(AUGMENTATION, self.seed, int(self._epoch), index))
            return self.transform(example)
