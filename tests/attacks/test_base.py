"""What is asked of a user's attack."""

from functools import partial

import pytest
import torch

from hf_rft.attacks import ATTACKS
from hf_rft.attacks.base import checked
from hf_rft.threat_model import NORMS, ThreatModel


every_norm = pytest.mark.parametrize("norm", NORMS)


def overshooting(share):
    """Goes up by epsilon and this share of it: all pixels in L-inf, the first one otherwise."""

    def attack(forward, pixels, labels, *, threat_model, steps, generator=None):
        change = torch.zeros_like(pixels)
        change[:, :1, :1, : pixels.shape[3] if threat_model.norm == "linf" else 1] = 1
        return pixels + change * threat_model.radius(pixels) * (1 + share)

    return attack


@every_norm
@pytest.mark.parametrize("epsilon", ["1/255", torch.tensor([1 / 255, 0.5])], ids=["one", "per example"])
def test_an_attack_may_leave_the_ball_by_rounding_and_no_more(norm, epsilon):
    pixels = torch.full((2, 3, 4, 5), 0.3)
    options = {"threat_model": ThreatModel(norm, epsilon), "steps": 1}
    within = checked(overshooting(1e-5))(None, pixels, torch.tensor([0, 1]), **options)
    assert within.shape == pixels.shape
    with pytest.raises(ValueError, match=f"outside the {norm} ball of radius .*; end it with `threat_model.project`"):
        checked(overshooting(1e-3))(None, pixels, torch.tensor([0, 1]), **options)


@every_norm
@pytest.mark.parametrize("epsilon", [1e-4, 0.01, 1.0])
def test_the_projection_of_a_large_image_is_inside(norm, epsilon):
    def attack(forward, pixels, labels, *, threat_model, steps, generator=None):
        return threat_model.project(pixels + torch.randn(pixels.shape, generator=generator), pixels)

    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand((2, 3, 96, 96), generator=generator)
    threat_model = ThreatModel(norm, epsilon)
    checked(attack)(None, pixels, torch.tensor([0, 1]), threat_model=threat_model, steps=1, generator=generator)


def no_generator(forward, pixels, labels, *, threat_model, steps):
    return pixels


def no_keywords(forward, pixels, labels, epsilon):
    return pixels


def one_more(forward, pixels, labels, strength, *, threat_model, steps, generator=None):
    return pixels


def positional_only_keywords(forward, pixels, labels, threat_model, steps, generator, /):
    return pixels


@pytest.mark.parametrize(
    ("attack", "problem"),
    [
        (no_generator, "unexpected keyword argument 'generator'"),
        (no_keywords, "missing a required argument: 'epsilon'"),
        (one_more, "missing a required argument: 'strength'"),
        (positional_only_keywords, "'threat_model'"),
        (lambda images, labels: images, "too many positional arguments"),
    ],
)
def test_an_attack_with_another_signature_is_refused_when_it_is_passed(attack, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        checked(attack)
    message = str(caught.value)
    assert message.startswith(f"`attack={attack!r}` takes (")
    assert "the signature (forward, pixels, labels, *, threat_model, steps, generator=None)" in message


class Callable:
    def __call__(self, forward, pixels, labels, **options):
        return pixels


@pytest.mark.parametrize(
    "attack",
    [
        *ATTACKS.values(),
        partial(one_more, strength=3),
        Callable(),
        lambda forward, pixels, labels, threat_model, steps, generator: pixels,
        lambda *args, **options: args[1],
        lambda forward, pixels, labels, *, threat_model, steps=7, generator=None, objective=None, early_stop=False: 0,
    ],
)
def test_whatever_can_be_called_as_expected_is_an_attack(attack):
    checked(attack)
