import contextlib

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import SIZE, make_model, weights, without_dropout
from torch import nn
from transformers import AutoModelForImageClassification, TimmWrapperConfig

from hf_rft.attacks import pgd
from hf_rft.models.classifier import under_attack
from hf_rft.models.folding import exactly_foldable_pairs, find_foldable_pairs, folded, folded_weights, folding_is_exact
from hf_rft.threat_model import ThreatModel


@pytest.fixture(scope="module", params=["resnet", "timm", "tf_efficientnet_lite0"])
def model(request):
    """One traced in parts, one as a whole, and one whose convolutions pad by the size of the image."""
    if request.param == "tf_efficientnet_lite0":
        torch.manual_seed(0)
        config = TimmWrapperConfig(architecture=request.param, num_labels=4)
        model = AutoModelForImageClassification.from_config(config)
    else:
        model = make_model(request.param)
    return with_statistics(model).eval()


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def with_statistics(model):
    """As if trained: fresh BatchNorms hardly change what passes through, and those of timm let nothing pass."""
    for module in batch_norms(model):
        nn.init.normal_(module.running_mean, std=0.3)
        nn.init.uniform_(module.running_var, 0.5, 2.0)
        nn.init.uniform_(module.weight, 0.5, 2.0)
        nn.init.normal_(module.bias)
    return model


def images(count=4):
    return torch.rand(count, 3, 2 * SIZE, 2 * SIZE, generator=torch.Generator().manual_seed(0))


def logits(model):
    return lambda pixels: model(pixel_values=pixels).logits


def test_every_batch_norm_of_the_known_families_is_found(model):
    pairs = find_foldable_pairs(model)
    assert {id(pair.batch_norm) for pair in pairs} == {id(module) for module in batch_norms(model)}
    assert exactly_foldable_pairs(model) == pairs


def test_logits_are_the_same_up_to_rounding(model):
    expected = logits(model)(images())
    with folded(folded_weights(find_foldable_pairs(model))):
        found = logits(model)(images())
    assert not torch.equal(found, expected)  # something was folded
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_everything_comes_back_also_after_an_error(model):
    before, parameters = weights(model), dict(model.named_parameters())
    entries = {module: dict(vars(module)) for module in model.modules()}
    with contextlib.suppress(KeyError), folded(folded_weights(find_foldable_pairs(model))):
        raise KeyError
    after = dict(model.named_parameters())
    assert list(after) == list(parameters) and all(after[name] is parameters[name] for name in after)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(vars(module).keys() == entry.keys() for module, entry in entries.items())


def test_the_present_weights_are_folded():
    model = make_model("timm").eval()
    pairs = find_foldable_pairs(model)
    with torch.no_grad():
        for module in batch_norms(model):
            module.weight.mul_(1.5)
            module.running_mean.add_(0.1)
    assert folding_is_exact(model, pairs, images())


def test_attack_is_the_same_up_to_rounding():
    """In L2, whose steps are smooth in the gradient: in L-inf, its sign makes rounding large."""
    model = with_statistics(make_model("timm")).double().eval()
    labels = torch.tensor([0, 1, 2, 3])
    options = {"threat_model": ThreatModel("l2", "0.5"), "steps": 3}
    found = []
    for pairs in ([], find_foldable_pairs(model)):
        with under_attack(model, training=False), folded(folded_weights(pairs)):
            found.append(pgd(logits(model), images().double(), labels, **options))
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)


# --- What must not be folded ---


class Part(nn.Module):
    """A convolution and a BatchNorm, used in a way that subclasses choose."""

    def __init__(self, **options):
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3, **options)

    def forward(self, images):
        return self.norm(self.convolution(images))


class UsesTheConvolutionTwice(Part):
    def forward(self, images):
        return self.norm(self.convolution(self.convolution(images)))


class UsesTheOutputTwice(Part):
    def forward(self, images):
        images = self.convolution(images)
        return self.norm(images) + images


