import contextlib

import pytest
import torch
from attacks import linear_classifier
from conftest import make_model

from hf_rft.attacks import apgd, apgd_targeted, fgsm, fmn, pgd, square
from hf_rft.models.classifier import CountedForward, batch_norm_frozen, in_memory_format, in_mode, parameters_frozen
from hf_rft.threat_model import NORMS, ThreatModel


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


@pytest.fixture
def layer():
    """Its parameters require gradients, as those of a model that was just trained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Linear(3, 2)


def test_counts_images_of_every_pass(layer):
    counted = CountedForward(layer)
    assert counted.passes == (0, 0)
    images = torch.rand(5, 3)
    assert torch.equal(counted(images), layer(images))
    with torch.no_grad():
        counted(images[:2])
    assert counted.passes == (7, 0)

    images.requires_grad_()
    torch.autograd.grad(counted(images[:4]).sum(), images)
    assert counted.passes == (11, 4)
    logits = counted(images)
    for output in range(2):
        torch.autograd.grad(logits[:, output].sum(), images, retain_graph=True)
    assert counted.passes == (16, 14)
    counted(images).sum().backward()
    assert counted.passes == (21, 19)


def test_gradient_is_what_it_was(layer):
    images = torch.rand(5, 3, requires_grad=True)
    expected = torch.autograd.grad(layer(images).square().sum(), images)[0]
    assert torch.equal(torch.autograd.grad(CountedForward(layer)(images).square().sum(), images)[0], expected)


def test_counts_are_kept_apart(layer):
    one, other = CountedForward(layer), CountedForward(layer)
    one(torch.rand(2, 3))
    assert one.passes.forward == 2 and other.passes.forward == 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", [fgsm, pgd, apgd, fmn, square])
@pytest.mark.parametrize("trainable", [False, True])
def test_counts_what_an_attack_states(norm, attack, trainable):
    """Of examples that withstand."""
    forward, pixels, labels, distances = linear_classifier(4, norm)
    offset = torch.zeros(4, dtype=torch.float64, requires_grad=trainable)
    counted = CountedForward(lambda images: forward(images) + offset)
    steps, options = (1 if attack is fgsm else 12), ({"targets": 3} if attack is fmn else {})
    attack(counted, pixels, labels, threat_model=ThreatModel(norm, 0.5 * distances), steps=steps, **options)
    stated = attack.passes(steps, norm, **options)
    assert counted.passes == (8 * stated.forward, 8 * stated.backward)


@pytest.mark.parametrize("attack", [pgd, apgd, apgd_targeted, fmn, square])
def test_counts_only_the_examples_that_go_through_the_model(attack):
    """Half are fooled from the start, and cost one pass at most two."""
    forward, pixels, labels, distances = linear_classifier(4, "l2")
    labels[::2] = (labels[::2] + 1) % 4
    options = {"early_stop": True} if attack in (pgd, apgd) else {}
    counts = []
    for chosen in (slice(None), slice(1, None, 2), slice(0, None, 2)):
        counted = CountedForward(forward)
        threat_model = ThreatModel("l2", 1e-6 * distances[chosen])
        attack(counted, pixels[chosen], labels[chosen], threat_model=threat_model, steps=12, **options)
        counts.append(counted.passes)
    together, standing, fooled = counts
    assert together == (standing.forward + fooled.forward, standing.backward + fooled.backward)
    assert 4 <= fooled.forward <= 8 and standing.forward >= 12 * 4
