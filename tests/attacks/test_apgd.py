import pytest
import torch
from torch import nn

from hf_rft.attacks import apgd, pgd
from hf_rft.attacks.base import dlr, log_odds, margin
from hf_rft.threat_model import NORMS, ThreatModel
from hf_rft.utils.noise import example_generators

from . import fools, linear_problem


@pytest.mark.parametrize(
    ("norm", "steps"), [("linf", 10), ("linf", 100), ("l2", 10), ("l2", 100), ("l1", 100)], ids=str
)
@pytest.mark.parametrize("objective", [log_odds, dlr])
@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_succeeds_exactly_when_epsilon_exceeds_the_distance(norm, steps, objective, early_stop, seed):
    problem = linear_problem(norm, seed)
    for factor, succeeds in ((0.99, False), (1.01, True)):
        adversarial = apgd(
            problem.forward,
            problem.pixels.float(),
            problem.labels,
            threat_model=ThreatModel(norm, factor * problem.distances),
            steps=steps,
            generator=example_generators("cpu", range(8), seed),
            objective=objective,
            early_stop=early_stop,
        )
        assert torch.equal(fools(problem, adversarial), torch.full((8,), succeeds))


@pytest.fixture(scope="module")
def relu_network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)
        )
    for parameter in model.parameters():
        parameter.data *= 3
    pixels = torch.rand((32, 3, 4, 4), generator=torch.Generator().manual_seed(1))
    return model.double(), pixels.double(), model(pixels.double()).argmax(dim=1)


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", "0.05"), ("l2", "0.3"), ("l1", "1.5")])
@pytest.mark.parametrize("steps", [10, 40])
def test_is_at_least_as_good_as_pgd(norm, epsilon, steps, relu_network):
    model, pixels, labels = relu_network
    losses = {}
    for attack in (pgd, apgd):
        adversarial = attack(model, pixels, labels, threat_model=ThreatModel(norm, epsilon), steps=steps)
        losses[attack] = log_odds(model(adversarial), labels).mean().item()
    assert losses[apgd] >= losses[pgd] > log_odds(model(pixels), labels).mean()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("steps", [7, 30])
def test_returns_the_best_point_it_looked_at(norm, steps, relu_network):
    model, pixels, labels = relu_network
    looked_at = []

    def forward(images):
        looked_at.append(images.detach())
        return model(images)

    threat_model = ThreatModel(norm, {"linf": "0.05", "l2": "0.3", "l1": "1.5"}[norm])
    adversarial = apgd(forward, pixels, labels, threat_model=threat_model, steps=steps, objective=margin)
    allowed = looked_at[-(apgd.passes(steps, norm).forward - sum(phase_is_wider(norm, steps))) :]
    values = torch.stack([margin(model(images), labels) for images in allowed])
    torch.testing.assert_close(margin(model(adversarial), labels), values.amax(dim=0))


def phase_is_wider(norm, steps):
    """Forward passes of the L1 phases with 3 and 2 times epsilon: 30 % of the steps each, and one more."""
    return [int(0.3 * steps) + 1] * 2 if norm == "l1" and steps >= 10 else []


class Watched:
    """A linear model whose gradient never vanishes, which keeps the images it is asked about."""

    def __init__(self, pixels):
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn((pixels[0].numel(), 2), generator=generator, dtype=pixels.dtype)
        self.images = []

    def __call__(self, images):
        self.images.append(images.detach())
        return images.flatten(1) @ self.weight


def changed(images, pixels):
    return (images != pixels).flatten(1).sum(dim=1)


@pytest.fixture
def grey():
    return torch.full((4, 1, 16, 16), 0.5, dtype=torch.float64)


def test_l1_starts_from_gaussian_noise_projected_onto_three_times_the_ball(grey):
    model, generator = Watched(grey), torch.Generator().manual_seed(3)
    noise = torch.randn(grey.shape, generator=torch.Generator().manual_seed(3), dtype=grey.dtype)
    apgd(model, grey, torch.zeros(4).long(), threat_model=ThreatModel("l1", 1), steps=10, generator=generator)
    start = model.images[0]
    assert torch.equal(start, ThreatModel("l1", 3).project(grey + noise, grey))
    torch.testing.assert_close((start - grey).abs().flatten(1).sum(dim=1), torch.full((4,), 3.0).double())
    assert (changed(start, grey) < 0.1 * 256).all()


@pytest.mark.parametrize(("norm", "steps"), [("l1", 9), ("l2", 10), ("linf", 10)])
def test_other_runs_start_from_a_uniform_point(norm, steps, grey):
    model, threat_model = Watched(grey), ThreatModel(norm, 0.1)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    apgd(model, grey, torch.zeros(4).long(), threat_model=threat_model, steps=steps, generator=generators[0])
    assert torch.equal(model.images[0], threat_model.random_start(grey, generators[1]))


