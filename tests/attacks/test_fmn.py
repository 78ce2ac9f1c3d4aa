import pytest
import torch

from hf_rft.attacks import fmn
from hf_rft.threat_model import ThreatModel
from hf_rft.utils.noise import example_generators

from . import LinearProblem, linear_classifier, linear_problem
from .test_attacks import EPSILONS, Recorded, every_norm, make_batch, make_model


# A radius that no example of these problems needs.
WIDE = {"linf": 1, "l2": 100, "l1": 1000}


def check_distances(norm, forward, pixels, labels, distances, tolerance=0.01):
    threat_model = ThreatModel(norm, WIDE[norm])
    adversarial = fmn(forward, pixels, labels, threat_model=threat_model, steps=100)
    assert (forward(adversarial).argmax(dim=1) != labels).all()
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    found = threat_model.distance(adversarial, pixels)
    assert (found >= distances * (1 - 1e-6)).all()
    assert (found <= distances * (1 + tolerance)).all()


@every_norm
@pytest.mark.parametrize("classes", [2, 3, 4, 10])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 9, 4)], ids=str)
def test_finds_the_nearest_plane(norm, classes, shape):
    check_distances(norm, *linear_classifier(classes, norm, shape=shape))


@every_norm
@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_two_classes_of_the_shared_problem_at_any_scale_of_the_logits(norm, scale):
    check_distances(norm, *linear_problem(norm, 0, scale=scale), tolerance=0.001)


@every_norm
def test_in_float32(norm):
    """Rounding drowns the smallest overshoots: the distance is 5 % off at worst, for examples next to the plane."""
    forward, pixels, labels, distances = linear_classifier(4, norm, count=16)
    adversarial = fmn(forward, pixels.float(), labels, threat_model=ThreatModel(norm, WIDE[norm]), steps=100)
    assert adversarial.dtype == torch.float32
    assert (forward(adversarial).argmax(dim=1) != labels).all()
    ratio = ThreatModel(norm, 1).distance(adversarial.double(), pixels) / distances
    assert (ratio < 1.06).all() and (ratio < 1.01).sum() >= 14


def problem_at_the_edges_of_the_box(norm) -> LinearProblem:
    """Two classes, and images many of whose pixels are 0 or 1; the distances take the box into account."""
    generator = torch.Generator().manual_seed(0)
    pixels = (1.6 * torch.rand((8, 3, 5, 7), generator=generator, dtype=torch.float64) - 0.3).clamp(0, 1)
    normal = torch.randn(105, generator=generator, dtype=torch.float64)
    room = torch.where(normal > 0, 1 - pixels.flatten(1), pixels.flatten(1))
    margins = torch.linspace(0.05, 0.9, 8, dtype=torch.float64) * (room @ normal.abs())
    offset = (pixels.flatten(1) @ normal + margins).mean()
    margins = offset - pixels.flatten(1) @ normal
    assert (margins > 0).all() and (margins < room @ normal.abs()).all()

    def largest_gain(size):
        """How far along the normal a perturbation of this size leads inside the box."""
        if norm == "linf":
            return torch.minimum(room, size.unsqueeze(1)) @ normal.abs()
        steepest = normal.abs().argsort(descending=True)
        spent_before = room[:, steepest].cumsum(dim=1) - room[:, steepest]
        spent = torch.minimum(room[:, steepest], (size.unsqueeze(1) - spent_before).clamp_min(0))
        return spent @ normal.abs()[steepest]

    def bisect(function, target):
        low, high = torch.zeros(8, dtype=torch.float64), torch.full((8,), 1e3, dtype=torch.float64)
        for _ in range(100):
            middle = (low + high) / 2
            is_low = function(middle) < target
            low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
        return high

    if norm == "l2":  # every pixel moves in proportion to the normal until it reaches the edge
        factor = bisect(lambda factor: torch.minimum(room, factor.unsqueeze(1) * normal.abs()) @ normal.abs(), margins)
        distances = torch.minimum(room, factor.unsqueeze(1) * normal.abs()).norm(dim=1)
    else:
        distances = bisect(largest_gain, margins)

    def forward(images):
        value = images.flatten(1) @ normal - offset
        return torch.stack([-value, value], dim=1)

    return LinearProblem(forward, pixels, torch.zeros(8, dtype=torch.long), distances)


