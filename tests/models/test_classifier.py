import contextlib

import pytest
import torch
from attacks import linear_classifier
from conftest import SIZE, make_model
from transformers.modeling_outputs import ImageClassifierOutput

from hf_rft.attacks import apgd, apgd_targeted, fgsm, fmn, pgd, square
from hf_rft.models.classifier import (
    CountedForward,
    PixelClassifier,
    batch_norm_frozen,
    in_memory_format,
    in_mode,
    logits_of,
    parameters_frozen,
)
from hf_rft.models.pixel_space import PixelNormalization
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


# --- A classifier as a function of pixels ---

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.5, 0.25)
NORMALIZATION = PixelNormalization(MEAN, STD)


class Plain(torch.nn.Module):
    """No model of transformers: takes images by position, and returns what `output` makes of the logits."""

    def __init__(self, output=lambda logits: logits):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 9).reshape(3, 3).sin())
        self.output = output

    def forward(self, images):
        return self.output(images.mean(dim=(2, 3)) @ self.weight)


@pytest.fixture
def pixels():
    return torch.rand((2, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0))


def normalised(pixels):
    return (pixels - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)


@pytest.mark.parametrize(
    "output",
    [lambda x: x, lambda x: {"logits": x}, lambda x: ImageClassifierOutput(logits=x)],
    ids=["tensor", "dictionary", "output"],
)
def test_logits_are_those_of_the_normalised_pixels(pixels, output):
    model = Plain(output)
    logits = PixelClassifier(model, NORMALIZATION)(pixels)
    torch.testing.assert_close(logits, normalised(pixels).mean(dim=(2, 3)) @ model.weight)


def test_images_go_by_name_if_that_is_asked_for(pixels):
    model, keywords = make_model("vit").eval(), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: keywords.append((args, set(kwargs))), with_kwargs=True
    )
    logits = PixelClassifier(model, NORMALIZATION, by_name=True)(pixels, interpolate_pos_encoding=True)
    assert keywords == [((), {"pixel_values", "interpolate_pos_encoding"})]
    torch.testing.assert_close(logits, model(pixel_values=normalised(pixels)).logits)


def test_pixels_reach_the_model_in_its_precision(pixels):
    classifier = PixelClassifier(Plain().double(), NORMALIZATION)
    assert classifier.pixel_values(pixels).dtype == classifier(pixels).dtype == torch.float64


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"scores": torch.zeros(2, 3)}, "returned no `logits`"),
        (ImageClassifierOutput(), "returned no `logits`"),
        (None, "returned no `logits`"),
        (torch.zeros(2, 1), r"returned logits of shape \(2, 1\); .* at least 2 classes"),
        ({"logits": torch.zeros(2, 3, 4)}, r"returned logits of shape \(2, 3, 4\)"),
    ],
    ids=["other key", "empty output", "nothing", "one class", "three dimensions"],
)
def test_outputs_without_logits_of_several_classes_are_refused(outputs, message):
    with pytest.raises(ValueError, match=message):
        logits_of(outputs)


def test_forward_in_computes_in_that_precision_whatever_surrounds_it(pixels):
    classifier = PixelClassifier(Plain(), NORMALIZATION)
    assert classifier.forward_in(torch.bfloat16)(pixels).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert classifier(pixels).dtype == torch.bfloat16
        own = classifier.forward_in(None)(pixels)
    assert own.dtype == torch.float32 and torch.equal(own, classifier(pixels))


@pytest.mark.parametrize("training", [False, True])
def test_modes_and_flags_come_back_after_an_attack(mixed, training):
    before = state(mixed)
    with contextlib.suppress(KeyboardInterrupt), PixelClassifier(mixed, NORMALIZATION).under_attack(training=training):
        assert mixed.classifier.training == training
        assert not any(m.training for m in mixed.modules() if isinstance(m, torch.nn.BatchNorm2d))
        assert not any(p.requires_grad for p in mixed.parameters()) and torch.is_grad_enabled()
        raise KeyboardInterrupt
    assert state(mixed) == before


def test_whole_weights_are_the_model_where_nothing_is_divided():
    model = Plain()
    with PixelClassifier(model, NORMALIZATION).whole_weights() as whole:
        assert whole is model
