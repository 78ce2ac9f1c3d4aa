import pytest
import torch
from torch import nn

from hf_rft.attacks import apgd, apgd_targeted
from hf_rft.attacks.base import targeted_dlr
from hf_rft.threat_model import ThreatModel
from hf_rft.utils.noise import example_generators

from . import fools, linear_classifier, linear_problem
from .test_attacks import EPSILONS, Recorded, every_norm, make_batch, make_model


@every_norm
@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_succeeds_exactly_beyond_the_nearest_plane(norm, classes):
    forward, pixels, labels, distances = linear_classifier(classes, norm)
    for factor, succeeds in ((0.99, False), (1.01, True)):
        threat_model = ThreatModel(norm, factor * distances)
        adversarial = apgd_targeted(forward, pixels, labels, threat_model=threat_model, steps=100)
        assert ((forward(adversarial).argmax(dim=1) != labels) == succeeds).all()
        assert (threat_model.distance(adversarial, pixels) <= factor * distances * (1 + 1e-6)).all()


@every_norm
def test_two_classes_of_the_shared_problem(norm):
    problem = linear_problem(norm, 0)
    adversarial = apgd_targeted(
        problem.forward,
        problem.pixels.float(),
        problem.labels,
        threat_model=ThreatModel(norm, 1.01 * problem.distances),
        steps=100,
    )
    assert fools(problem, adversarial).all()


@every_norm
def test_fooled_examples_cost_no_more_passes(norm):
    model, (pixels, labels) = make_model(), make_batch(count=12)
    labels[:9] = model(pixels)[:9].argmax(dim=1)
    recorded = Recorded(model)
    steps, threat_model = 5, ThreatModel(norm, EPSILONS[norm] / 3)
    adversarial = apgd_targeted(recorded, pixels, labels, threat_model=threat_model, steps=steps)
    right = model(adversarial).argmax(dim=1) == labels
    assert 0 < right.sum() < 12
    forward, backward = apgd_targeted.passes(steps, norm, targets=3)
    # What withstands every target costs all passes.
    assert recorded.count["forward"] == forward
    assert recorded.count["backward"] == backward
    assert sum(len(images) for images in recorded.images) < 12 * forward
    assert torch.equal(
        adversarial[model(pixels).argmax(dim=1) != labels], pixels[model(pixels).argmax(dim=1) != labels]
    )


def test_finds_what_the_untargeted_attack_does_not():
    """On a random ReLU network, after APGD with cross-entropy, and with one epsilon and generator an example."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 10)).requires_grad_(False)
    pixels, _ = make_batch(count=96, height=4, width=4)
    labels = model(pixels).argmax(dim=1)
    epsilons = torch.linspace(0.01, 0.06, 96)
    right = []
    for attack in (apgd, apgd_targeted):
        generator = example_generators("cpu", range(96), 0)
        adversarial = attack(
            model, pixels, labels, threat_model=ThreatModel("linf", epsilons), steps=20, generator=generator
        )
        right.append((model(adversarial).argmax(dim=1) == labels).sum().item())
    assert 0 < right[1] <= right[0] < 96


def test_targeted_dlr_is_the_published_ratio():
    logits = torch.tensor([[3.0, 1.0, 0.5, -1.0, -2.0]])
    value = targeted_dlr(logits, torch.tensor([0]), targets=torch.tensor([1]))
    assert value.item() == pytest.approx((1 - 3) / (3 - (0.5 - 1) / 2))
    few = targeted_dlr(logits[:, :3], torch.tensor([0]), targets=torch.tensor([2]))
    assert few.item() == pytest.approx(0.5 - 3)


def test_bad_number_of_targets():
    pixels, labels = make_batch()
    with pytest.raises(ValueError, match="`targets=0` must be at least 1"):
        apgd_targeted(make_model(), pixels, labels, threat_model=ThreatModel("linf", 0.1), steps=1, targets=0)


def test_epsilon_zero_asks_the_model_nothing():
    pixels, labels = make_batch()
    adversarial = apgd_targeted(None, pixels, labels, threat_model=ThreatModel("linf", 0), steps=1)
    assert torch.equal(adversarial, pixels)
