import pytest
import torch

from hf_rft.attacks import fgsm
from hf_rft.threat_model import ThreatModel

from . import fools, linear_problem


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("seed", range(2))
def test_one_step_from_the_clean_image_solves_a_linear_problem(norm, seed):
    problem = linear_problem(norm, seed)
    for factor, succeeds in ((0.99, False), (1.01, True)):
        threat_model = ThreatModel(norm, factor * problem.distances)
        adversarial = fgsm(
            problem.forward, problem.pixels, problem.labels, threat_model=threat_model, steps=1, random_start=False
        )
        assert torch.equal(fools(problem, adversarial), torch.full((8,), succeeds))


def test_step_is_the_sign_of_the_gradient():
    problem = linear_problem("linf", 0)
    pixels = problem.pixels.clone().requires_grad_()
    torch.nn.functional.cross_entropy(problem.forward(pixels), problem.labels).backward()
    options = {"threat_model": ThreatModel("linf", "0.05"), "random_start": False}
    adversarial = fgsm(problem.forward, problem.pixels, problem.labels, **options)
    torch.testing.assert_close(adversarial, problem.pixels + 0.05 * pixels.grad.sign())
    half = fgsm(problem.forward, problem.pixels, problem.labels, step_size=0.5, **options)
    torch.testing.assert_close(half, problem.pixels + 0.025 * pixels.grad.sign())


def test_step_from_a_random_start_is_longer_by_a_quarter():
    problem = linear_problem("linf", 0)
    threat_model = ThreatModel("linf", "0.05")
    start = threat_model.random_start(problem.pixels, torch.Generator().manual_seed(3))
    pixels = problem.pixels.clone().requires_grad_()
    torch.nn.functional.cross_entropy(problem.forward(pixels), problem.labels).backward()
    adversarial = fgsm(
        problem.forward,
        problem.pixels,
        problem.labels,
        threat_model=threat_model,
        generator=torch.Generator().manual_seed(3),
    )
    expected = threat_model.project(start + 1.25 * 0.05 * pixels.grad.sign(), problem.pixels)
    torch.testing.assert_close(adversarial, expected)


@pytest.mark.parametrize("steps", [0, 2, 7])
def test_takes_one_step_only(steps):
    problem = linear_problem("linf", 0)
    with pytest.raises(ValueError, match=f"FGSM takes exactly one step, got `steps={steps}`; use `pgd` for more"):
        fgsm(problem.forward, problem.pixels, problem.labels, threat_model=ThreatModel("linf", "0.1"), steps=steps)
