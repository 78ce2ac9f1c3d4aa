import random

import numpy as np
import pytest
import torch
from conftest import NUM_LABELS, SIZE, Images

from hf_rft.attacks import fgsm, pgd
from hf_rft.data.augmentation import SeededAugmentation
from hf_rft.threat_model import ThreatModel
from hf_rft.training.probe import MULTI_STEPS, PROBED_EXAMPLES, probe, probe_examples, probe_interval


def linear_model(scale=1.0):
    torch.manual_seed(0)
    weight = scale * torch.randn(NUM_LABELS, 3 * SIZE * SIZE)
    return lambda pixels: pixels.flatten(1) @ weight.T


def examples(count=24):
    images = Images(count)
    return images.pixels, images.labels


def test_shares_are_those_of_the_attacks():
    pixels, _ = examples()
    forward = linear_model()
    labels = forward(pixels).argmax(dim=1)
    options = {"threat_model": ThreatModel("linf", "1/255"), "generator": torch.Generator().manual_seed(1)}
    found = probe(forward, pixels, labels, **options)
    assert found["clean_accuracy"].all() and not found["zero_gradient_share"].any()
    options["generator"] = torch.Generator().manual_seed(1)
    single = forward(fgsm(forward, pixels, labels, **options)).argmax(dim=1) == labels
    multi = forward(pgd(forward, pixels, labels, steps=MULTI_STEPS, **options)).argmax(dim=1) == labels
    assert torch.equal(found["single_step_accuracy"], single)
    assert torch.equal(found["multi_step_accuracy"], multi)
    assert 0 < multi.sum() < len(labels)


def test_at_epsilon_zero_nothing_is_attacked():
    found = probe(linear_model(), *examples(), threat_model=ThreatModel("linf", 0))
    assert set(found) == {"clean_accuracy", "zero_gradient_share"}


def test_a_model_without_a_gradient_is_found_out():
    forward = linear_model()
    found = probe(lambda pixels: forward(torch.round(pixels)), *examples(), threat_model=ThreatModel("linf", 0.1))
    assert found["zero_gradient_share"].all()


@pytest.mark.parametrize(("epsilon", "forward_passes"), [(0.0, 1), (1e-6, 14)])
def test_passes_are_those_of_the_docstring(epsilon, forward_passes):
    """At so small an epsilon no example is broken, and none is spared a pass."""
    forward, passes = linear_model(), []

    def counting(pixels):
        passes.append(len(pixels))
        return forward(pixels)

    pixels, _ = examples(2)
    probe(counting, pixels, forward(pixels).argmax(dim=1), threat_model=ThreatModel("linf", epsilon))
    assert sum(passes) == forward_passes * len(pixels)


@pytest.mark.parametrize(
    ("max_steps", "epochs", "interval"),
    [(1000, 50, 20), (1000, 2, 100), (1000, 1, 100), (1000, 500, 10), (5, 1, 5), (96, 6, 10), (100, 2**63, 5)],
)
def test_interval(max_steps, epochs, interval):
    assert probe_interval(max_steps, epochs) == interval


# --- Which examples ---


def test_the_same_few_different_examples_each_time():
    indices = probe_examples(range(1000), seed=3)
    assert len(set(indices)) == PROBED_EXAMPLES
    assert indices == probe_examples(range(1000), seed=3) != probe_examples(range(1000), seed=4)
    assert probe_examples(range(5), seed=3) == [0, 1, 2, 3, 4]


def test_a_repeating_order_of_classes_is_no_trap():
    """Examples at equal distances of 32 would all have one class."""
    assert len({index % 4 for index in probe_examples(range(4 * PROBED_EXAMPLES), seed=0)}) == 4


class Random(torch.utils.data.Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, index):
        return torch.rand(()).item(), np.random.rand(), random.random()


def test_global_generators_are_left_alone_and_do_not_matter():
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        drawn.append(probe_examples(Random(), seed=7))
        after = torch.rand(()).item(), np.random.rand(), random.random()
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        assert after == (torch.rand(()).item(), np.random.rand(), random.random())
    assert drawn[0] == drawn[1]


def test_augmented_examples_are_those_of_the_first_epoch():
    dataset = SeededAugmentation(Images(40), lambda example: torch.rand(()).item(), seed=0)
    first = probe_examples(dataset, seed=0)
    dataset.set_epoch(5)
    assert probe_examples(dataset, seed=0) == first
    assert dataset[0] != SeededAugmentation(Images(40), dataset.transform, seed=0)[0]  # still in epoch 5


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        raise AssertionError("Reading a stream would use it up.")


@pytest.mark.parametrize("dataset", [Stream(), iter([1, 2]), None])
def test_without_random_access_there_is_nothing_to_probe(dataset):
    assert probe_examples(dataset, seed=0) == []
