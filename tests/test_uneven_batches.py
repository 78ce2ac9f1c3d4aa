import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler

from hf_rft.uneven_batches import filled_up, first_examples, own_real_examples, training_remainder


@pytest.mark.parametrize(
    ("remainder", "expected"),
    [
        (11, [4, 4, 3]),
        (9, [4, 4, 1]),
        (8, [4, 4, 0]),
        (1, [1, 0, 0]),
        (0, [4, 4, 4]),  # it divides evenly
        (-1, [4, 4, 4]),  # nobody knows
    ],
)
def test_each_process_holds_one_piece_of_the_real_examples(remainder, expected):
    assert [own_real_examples(remainder, 4, index) for index in range(3)] == expected


def prepared(loader, index=0, processes=2, **options):
    return prepare_data_loader(loader, num_processes=processes, process_index=index, put_on_device=False, **options)


@pytest.mark.parametrize("count", range(1, 21))
@pytest.mark.parametrize(("processes", "split"), [(1, False), (2, False), (3, False), (2, True)])
@pytest.mark.parametrize("skipped", [0, 1])
def test_real_examples_are_each_seen_once(count, processes, split, skipped):
    """What is counted, over all processes, against the dataset; also after resuming within the epoch."""
    batch_size = 6 if split else 3
    seen = []
    for index in range(processes):
        loader = prepared(DataLoader(range(count), batch_size), index, processes, split_batches=split)
        if skipped and len(loader) > 1:
            loader = skip_first_batches(loader, 1)
        for batch in loader:
            real = len(batch)
            if loader.end_of_dataloader:
                real = own_real_examples(training_remainder(loader, processes), len(batch), index)
            seen += batch[:real].tolist()
    first = batch_size * (1 if split else processes)
    assert sorted(seen) == list(range(first if skipped and count > first else 0, count))


def test_remainder_follows_the_sampler():
    data = torch.arange(10)
    weighted = DataLoader(data, 4, sampler=WeightedRandomSampler(torch.ones(10), 13))
    assert training_remainder(prepared(weighted), 2) == 13 % 8
    assert training_remainder(prepared(DataLoader(data, 4, sampler=RandomSampler(data))), 2) == 10 % 8
    assert training_remainder(prepared(DataLoader(data, 4, drop_last=True)), 2) == 0
    assert training_remainder(prepared(DataLoader(data, 5)), 2) == 0


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(10))


def test_parts_of_unknown_length_are_taken_to_be_real():
    loader = prepared(DataLoader(Stream(), 4), dispatch_batches=False)
    assert len(list(loader)) == 2
    assert training_remainder(loader, 2) <= 0


def test_batches_are_cut_and_filled_up():
    batch = {
        "pixel_values": torch.ones(3, 2),
        "labels": torch.arange(3),
        "temperature": torch.tensor(1.0),
        "flag": True,
    }
    cut = first_examples(batch, 2)
    assert [len(cut[name]) for name in ("pixel_values", "labels")] == [2, 2]
    assert cut["temperature"] == 1 and cut["flag"] is True and len(batch["labels"]) == 3
    assert filled_up(cut["labels"], 4).tolist() == [0, 1, 0, 0]
    assert filled_up(torch.ones(0, 2, 5), 3).shape == (3, 2, 5)
    assert filled_up(cut["labels"], 2) is cut["labels"]
