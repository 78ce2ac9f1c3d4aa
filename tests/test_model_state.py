import contextlib

import pytest
import torch
from conftest import make_model

from hf_rft.model_state import batch_norm_frozen, in_memory_format, in_mode, parameters_frozen


@pytest.fixture
def mixed():
    """A model with every kind of module in both modes, and some parameters frozen."""
    model = make_model("resnet")
    for number, module in enumerate(model.modules()):
        module.training = number % 3 > 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad = number % 3 > 0
    return model


def state(model):
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("context", "holds"),
    [
        (lambda model: in_mode(model, training=False), lambda model: not any(m.training for m in model.modules())),
        (lambda model: in_mode(model, training=True), lambda model: all(m.training for m in model.modules())),
        (parameters_frozen, lambda model: not any(p.requires_grad for p in model.parameters())),
        (
            batch_norm_frozen,
            lambda model: not any(m.training for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)),
        ),
    ],
    ids=["eval", "train", "parameters", "batch norm"],
)
def test_state_comes_back_also_after_an_error(mixed, context, holds):
    before = state(mixed)
    assert not holds(mixed)
    with context(mixed):
        assert holds(mixed)
        assert state(mixed) != before
    assert state(mixed) == before
    with pytest.raises(RuntimeError, match="inside"), context(mixed):
        raise RuntimeError("inside")
    assert state(mixed) == before


def test_batch_norm_without_running_statistics_is_not_touched():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(2, track_running_stats=False), torch.nn.Dropout())
    with batch_norm_frozen(model):
        assert all(module.training for module in model)


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_memory_format_comes_back_with_the_very_same_tensors(family, interrupted):
    model = make_model(family)
    before = {name: (p.data_ptr(), p.stride(), p.clone()) for name, p in model.named_parameters()}
    convolutions = [module.weight for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert not all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
    with contextlib.suppress(KeyboardInterrupt), in_memory_format(model, torch.channels_last):
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
        assert all(torch.equal(p, before[name][2]) for name, p in model.named_parameters())
        if interrupted:
            raise KeyboardInterrupt
    for name, parameter in model.named_parameters():
        assert (parameter.data_ptr(), parameter.stride()) == before[name][:2]
