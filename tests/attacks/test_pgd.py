import pytest
import torch

from hf_rft.attacks import pgd
from hf_rft.threat_model import NORMS, ThreatModel
from hf_rft.utils.noise import example_generators

from . import fools, linear_problem


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [10, 40])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_succeeds_exactly_when_epsilon_exceeds_the_distance(norm, steps, seed, dtype):
    problem = linear_problem(norm, seed)
    for factor, succeeds in ((0.99, False), (1.01, True)):
        adversarial = pgd(
            problem.forward,
            problem.pixels.to(dtype),
            problem.labels,
            threat_model=ThreatModel(norm, factor * problem.distances),
            steps=steps,
            generator=example_generators("cpu", range(8), seed),
        )
        assert torch.equal(fools(problem, adversarial), torch.full((8,), succeeds))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("early_stop", [False, True])
def test_never_succeeds_below_the_distance(norm, early_stop):
    problem = linear_problem(norm, 0)
    adversarial = pgd(
        problem.forward,
        problem.pixels,
        problem.labels,
        threat_model=ThreatModel(norm, 0.99 * problem.distances),
        steps=40,
        early_stop=early_stop,
    )
    assert not fools(problem, adversarial).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("step_size", [0.01, 0.1])
def test_step_size_is_relative_to_epsilon(norm, step_size):
    """A linear problem has one direction: three short steps go three step sizes far."""
    problem = linear_problem(norm, 0)
    threat_model = ThreatModel(norm, problem.distances)
    adversarial = pgd(
        problem.forward,
        problem.pixels,
        problem.labels,
        threat_model=threat_model,
        steps=3,
        random_start=False,
        step_size=step_size,
    )
    torch.testing.assert_close(
        threat_model.distance(adversarial, problem.pixels), 3 * step_size * problem.distances, rtol=1e-6, atol=0
    )


def test_maximises_the_given_objective():
    """The highest value of -|x - c|^2 in the L2 ball around x lies in the direction of c."""
    generator = torch.Generator().manual_seed(0)
    pixels = 0.4 + 0.2 * torch.rand((4, 1, 3, 3), generator=generator, dtype=torch.float64)
    centre = torch.rand((4, 1, 3, 3), generator=generator, dtype=torch.float64)
    adversarial = pgd(
        lambda images: -(images - centre).square().flatten(1).sum(dim=1, keepdim=True),
        pixels,
        torch.zeros(4, dtype=torch.long),
        threat_model=ThreatModel("l2", "0.1"),
        steps=50,
        step_size=0.2,
        objective=lambda logits, labels: logits[:, 0],
    )
    away = centre - pixels
    expected = pixels + 0.1 * away / away.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-4)
