import pytest
import torch

from hf_rft.attacks import apgd_targeted, malt
from hf_rft.attacks.base import nearest_classes
from hf_rft.threat_model import ThreatModel

from . import linear_classifier
from .test_attacks import every_norm, make_batch, make_model


def distances_by_hand(forward, pixels, labels, norm):
    """Of a linear classifier, whose gradients are the differences of its weights: inf for the true class."""
    leaf = pixels.clone().requires_grad_()
    logits = forward(leaf)
    columns = []
    for target in range(logits.shape[1]):
        lead = logits.gather(1, labels[:, None]).squeeze(1) - logits[:, target]
        (gradient,) = torch.autograd.grad(lead.sum(), leaf, retain_graph=True)
        dual = {"linf": 1, "l2": 2, "l1": torch.inf}[norm]
        slope = torch.linalg.vector_norm(gradient.flatten(1), ord=dual, dim=1)
        columns.append(torch.where(labels == target, torch.inf, lead.detach() / slope))
    return torch.stack(columns, dim=1)


@every_norm
def test_classes_are_ordered_by_the_distance_of_their_plane(norm):
    forward, pixels, labels, _ = linear_classifier(10, norm)
    classes, fooled = nearest_classes(forward, pixels, labels, ThreatModel(norm, 0.1), 9)
    expected = distances_by_hand(forward, pixels, labels, norm)
    assert torch.equal(classes, expected.argsort(dim=1)[:, :9]) and not fooled.any()
    few, _ = nearest_classes(forward, pixels, labels, ThreatModel(norm, 0.1), 2)
    largest = forward(pixels).scatter(1, labels[:, None], -torch.inf).topk(2, dim=1).indices
    assert torch.equal(few.sort(dim=1).values, largest.sort(dim=1).values), "candidates are those with large logits"
    assert (expected.gather(1, few).diff(dim=1) >= 0).all()


@every_norm
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_one_target_succeeds_exactly_beyond_the_nearest_plane(norm, classes):
    forward, pixels, labels, distances = linear_classifier(classes, norm)
    for factor, succeeds in ((0.99, False), (1.01, True)):
        threat_model = ThreatModel(norm, factor * distances)
        adversarial = malt(forward, pixels, labels, threat_model=threat_model, steps=100, targets=1)
        assert ((forward(adversarial).argmax(dim=1) != labels) == succeeds).all()


def test_with_all_classes_it_fools_what_the_other_order_fools():
    model, (pixels, labels) = make_model(dtype=torch.float64), make_batch(count=12, dtype=torch.float64)
    labels[:9] = model(pixels)[:9].argmax(dim=1)
    options = {"threat_model": ThreatModel("linf", 0.03), "steps": 20, "random_start": False, "targets": 3}
    fooled = [
        model(attack(model, pixels, labels, **options)).argmax(dim=1) != labels for attack in (apgd_targeted, malt)
    ]
    assert torch.equal(*fooled) and 0 < fooled[0].sum() < 12


@pytest.mark.parametrize("argument", ["targets", "candidates"])
def test_bad_numbers_of_classes(argument):
    pixels, labels = make_batch()
    with pytest.raises(ValueError, match=f"`{argument}=0` must be at least 1"):
        malt(make_model(), pixels, labels, threat_model=ThreatModel("linf", 0.1), steps=1, **{argument: 0})


def test_epsilon_zero_asks_the_model_nothing():
    pixels, labels = make_batch()
    assert torch.equal(malt(None, pixels, labels, threat_model=ThreatModel("linf", 0), steps=1), pixels)