def test_l1_first_step_of_a_phase_moves_two_thirds_of_the_coordinates_of_its_start(grey, monkeypatch):
    """A phase of 10 steps reconsiders that at each of them; its first step knows its start only."""
    moved, step = [], ThreatModel.step

    def record(self, *args):
        moved.append(changed(step(self, *args), torch.zeros_like(grey)))
        return step(self, *args)

    monkeypatch.setattr(ThreatModel, "step", record)
    model = Watched(grey)
    apgd(model, grey, torch.zeros(4).long(), threat_model=ThreatModel("l1", 1), steps=20)
    starts = model.images[0], model.images[7], model.images[14]  # phases of 6, 6 and 8 steps, a last look each
    for start, count in zip(starts, (moved[0], moved[6], moved[12]), strict=True):
        assert torch.equal(count, (changed(start, grey) / 1.5).long().clamp_min(1))


@pytest.mark.parametrize("random_start", [False, True])
def test_l1_first_step_moves_a_fifth_of_the_coordinates_where_the_start_is_clean_or_dense(
    random_start, grey, monkeypatch
):
    moved, step = [], ThreatModel.step

    def record(self, *args):
        moved.append(changed(step(self, *args), torch.zeros_like(grey)))
        return step(self, *args)

    monkeypatch.setattr(ThreatModel, "step", record)
    options = {"threat_model": ThreatModel("l1", 1), "random_start": random_start}
    apgd(Watched(grey), grey, torch.zeros(4).long(), steps=9 if random_start else 10, **options)
    assert (moved[0] == 256 // 5).all()


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", "0.2"), ("l2", "0.8")])
def test_step_halves_until_it_finds_the_top_of_a_concave_objective(norm, epsilon):
    generator = torch.Generator().manual_seed(0)
    pixels = 0.4 + 0.2 * torch.rand((4, 1, 4, 4), generator=generator, dtype=torch.float64)
    top = pixels + 0.1 * torch.rand((4, 1, 4, 4), generator=generator, dtype=torch.float64)
    threat_model = ThreatModel(norm, epsilon)
    assert (threat_model.distance(top, pixels) < 0.8 * float(threat_model.epsilon)).all()

    def forward(images):
        return -(images - top).square().flatten(1).sum(dim=1, keepdim=True)

    def gap(attack, steps):
        adversarial = attack(
            forward,
            pixels,
            torch.zeros(4, dtype=torch.long),
            threat_model=threat_model,
            steps=steps,
            step_size=2.0,
            objective=lambda logits, labels: logits[:, 0],
        )
        return threat_model.distance(adversarial, top).max() / float(threat_model.epsilon)

    # The first step is 2 epsilon long; a fixed one never settles.
    assert gap(pgd, 100) > 0.5 > 0.2 > gap(apgd, 30)
    assert gap(apgd, 100) < 2 / 2**6


@pytest.mark.parametrize(("norm", "default"), [("linf", 2.0), ("l2", 2.0), ("l1", 1.0)])
def test_length_of_the_first_step(norm, default):
    problem = linear_problem(norm, 0)
    threat_model = ThreatModel(norm, problem.distances)
    options = {"threat_model": threat_model, "steps": 1, "random_start": False}
    for step_size in (0.1, 0.4):
        adversarial = apgd(problem.forward, problem.pixels, problem.labels, step_size=step_size, **options)
        moved = threat_model.distance(adversarial, problem.pixels)
        torch.testing.assert_close(moved, step_size * problem.distances, rtol=1e-6, atol=0)
    by_default = apgd(problem.forward, problem.pixels, problem.labels, **options)
    explicit = apgd(problem.forward, problem.pixels, problem.labels, step_size=default, **options)
    assert torch.equal(by_default, explicit)


def test_examples_that_stall_do_not_slow_the_others():
    """Halving is per example: a flat example beside a linear one changes nothing for it."""
    problem = linear_problem("l2", 0)

    def with_flat_examples(images):
        logits = problem.forward(images)
        return torch.cat([logits[:4], 0 * logits[4:]])

    options = {"threat_model": ThreatModel("l2", 1.01 * problem.distances), "steps": 30, "random_start": False}
    expected = apgd(problem.forward, problem.pixels, problem.labels, **options)
    adversarial = apgd(with_flat_examples, problem.pixels, problem.labels, **options)
    torch.testing.assert_close(adversarial[:4], expected[:4])
    assert torch.equal(adversarial[4:], problem.pixels[4:])


@pytest.mark.parametrize("norm", NORMS)
def test_flat_objective_gives_a_finite_result(norm):
    pixels = torch.rand((3, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    adversarial = apgd(
        lambda images: 0 * images.flatten(1)[:, :3],
        pixels,
        torch.tensor([0, 1, 2]),
        threat_model=ThreatModel(norm, "0.1"),
        steps=20,
        random_start=False,
    )
    assert torch.equal(adversarial, pixels)
