"""What is asked of a user's attack."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from hf_rft.attacks import ATTACKS
from hf_rft.attacks.base import KLDivergence, at_least_float32, checked, dlr, log_odds, margin
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


OBJECTIVES = {"log_odds": log_odds, "margin": margin, "dlr": dlr}


def random_logits(classes, seed, count=6):
    logits = 4 * torch.randn((count, classes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits, torch.arange(count) % classes


@given(st.integers(2, 6), st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_closed_forms(classes, seed):
    logits, labels = random_logits(classes, seed)
    z, rows = logits.numpy(), np.arange(6)
    true = z[rows, labels]
    others = z.copy()
    others[rows, labels] = -np.inf
    margins = others.max(axis=1) - true
    np.testing.assert_allclose(margin(logits, labels), margins)
    odds = np.exp(log_odds(logits, labels).numpy())
    np.testing.assert_allclose(np.log1p(odds), -log_softmax(z, axis=1)[rows, labels])
    ordered = np.sort(z, axis=1)[:, ::-1]
    expected = margins / (ordered[:, 0] - ordered[:, 2]) if classes > 2 else margins
    np.testing.assert_allclose(dlr(logits, labels), expected)
    wrong = logits.argmax(dim=1) != labels
    assert torch.equal(margin(logits, labels) > 0, wrong) and torch.equal(dlr(logits, labels) > 0, wrong)


def test_dlr_does_not_see_the_scale_of_the_logits():
    logits, labels = random_logits(5, 0)
    torch.testing.assert_close(dlr(1000 * logits + 7, labels), dlr(logits, labels))


def test_kl_divergence():
    (clean, labels), (logits, _) = random_logits(4, 0), random_logits(4, 1)
    log_p, log_q = log_softmax(clean.numpy(), axis=1), log_softmax(logits.numpy(), axis=1)
    objective = KLDivergence(clean)
    np.testing.assert_allclose(objective(logits, labels), (np.exp(log_p) * (log_p - log_q)).sum(axis=1))
    np.testing.assert_allclose(objective(clean, labels), 0, atol=1e-12)


def test_kl_divergence_holds_no_graph_of_the_clean_logits():
    clean = torch.randn(2, 3, requires_grad=True)
    objective = KLDivergence(clean)
    other = torch.randn(2, 3, requires_grad=True)
    objective(other, torch.zeros(2, dtype=torch.long)).sum().backward()
    assert clean.grad is None and other.grad is not None


@pytest.mark.parametrize("name", [*OBJECTIVES, "kl"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_half_precision_logits(name, dtype, classes):
    """Computed in float32: large or equal logits give finite values and gradients."""
    logits = torch.zeros(4, classes, dtype=dtype)
    logits[0, 0], logits[1, 1], logits[2] = 3e4, -3e4, 100.0
    logits.requires_grad_()
    objective = KLDivergence(logits.flip(1)) if name == "kl" else OBJECTIVES[name]
    values = objective(logits, torch.zeros(4, dtype=torch.long))
    assert values.dtype == torch.float32 and values.shape == (4,) and values.isfinite().all()
    assert torch.autograd.grad(values.sum(), logits)[0].isfinite().all()


def test_at_least_float32():
    dtypes = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
    for given_dtype, expected in dtypes.items():
        assert at_least_float32(torch.zeros(1, dtype=given_dtype)).dtype == expected


@pytest.mark.parametrize("confidence", [5.0, 20.0, 1000.0])
def test_log_odds_of_a_confident_model_keep_their_gradient(confidence):
    """In float32 the true class's probability rounds to 1 and cross-entropy is flat; the log-odds never are."""
    logits = torch.tensor([[confidence, 0.0, -1.0]], requires_grad=True)
    values = log_odds(logits, torch.tensor([0]))
    np.testing.assert_allclose(values.detach(), np.log(1 + np.exp(-1)) - confidence, rtol=1e-6)
    gradient = torch.autograd.grad(values.sum(), logits)[0]
    others = np.array([1, np.exp(-1)]) / (1 + np.exp(-1))
    np.testing.assert_allclose(gradient[0], [-1, *others], rtol=1e-6)