@every_norm
def test_finds_the_nearest_image_where_the_box_binds(norm):
    forward, pixels, labels, distances = problem_at_the_edges_of_the_box(norm)
    check_distances(norm, forward, pixels, labels, distances, tolerance=0.001)


@every_norm
def test_radius_caps_the_search(norm):
    """What lies farther is returned at the radius, as close to the boundary as a linear model allows."""
    forward, pixels, labels, distances = linear_problem(norm, 0)
    factor = torch.tensor([0.5, 1.01] * 4, dtype=torch.float64)
    threat_model = ThreatModel(norm, factor * distances)
    adversarial = fmn(forward, pixels, labels, threat_model=threat_model, steps=100)
    assert (threat_model.distance(adversarial, pixels) <= factor * distances * (1 + 1e-9)).all()
    assert torch.equal(forward(adversarial).argmax(dim=1) != labels, factor > 1)
    before, after = (forward(images).diff(dim=1).abs().flatten() for images in (pixels, adversarial))
    torch.testing.assert_close(after[::2], before[::2] / 2, rtol=0.01, atol=0)


@every_norm
def test_aims_at_the_nearest_boundary_not_at_the_second_largest_logit(norm):
    """The runner-up trails by little, but hardly reacts to the image: its boundary is 20 times as far away."""
    pixels = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    labels = torch.zeros(1, dtype=torch.long)

    def forward(images):
        one, other = (images - 0.5).flatten(1)[:, :2].unbind(dim=1)
        return torch.stack([torch.zeros_like(one), 0.05 * one - 0.1, 10 * other - 1], dim=1)

    threat_model = ThreatModel(norm, 0.4)
    adversarial = fmn(forward, pixels, labels, threat_model=threat_model, steps=20)
    assert forward(adversarial).argmax(dim=1) == 2
    assert 0.1 <= threat_model.distance(adversarial, pixels) <= 0.101
    at_the_runner_up = fmn(forward, pixels, labels, threat_model=threat_model, steps=20, targets=1)
    assert forward(at_the_runner_up).argmax(dim=1) == 0
    assert forward(at_the_runner_up)[0, 1] > -0.1


@pytest.mark.parametrize(("norm", "nearest", "distance"), [("linf", 2, 1 / 4), ("l2", 1, 1 / 2.2), ("l1", 1, 1 / 2.2)])
def test_nearest_is_measured_in_the_norm(norm, nearest, distance):
    """One class follows a single pixel, the other a little of each."""

    def forward(images):
        rise = (images - 0.5).flatten(1)
        return torch.stack([torch.zeros_like(rise[:, 0]), 2.2 * rise[:, 0] - 1, rise.sum(dim=1) - 1], dim=1)

    pixels, labels = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    threat_model = ThreatModel(norm, WIDE[norm])
    adversarial = fmn(forward, pixels, labels, threat_model=threat_model, steps=50)
    assert forward(adversarial).argmax(dim=1) == nearest
    assert distance <= threat_model.distance(adversarial, pixels) <= 1.001 * distance


@every_norm
def test_goes_on_towards_the_class_that_an_image_is_taken_for(norm):
    """Aiming at a boundary out of reach, it meets another one on the way, and looks for the nearest point of that."""

    def forward(images):
        rise = (images - 0.5).flatten(1)[:, 0]
        return torch.stack([torch.zeros_like(rise), 0.05 * rise - 0.1, 10 * rise - 1], dim=1)

    pixels, labels = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    threat_model = ThreatModel(norm, 0.4)
    adversarial = fmn(forward, pixels, labels, threat_model=threat_model, steps=20, targets=1)
    assert 0.1 <= threat_model.distance(adversarial, pixels) <= 0.101


