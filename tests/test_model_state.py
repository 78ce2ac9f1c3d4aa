import pytest
import torch
from conftest import make_model

from hf_rft.model_state import batch_norm_frozen, in_mode, parameters_frozen


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
