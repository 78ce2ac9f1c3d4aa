import pytest
import torch

from hf_rft.data.augmentation import SeededAugmentation


EXAMPLES = list(torch.arange(6.0))


def add_noise(example):
    return example + torch.rand(())


@pytest.fixture
def dataset():
    return SeededAugmentation(EXAMPLES, add_noise, seed=3)


def items(dataset, epoch):
    dataset.set_epoch(epoch)
    return torch.stack([dataset[index] for index in range(len(dataset))])


def test_item_is_a_function_of_seed_epoch_and_index(dataset):
    first = items(dataset, 2)
    torch.rand(7)
    assert torch.equal(items(SeededAugmentation(EXAMPLES, add_noise, seed=3), 2), first)
    assert torch.equal(torch.stack([dataset[index] for index in reversed(range(6))]).flip(0), first)
    noise = {
        "here": first - torch.arange(6.0),
        "epoch": items(dataset, 1) - torch.arange(6.0),
        "seed": items(SeededAugmentation(EXAMPLES, add_noise, seed=4), 2) - torch.arange(6.0),
    }
    assert len(torch.cat(list(noise.values())).unique()) == 18


def test_first_epoch_needs_no_call(dataset):
    untouched = torch.stack([dataset[index] for index in range(6)])
    assert torch.equal(items(dataset, 0), untouched)


def test_global_generator_is_untouched(dataset):
    state = torch.get_rng_state()
    dataset[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_global_generator_is_untouched_by_a_transform_that_fails():
    def fail(example):
        torch.rand(())
        raise RuntimeError("broken image")

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken image"):
        SeededAugmentation(EXAMPLES, fail, seed=0)[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_that_outlive_an_epoch_see_the_next_one(dataset):
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2, persistent_workers=True)
    for epoch in (0, 1, 4):
        dataset.set_epoch(epoch)
        assert torch.equal(torch.cat(list(loader)), items(SeededAugmentation(EXAMPLES, add_noise, seed=3), epoch))