@every_norm
def test_a_misclassified_image_is_returned_as_it_is_and_costs_one_pass(norm):
    pixels, labels = make_batch(count=12)
    model = make_model()
    predictions = model(pixels).argmax(dim=1)
    labels = torch.where(torch.arange(12) % 3 == 0, (predictions + 1) % 4, predictions)
    wrong = predictions != labels
    recorded = Recorded(model)
    adversarial = fmn(recorded, pixels, labels, threat_model=ThreatModel(norm, WIDE[norm]), steps=10)
    assert torch.equal(adversarial[wrong], pixels[wrong])
    assert (model(adversarial).argmax(dim=1) != labels).all()
    assert len(recorded.images[0]) == 12
    assert {len(images) for images in recorded.images[1:]} == {8}


def test_all_misclassified_ask_once():
    pixels, _ = make_batch()
    recorded = Recorded(make_model())
    labels = (recorded.model(pixels).argmax(dim=1) + 1) % 4
    adversarial = fmn(recorded, pixels, labels, threat_model=ThreatModel("l2", 1), steps=10)
    assert torch.equal(adversarial, pixels)
    assert recorded.count == {"forward": 1, "backward": 3}


@every_norm
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize(("targets", "compared"), [(1, 1), (2, 2), (3, 3), (9, 3)])
def test_passes_states_the_cost(norm, steps, targets, compared):
    """Four classes: at most three to compare. What is right needs all passes, whether it is fooled or not."""
    pixels, _ = make_batch()
    recorded = Recorded(make_model())
    labels = recorded.model(pixels).argmax(dim=1)
    fmn(recorded, pixels, labels, threat_model=ThreatModel(norm, EPSILONS[norm]), steps=steps, targets=targets)
    assert (recorded.count["forward"], recorded.count["backward"]) == fmn.passes(steps, norm, compared)
    assert {len(images) for images in recorded.images} == {5}
    assert fmn.passes(steps, norm) == fmn.passes(steps, norm, 9) == (steps + 2, steps + 9)


def test_needs_no_generator():
    pixels, labels = make_batch()
    model = make_model()
    labels = model(pixels).argmax(dim=1)
    results = [
        fmn(model, pixels, labels, threat_model=ThreatModel("l2", 1), steps=10, generator=generator)
        for generator in (None, torch.Generator().manual_seed(1), example_generators("cpu", range(5), 2))
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.equal(results[0], pixels)


@every_norm
def test_more_steps_find_nearer_images(norm):
    """On a network that is not linear."""
    model = make_model(dtype=torch.float64)
    pixels, _ = make_batch(count=12, dtype=torch.float64)
    labels = model(pixels).argmax(dim=1)
    threat_model = ThreatModel(norm, WIDE[norm])
    found = []
    for steps in (5, 100):
        adversarial = fmn(model, pixels, labels, threat_model=threat_model, steps=steps)
        assert (model(adversarial).argmax(dim=1) != labels).all()
        found.append(threat_model.distance(adversarial, pixels))
    assert (found[1] <= found[0] * 1.001).all()
    assert found[1].mean() < 0.99 * found[0].mean()


@every_norm
@pytest.mark.parametrize("lead", [0.0, 1.0])
def test_a_model_without_gradient_leaves_the_image_as_it_is(norm, lead):
    pixels, _ = make_batch()
    labels = torch.zeros(5, dtype=torch.long)

    def forward(images):
        assert images.isfinite().all()
        return 0 * images.flatten(1)[:, :3] + torch.tensor([lead, 0.0, 0.0])

    adversarial = fmn(forward, pixels, labels, threat_model=ThreatModel(norm, WIDE[norm]), steps=20)
    assert torch.equal(adversarial, pixels)


def test_bad_number_of_targets():
    pixels, labels = make_batch()
    with pytest.raises(ValueError, match="`targets=0` must be at least 1"):
        fmn(make_model(), pixels, labels, threat_model=ThreatModel("linf", 0.1), steps=1, targets=0)


@every_norm
def test_epsilon_zero_asks_the_model_nothing(norm):
    pixels, labels = make_batch()
    adversarial = fmn(None, pixels, labels, threat_model=ThreatModel(norm, 0), steps=1)
    assert torch.equal(adversarial, pixels)
