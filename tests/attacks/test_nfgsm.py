import pytest
import torch
import torch.nn.functional as F

from hf_rft.attacks import ATTACKS, nfgsm
from hf_rft.attacks.base import KLDivergence
from hf_rft.threat_model import ThreatModel
from hf_rft.utils.noise import example_generators, rand

from . import linear_problem


def generators(count=8):
    return example_generators("cpu", range(count), 7)


def noise_of(pixels):
    return 2 * rand(pixels, generators(len(pixels))) - 1


@pytest.fixture
def problem():
    return linear_problem("linf", 0)


def gradient_sign(problem):
    """Of the cross-entropy; on a linear problem with two classes it is the same everywhere."""
    pixels = problem.pixels.clone().requires_grad_()
    F.cross_entropy(problem.forward(pixels), problem.labels, reduction="sum").backward()
    return pixels.grad.sign()


@pytest.mark.parametrize("epsilon", ["0.05", torch.linspace(0.01, 0.08, 8)], ids=["one", "each"])
@pytest.mark.parametrize(("step_size", "length"), [(None, 1.0), (0.5, 0.5)])
def test_closed_form_on_a_linear_problem(problem, epsilon, step_size, length):
    threat_model = ThreatModel("linf", epsilon)
    radius = threat_model.radius(problem.pixels)
    found = nfgsm(
        problem.forward,
        problem.pixels,
        problem.labels,
        threat_model=threat_model,
        generator=generators(),
        step_size=step_size,
    )
    noisy = (problem.pixels + 2 * radius * noise_of(problem.pixels)).clamp(0, 1)
    torch.testing.assert_close(found, (noisy + length * radius * gradient_sign(problem)).clamp(0, 1))


def test_stays_within_three_epsilon_and_the_box_but_leaves_the_ball(problem):
    threat_model = ThreatModel("linf", "0.05")
    found = nfgsm(problem.forward, problem.pixels, problem.labels, threat_model=threat_model, generator=generators())
    distance = (found - problem.pixels).abs().flatten(1).amax(dim=1)
    assert (distance > 0.05).all() and (distance <= 0.15 + 1e-6).all()
    assert found.min() >= 0 and found.max() <= 1


def test_evaluation_does_not_know_it():
    assert "nfgsm" not in ATTACKS


def test_follows_the_objective_of_trades(problem):
    objective = KLDivergence(problem.forward(problem.pixels))
    options = {"threat_model": ThreatModel("linf", "0.05"), "generator": generators()}
    found = nfgsm(problem.forward, problem.pixels, problem.labels, objective=objective, **options)
    noisy = (problem.pixels + 0.1 * noise_of(problem.pixels)).clamp(0, 1).requires_grad_()
    gradient = torch.autograd.grad(objective(problem.forward(noisy), problem.labels).sum(), noisy)[0]
    torch.testing.assert_close(found, (noisy + 0.05 * gradient.sign()).clamp(0, 1).detach())


def test_costs_one_pass(problem):
    calls = []

    def forward(pixels):
        calls.append(len(pixels))
        return problem.forward(pixels)

    nfgsm(forward, problem.pixels, problem.labels, threat_model=ThreatModel("linf", "0.05"))
    assert calls == [8] and nfgsm.passes(1, "linf") == (1, 1)


def test_nothing_to_do_at_epsilon_0(problem):
    threat_model = ThreatModel("linf", 0)
    assert torch.equal(
        nfgsm(problem.forward, problem.pixels, problem.labels, threat_model=threat_model), problem.pixels
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2}, "N-FGSM takes exactly one step, got `steps=2`; use `pgd` for more"),
        ({"random_start": False}, "`random_start=False` leaves out the noise of N-FGSM; use `fgsm`"),
        ({"threat_model": ThreatModel("l2", 0.5)}, "defined for `norm='linf'`, got 'l2'"),
    ],
)
def test_refuses_what_it_is_not_defined_for(problem, options, message):
    options = {"threat_model": ThreatModel("linf", "0.1"), **options}
    with pytest.raises(ValueError, match=message):
        nfgsm(problem.forward, problem.pixels, problem.labels, **options)