class UsesTheWeight(Part):
    def forward(self, images):
        return super().forward(images) * self.convolution.weight.sum()


class LooksAtValues(Part):
    def forward(self, images):
        return super().forward(images) if images.sum() > 0 else images


class ScaledConvolution(nn.Conv2d):
    """As in networks without normalisation: a factor in the weights changes nothing."""

    def forward(self, input):
        return nn.functional.conv2d(input, self.weight / self.weight.std(), self.bias)


def with_scaled_convolution():
    part = Part()
    part.convolution = ScaledConvolution(3, 3, 1)
    return part


def with_hook():
    part = Part()
    part.convolution.register_forward_hook(lambda *_: None)
    return part


def with_hook_of_accelerate(name):
    part = Part()
    add_hook_to_module(part.get_submodule(name), ModelHook())
    return part


def shared():
    part = Part()
    return nn.ModuleList([part, nn.Sequential(part.convolution)])


@pytest.mark.parametrize(
    "make",
    [
        *(UsesTheConvolutionTwice, UsesTheOutputTwice, UsesTheWeight, LooksAtValues),
        *(with_scaled_convolution, with_hook, shared),
        lambda: with_hook_of_accelerate("convolution"),
        lambda: with_hook_of_accelerate("norm"),
        lambda: Part(track_running_stats=False),
        lambda: Part().bfloat16(),
    ],
)
def test_what_folding_would_change_is_left_alone(make):
    assert find_foldable_pairs(make()) == []


@pytest.mark.parametrize("name", ["convolution", "norm"])
def test_a_forward_that_was_replaced_after_the_search_is_used_and_kept(name):
    part = with_statistics(Part()).eval()
    pairs = find_foldable_pairs(part)
    module = part.get_submodule(name)
    original = module.forward
    module.forward = lambda images: original(images) + 1
    replaced, expected = module.forward, part(images())
    with folded(folded_weights(pairs)):
        assert torch.equal(part(images()), expected)
    assert module.forward is replaced


def test_plain_part_is_folded():
    assert len(find_foldable_pairs(nn.ModuleList([Part(), LooksAtValues()]))) == 1


def test_a_use_that_the_traced_part_does_not_show_is_noticed():
    model = make_model("resnet").eval()
    layer = model.resnet.embedder.embedder
    for module in batch_norms(model):
        nn.init.normal_(module.bias)

    class Outer(nn.Module):
        def forward(self, pixel_values):
            if pixel_values.sum() < 0:
                return None  # no tracer follows here
            output = model(pixel_values=pixel_values)
            output.logits = output.logits + layer.convolution(pixel_values).mean()
            return output

    outer = Outer()
    outer.model = model
    pairs = find_foldable_pairs(outer)
    assert pairs
    assert folding_is_exact(model, pairs, images())
    assert not folding_is_exact(outer, pairs, images())


# --- In training ---


@pytest.mark.parametrize("family", ["resnet", "timm"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_training_folds_in_evaluation_mode_only(make_trainer, family, mode):
    seen = []

    def attack(forward, pixels, labels, **options):
        seen.append("forward" in vars(batch_norms(trainer.model)[0]))
        return pgd(forward, pixels, labels, **options)

    trainer = make_trainer(family, count=8, max_steps=2, attack_model_mode=mode, trainer_options={"attack": attack})
    trainer.train()
    assert seen == [mode == "eval"] * 2
    assert not any("forward" in vars(module) for module in batch_norms(trainer.model))


@pytest.mark.parametrize("family", ["resnet", "timm"])
def test_training_is_the_same_up_to_rounding(make_trainer, family):
    ends = []
    for is_folded in (True, False):
        model = with_statistics(without_dropout(make_model(family))).double()
        trainer = make_trainer(model, max_steps=3, norm="l2", epsilon="0.5", learning_rate=1e-3)
        assert trainer.adversary.foldable_pairs
        if not is_folded:
            trainer.adversary.foldable_pairs = ()
        trainer.train()
        ends.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)
