import pytest
import torch

from hf_rft.attacks import square
from hf_rft.attacks.base import margin
from hf_rft.threat_model import ThreatModel
from hf_rft.utils.noise import example_generators

from . import fools, linear_problem
from .test_attacks import EPSILONS, Recorded, every_norm, make_problem


SHAPES = [(3, 5, 9), (1, 9, 5), (3, 2, 3), (3, 1, 1), (1, 12, 26)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def run(forward, pixels, labels, norm, epsilon, steps):
    """With one generator an example."""
    generator = example_generators("cpu", range(len(pixels)), 0)
    threat_model = ThreatModel(norm, epsilon)
    return square(forward, pixels, labels, threat_model=threat_model, steps=steps, generator=generator)


class Withstands:
    """A model that is right about everything and keeps what it is asked about.

    Without `moves`, no change is progress, so that each query is a change of the first one. With it, half of them are.
    """

    def __init__(self, moves=False):
        self.moves = moves
        self.images = []

    def __call__(self, pixels):
        self.images.append(pixels.clone())
        wrong = 0.5 * torch.sin(1e4 * pixels.flatten(1).sum(dim=1)) * self.moves
        return torch.stack([torch.ones_like(wrong), wrong], dim=1)


def queries_about(pixels, norm, epsilon, steps, moves):
    model = Withstands(moves)
    run(model, pixels, torch.zeros(len(pixels), dtype=torch.long), norm, epsilon, steps)
    assert {len(images) for images in model.images} == {len(pixels)}
    return model.images


def grey(shape, count=4):
    """Images for which the box does not bind."""
    generator = torch.Generator().manual_seed(0)
    return 0.4 + 0.2 * torch.rand((count, *shape), generator=generator, dtype=torch.float64)


def bright_and_dark(shape, count=4):
    generator = torch.Generator().manual_seed(0)
    return (1.4 * torch.rand((count, *shape), generator=generator) - 0.2).clamp(0, 1)


@every_norm
def test_asks_for_predictions_only(norm):
    model, pixels, labels = make_problem(wrong=0)

    def forward(images):
        assert not images.requires_grad and not torch.is_grad_enabled()
        return model(images)

    recorded = Recorded(forward)
    adversarial = square(recorded, pixels, labels, threat_model=ThreatModel(norm, EPSILONS[norm]), steps=9)
    assert recorded.count["backward"] == 0 and 2 <= recorded.count["forward"] <= 10
    assert not torch.equal(adversarial, pixels)


@every_norm
@pytest.mark.parametrize("steps", [1, 30])
def test_passes_of_an_example_that_withstands(norm, steps):
    queries = queries_about(grey((3, 5, 9)), norm, 0.01, steps, moves=True)
    assert (len(queries), 0) == square.passes(steps, norm)


@every_norm
@every_shape
@pytest.mark.parametrize("strength", [0.1, 8.0])
def test_every_query_is_in_ball_and_box(norm, shape, strength):
    pixels = bright_and_dark(shape)
    epsilon = (strength * EPSILONS[norm] * torch.tensor([0.2, 0.5, 1.0, 0.0])).clamp_max(1)
    queries = queries_about(pixels, norm, epsilon, 40, moves=True)
    for images in queries:
        assert images.min() >= 0 and images.max() <= 1
        assert (ThreatModel(norm, 1).distance(images, pixels) <= epsilon * (1 + 1e-5) + 1e-6).all()
    assert len(torch.stack(queries).unique(dim=0)) > 20


@every_norm
@every_shape
def test_every_query_spends_the_whole_budget(norm, shape):
    """Where the box does not bind, each image lies on the sphere; but in a single pixel, changes may cancel."""
    pixels = grey(shape)
    for images in queries_about(pixels, norm, 0.01, 40, moves=True):
        distance = ThreatModel(norm, 1).distance(images, pixels)
        nothing_left = distance == 0 if norm != "linf" and shape[1:] == (1, 1) else torch.zeros(4, dtype=torch.bool)
        expected = torch.where(nothing_left, 0, 0.01).to(distance)
        torch.testing.assert_close(distance, expected, rtol=1e-6, atol=0)


@every_shape
@pytest.mark.parametrize("epsilon", [0.05, 0.4])
def test_linf_pixels_are_at_plus_or_minus_epsilon_or_at_the_edge_of_the_box(shape, epsilon):
    pixels = bright_and_dark(shape)
    queries = queries_about(pixels, "linf", epsilon, 40, moves=True)
    up, down = (pixels + epsilon).clamp_max(1), (pixels - epsilon).clamp_min(0)
    assert all(((images == up) | (images == down)).all() for images in queries)


def test_linf_starts_with_vertical_stripes():
    """One sign for each channel and column."""
    pixels = grey((3, 6, 8))
    signs = (queries_about(pixels, "linf", 0.01, 1, moves=False)[0] - pixels).sign()
    assert torch.equal(signs, signs[:, :, :1].expand_as(signs))
    assert len(signs[:, :, 0].unique(dim=0)) == 4
    assert signs[:, :, 0].sum().abs() < 96 / 2


@every_norm
def test_keeps_the_best_of_what_it_looked_at(norm):
    """Returned is the first misclassified image, or else the one with the largest margin; nobody is asked about after
    it was fooled."""
    model, pixels, labels = make_problem(24, dtype=torch.float64, wrong=4)
    recorded = Recorded(model)
    adversarial = run(recorded, pixels, labels, norm, EPSILONS[norm] / 3, 60)
    standing, best, best_margin = torch.arange(24), pixels.clone(), torch.full((24,), -torch.inf).double()
    for images in recorded.images:
        assert len(images) == len(standing)
        margins = margin(model(images), labels[standing]).detach()
        better = margins > best_margin[standing]
        best[standing[better]], best_margin[standing[better]] = images[better], margins[better]
        standing = standing[margins <= 0]
    assert torch.equal(adversarial, best)
    assert 0 < len(standing) < 20
    assert len(recorded.images) == 61


@every_norm
def test_an_example_needs_no_batch(norm):
    """Its noise is its own, and does not shift when others are fooled and drop out."""
    model, pixels, labels = make_problem(12, dtype=torch.float64, wrong=4)
    epsilon = EPSILONS[norm] * torch.linspace(1, 0.1, 12, dtype=torch.float64)
    together = run(model, pixels, labels, norm, epsilon, 40)
    for i, generator in enumerate(example_generators("cpu", range(12), 0)):
        one, threat_model = slice(i, i + 1), ThreatModel(norm, epsilon[i : i + 1])
        alone = square(model, pixels[one], labels[one], threat_model=threat_model, steps=40, generator=[generator])
        torch.testing.assert_close(alone, together[one], rtol=0, atol=1e-9)
    fooled = model(together).argmax(dim=1) != labels
    assert fooled.any() and not fooled.all()


@every_norm
def test_succeeds_on_a_linear_problem_with_a_generous_radius(norm):
    problem = linear_problem(norm, 0)
    adversarial = run(problem.forward, problem.pixels, problem.labels, norm, 5 * problem.distances, 300)
    assert fools(problem, adversarial).all()


@every_norm
def test_never_succeeds_below_the_distance(norm):
    problem = linear_problem(norm, 0)
    adversarial = run(problem.forward, problem.pixels, problem.labels, norm, 0.99 * problem.distances, 100)
    assert not fools(problem, adversarial).any()


@pytest.mark.parametrize(
    ("shape", "sides"), [((1, 10, 10), (9, 6, 4)), ((2, 8, 20), (8, 8, 6)), ((2, 20, 8), (8, 8, 6))], ids=str
)
def test_size_of_the_squares(shape, sides):
    """They cover 80 % of the image at first, 40 % after 10 queries, 20 % after 50, and never more than its width."""
    start, *tried = queries_about(grey(shape, count=8), "linf", 0.01, 200, moves=False)
    extents = []
    for images in tried:
        changed = (images != start).any(dim=1)
        extents.append(max(span(line) for axis in (2, 1) for line in changed.any(dim=axis)))
    assert extents == 11 * [sides[0]] + 40 * [sides[1]] + 149 * [sides[2]]


def span(line):
    """From the first to the last True."""
    places = line.nonzero().flatten()
    return int(places[-1] - places[0]) + 1 if len(places) > 0 else 0


@every_norm
def test_squares_reach_every_pixel(norm):
    start, *tried = queries_about(grey((2, 5, 7)), norm, 0.01, 200, moves=False)
    assert torch.stack([images != start for images in tried]).any(dim=0).all()


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_budget_moves_from_one_square_to_another(norm):
    """The rest of the image keeps its share. After 50 queries both squares have a side of 9 in 20."""
    start, *tried = queries_about(grey((1, 20, 20)), norm, 0.01, 150, moves=False)
    changed = [((images - start).abs() > 1e-9).sum(dim=(1, 2, 3)).max().item() for images in tried[51:]]
    assert 9**2 < max(changed) <= 2 * 9**2


@every_norm
def test_epsilon_zero_asks_the_model_nothing(norm):
    _, pixels, labels = make_problem()
    adversarial = square(None, pixels, labels, threat_model=ThreatModel(norm, 0), steps=1)
    assert torch.equal(adversarial, pixels)
