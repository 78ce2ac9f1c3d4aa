"""In training the CPU runs ahead of the device: an attack must not ask for the value of a tensor."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_rft.attacks import ATTACKS, SINGLE_STEP, TRAINING_ATTACKS, pgd
from hf_rft.attacks.base import KLDivergence, log_odds
from hf_rft.losses import LOSSES
from hf_rft.threat_model import ThreatModel


aten = torch.ops.aten

# What waits for the device: a value, a shape that depends on values, or a copy of numbers that Python holds.
WAITS = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.lift_fresh,
}
BY_MASK = {aten.index, aten.index_put, aten.index_put_}


class NoWaiting(TorchDispatchMode):
    """Refuses every operation for which a CPU would wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket in BY_MASK and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func.overloadpacket in WAITS or by_mask:
            raise AssertionError(f"waits for the device: {func}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(4, 3, 6, 5, generator=generator)
    weight = torch.randn(90, 5, generator=generator)
    return lambda images: images.flatten(1) @ weight, pixels, torch.tensor([0, 1, 4, 2])


def generators():
    return [torch.Generator().manual_seed(seed) for seed in range(4)]


@pytest.mark.parametrize("epsilon", ["0.1", torch.full((4,), 0.1)], ids=["one", "each"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("attack", TRAINING_ATTACKS)
def test_training_attacks_do_not_wait(attack, norm, epsilon, batch):
    if attack == "nfgsm" and norm != "linf":
        pytest.skip("defined for L-inf")
    steps = 1 if attack in SINGLE_STEP else 12
    options = {"threat_model": ThreatModel(norm, epsilon), "steps": steps}
    with NoWaiting():
        adversarial = TRAINING_ATTACKS[attack](*batch, generator=generators(), **options)
    assert not torch.equal(adversarial, batch[1])


@pytest.mark.parametrize("attack", ["pgd", "apgd"])
def test_the_attack_of_trades_does_not_wait(attack, batch):
    forward, pixels, labels = batch
    options = {"threat_model": ThreatModel("linf", "0.1"), "steps": 3, "generator": generators()}
    with NoWaiting():
        ATTACKS[attack](forward, pixels, labels, objective=KLDivergence(forward(pixels)), **options)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_do_not_wait(name, batch):
    forward, pixels, labels = batch
    with NoWaiting():
        LOSSES[name].function(forward(pixels), forward(1 - pixels), labels)


@pytest.mark.parametrize("waits", [torch.Tensor.item, torch.Tensor.nonzero, lambda x: x[x > 0], lambda x: bool(x[0])])
def test_waiting_would_be_noticed(waits):
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        waits(torch.ones(1))


def test_early_stop_waits(batch):
    """It must, to leave out the examples already fooled: it is for evaluation only."""
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        pgd(*batch, threat_model=ThreatModel("linf", "0.1"), steps=3, objective=log_odds, early_stop=True)
