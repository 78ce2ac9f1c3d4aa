from collections import defaultdict
from fractions import Fraction
from functools import partial

import pytest
import torch
from attacks import linear_classifier, linear_problem
from torch import nn

from hf_rft.attacks import apgd, apgd_dlr, apgd_targeted, fmn, pgd, square
from hf_rft.evaluation import search as module
from hf_rft.evaluation.search import ROUNDING, find_breaking_points
from hf_rft.evaluation.tiers import AttackRun, Tier, make_tier
from hf_rft.models.classifier import CountedForward
from hf_rft.threat_model import NORMS, ThreatModel


GRIDS = {
    "linf": [Fraction(0), Fraction(1, 100), Fraction(1, 40), Fraction(3, 50)],
    "l2": [Fraction(0), Fraction(1, 16), Fraction(1, 6), Fraction(2, 5)],
    "l1": [Fraction(0), Fraction(1, 4), Fraction(3, 5), Fraction(3, 2)],
}
COUNT = 14
every_norm = pytest.mark.parametrize("norm", NORMS)


def tier_of(*attacks, steps=20, guess_steps=0):
    return Tier("custom", tuple(AttackRun(attack, steps) for attack in attacks), guess_steps)


STANDARD = tier_of(apgd, apgd_targeted, guess_steps=20)


def search(problem, norm, epsilons, tier, part=slice(None), seed=3, **options):
    """Of the examples of a slice, each at its position in the whole."""
    model, pixels, labels = problem
    return find_breaking_points(
        model,
        pixels[part],
        labels[part],
        norm=norm,
        epsilons=epsilons,
        tier=tier,
        seed=seed,
        positions=range(len(pixels))[part],
        **options,
    )


def assert_same(found, expected):
    for name in expected._fields:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-9)


@pytest.fixture
def problem():
    """A small network, and images a fifth of which it gets wrong. Pixels are multiples of 1/64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(60, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    pixels = torch.randint(65, (COUNT, 3, 4, 5), generator=torch.Generator().manual_seed(1)).double() / 64
    labels = model(pixels).argmax(dim=1)
    labels[::5] = (labels[::5] + 1) % 4
    return model, pixels, labels


DARKNESS = [0.01, 0.03, 0.045, 0.11, 0.13, 0.19, 0.22, 0.31, 0.39, 0.41, -0.1]
TENTHS = [Fraction(i, 10) for i in range(5)]


@pytest.fixture
def bright():
    """Bright or not: an example of class 0 breaks when all its pixels rise by as much as it is too dark.

    The last example is too bright already.
    """
    pixels = (0.5 - torch.tensor(DARKNESS, dtype=torch.float64)).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)

    def model(images):
        excess = images.flatten(1).mean(dim=1) - 0.5
        return torch.stack([torch.zeros_like(excess), excess], dim=1)

    return model, pixels, torch.zeros(len(pixels), dtype=torch.long)


def brighten(share, forward, pixels, labels, *, threat_model, steps, generator=None):
    """An attack that uses this share of epsilon."""
    return (pixels + share * threat_model.radius(pixels)).clamp(0, 1)


def recorded(problem, *attacks):
    """The attacks, and the list of their calls: (number of the attack, {example: (epsilon, fooled)}, forward)."""
    model, all_pixels, all_labels = problem
    calls = []

    def record(number, attack, forward, pixels, labels, *, threat_model, steps, generator):
        assert len(threat_model.epsilon) == len(generator) == len(pixels)
        adversarial = attack(forward, pixels, labels, threat_model=threat_model, steps=steps, generator=generator)
        examples = [(all_pixels == image).flatten(1).all(dim=1).nonzero().item() for image in pixels]
        assert torch.equal(labels, all_labels[examples])
        fooled = (model(adversarial).argmax(dim=1) != labels).tolist()
        outcomes = zip(threat_model.epsilon.tolist(), fooled, strict=True)
        calls.append((number, dict(zip(examples, outcomes, strict=True)), forward))
        return adversarial

    return [partial(record, number, attack) for number, attack in enumerate(attacks)], calls


# --- Where examples break ---


def grid_between(distances, count=4):
    """Epsilons in the widest gaps between the distances, so that no example is near one."""
    ordered = distances.sort().values
    gaps = (ordered[1:] / ordered[:-1]).topk(count).indices.sort().values
    epsilons = (ordered[gaps] * ordered[gaps + 1]).sqrt().tolist()
    return [Fraction(0), *(Fraction(epsilon).limit_denominator(10**7) for epsilon in epsilons)]


@every_norm
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_linear_classifiers_break_where_the_nearest_plane_is(norm, classes):
    forward, pixels, labels, distances = linear_classifier(classes, norm, count=24)
    epsilons = grid_between(distances)
    labels[::6] = (labels[::6] + 1) % classes
    distances[::6] = 0
    found = search((forward, pixels, labels), norm, epsilons, STANDARD)
    expected = torch.searchsorted(torch.tensor([float(e) for e in epsilons], dtype=torch.float64), distances)
    assert torch.equal(found.broken_at, expected)
    assert len(expected.unique()) >= 5

    is_broken = expected < len(epsilons)
    assert (found.distances[is_broken] >= distances[is_broken] * (1 - 1e-6)).all()
    searched = is_broken & (expected > 1)  # what breaks at the smallest epsilon already needs no nearer image
    assert (found.distances[searched] <= distances[searched] * 1.01).all()
    assert (found.distances[~is_broken] == torch.inf).all()


@every_norm
@pytest.mark.parametrize("attack", [pgd, apgd, apgd_targeted, fmn, square])
@pytest.mark.parametrize("guess_steps", [0, 20])
def test_what_is_returned_fools_the_model_within_its_distance(norm, attack, guess_steps, problem):
    model, pixels, labels = problem
    found = search(problem, norm, GRIDS[norm], tier_of(attack, guess_steps=guess_steps))
    clean_predictions = model(pixels).argmax(dim=1)
    is_wrong = clean_predictions != labels
    assert torch.equal(found.labels, labels) and torch.equal(found.clean_predictions, clean_predictions)
    assert torch.equal(found.broken_at == 0, is_wrong) and torch.equal(found.distances == 0, is_wrong)

    is_broken = found.broken_at < 4
    assert is_broken.sum() > is_wrong.sum()
    assert torch.equal(found.distances.isfinite(), is_broken)
    assert torch.equal(found.adversarial[is_wrong | ~is_broken], pixels[is_wrong | ~is_broken])
    assert found.adversarial.min() >= 0 and found.adversarial.max() <= 1
    predicted = model(found.adversarial).argmax(dim=1)
    assert torch.equal(predicted, found.adversarial_predictions)
    assert torch.equal(predicted != labels, is_broken)

    grid = torch.tensor([*GRIDS[norm], torch.inf], dtype=torch.float64)
    moved = ThreatModel(norm, 1).distance(found.adversarial, pixels)
    torch.testing.assert_close(moved[is_broken], found.distances[is_broken], rtol=1e-12, atol=0)
    assert (found.distances <= grid[found.broken_at] * (1 + ROUNDING)).all()
    assert (found.distances > grid[found.broken_at - 1])[~is_wrong].all()


@every_norm
def test_predictions_are_right_up_to_where_an_example_breaks(norm, problem):
    found = search(problem, norm, GRIDS[norm], STANDARD)
    predictions = found.predictions(4)
    assert predictions.shape == (COUNT, 4) and not predictions.is_floating_point()
    assert torch.equal(predictions[:, 0], problem[0](problem[1]).argmax(dim=1))
    for row, label, broken_at, adversarial in zip(
        predictions.tolist(),
        problem[2].tolist(),
        found.broken_at.tolist(),
        found.adversarial_predictions.tolist(),
        strict=True,
    ):
        assert row == broken_at * [label] + (4 - broken_at) * [adversarial]
        assert (adversarial == label) == (broken_at == 4)
    assert set(found.broken_at.tolist()) == {0, 1, 2, 3, 4}


@every_norm
@pytest.mark.parametrize("attack", [apgd, square])
def test_the_guess_never_makes_a_model_look_more_robust(norm, attack, problem):
    accuracies = []
    for guess_steps in (0, 20):
        found = search(problem, norm, GRIDS[norm], tier_of(attack, guess_steps=guess_steps))
        right = found.predictions(4) == problem[2].unsqueeze(1)
        assert (right[:, 1:] <= right[:, :-1]).all()
        accuracies.append(right.sum(dim=0))
    assert (accuracies[1] <= accuracies[0]).all()
    assert accuracies[0][0] > accuracies[0][-1]


def test_the_guess_saves_runs(problem):
    count = []
    for guess_steps in (0, 20):
        attacks, calls = recorded(problem, apgd)
        search(problem, "l2", [Fraction(i, 50) for i in range(101)], tier_of(*attacks, guess_steps=guess_steps))
        count.append(sum(len(outcomes) for _, outcomes, _ in calls))
    assert count[1] < count[0]


# --- A failed attack proves nothing about smaller epsilons ---


def hides_gradients_of_rough_images(model, largest_roughness):
    """The same outputs, but no gradient for images whose neighbouring pixels differ by more than this on average."""

    def forward(images):
        roughness = images.diff(dim=-1).abs().mean(dim=(1, 2, 3))
        logits = model(images)
        return torch.where((roughness > largest_roughness).unsqueeze(1), logits.detach(), logits)

    return forward


HIDDEN_DARKNESS = [0.05, 0.055, 0.065, 0.07, 0.09, 0.11, 0.19, 0.27]
HUNDREDTHS = {largest: [Fraction(i, 100) for i in range(0, largest + 1, 2)] for largest in (8, 30)}


@pytest.fixture
def hidden():
    """Uniform images that break when each pixel rises by their darkness; noise of 0.1 is not too rough, 0.3 is."""
    pixels = (0.5 - torch.tensor(HIDDEN_DARKNESS, dtype=torch.float64)).reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8)

    def model(images):
        excess = images.flatten(1).mean(dim=1) - 0.5
        return torch.stack([torch.zeros_like(excess), excess], dim=1)

    forward = hides_gradients_of_rough_images(model, largest_roughness=0.1)
    return forward, pixels.contiguous(), torch.zeros(len(pixels), dtype=torch.long)


def test_an_attack_that_fails_where_it_has_room_hides_nothing_at_smaller_epsilons(hidden):
    """From a start among noise of 0.3 APGD sees no gradient, and fails also where a rise of 0.05 would do."""
    forward, pixels, labels = hidden
    largest = ThreatModel("linf", Fraction(30, 100))
    lost = apgd(forward, pixels, labels, threat_model=largest, steps=100, early_stop=True)
    assert (forward(lost).argmax(dim=1) == labels).all()

    tier = tier_of(apgd, steps=100, guess_steps=20)
    for largest, grid in HUNDREDTHS.items():
        found = search(hidden, "linf", grid, tier)
        expected = [sum(epsilon < darkness for epsilon in grid) for darkness in HIDDEN_DARKNESS]
        assert found.broken_at.tolist() == expected, largest


def test_each_example_is_looked_at_once_from_the_clean_image(hidden, monkeypatch):
    forward, pixels, labels = hidden
    looked_at = []

    def recorded_fmn(forward, pixels, labels, **options):
        looked_at.extend(pixels[:, 0, 0, 0].tolist())
        return fmn(forward, pixels, labels, **options)

    monkeypatch.setattr(module, "fmn", recorded_fmn)
    labels[-1] = 1  # misclassified: nothing to look for
    for grid in HUNDREDTHS.values():
        search(hidden, "linf", grid, tier_of(apgd, square, guess_steps=20))
        assert sorted(looked_at) == sorted(pixels[:-1, 0, 0, 0].tolist())
        looked_at.clear()


def test_without_a_guess_nothing_is_looked_at(hidden, monkeypatch):
    monkeypatch.setattr(module, "fmn", None)
    found = search(hidden, "linf", HUNDREDTHS[30], tier_of(apgd))
    assert found.broken_at.tolist() == len(HIDDEN_DARKNESS) * [len(HUNDREDTHS[30])]


# --- Which attack meets which example ---


def check_order(calls, found, epsilons, attacks, guess_steps):
    """What each example met: downwards while it breaks, on to the next attack at the same epsilon when it does not.

    One that has withstood all of them at the largest epsilon goes down where a guess breaks it.
    """
    met = defaultdict(list)
    for number, outcomes, _ in calls:
        for example, (epsilon, fooled) in outcomes.items():
            met[example].append((number, epsilon, fooled))
    assert set(met) == set((found.broken_at > 0).nonzero().flatten().tolist())
    grid = [float(epsilon) for epsilon in epsilons]
    for example, events in met.items():
        assert events[0][:2] == (0, grid[-1])
        for (number, epsilon, fooled), (next_number, next_epsilon, _) in zip(events, events[1:], strict=False):
            if fooled or (guess_steps > 0 and (number, epsilon) == (attacks - 1, grid[-1])):
                assert next_number == 0 and next_epsilon < epsilon
            else:
                assert next_number == number + 1 and next_epsilon == epsilon
        broken_at, (number, epsilon, fooled) = found.broken_at[example].item(), events[-1]
        if broken_at > 1:  # it withstood everything just below
            assert (number, epsilon, fooled) == (attacks - 1, grid[broken_at - 1], False)
        else:
            assert fooled or (guess_steps > 0 and (number, epsilon) == (attacks - 1, grid[-1]))


@pytest.mark.parametrize("guess_steps", [0, 5])
def test_an_example_goes_down_while_it_breaks_and_meets_the_next_attack_when_it_does_not(bright, guess_steps):
    attacks, calls = recorded(bright, partial(brighten, 0.5), partial(brighten, 1.0))
    found = search(bright, "linf", TENTHS, tier_of(*attacks, guess_steps=guess_steps))
    assert found.broken_at.tolist() == [1, 1, 1, 2, 2, 2, 3, 4, 4, 5, 0]
    check_order(calls, found, TENTHS, attacks=2, guess_steps=guess_steps)


@every_norm
@pytest.mark.parametrize("guess_steps", [0, 20])
def test_order_of_real_attacks(norm, guess_steps, problem):
    attacks, calls = recorded(problem, partial(pgd, early_stop=True), apgd_targeted, square)
    epsilons = [i * GRIDS[norm][-1] / 12 for i in range(13)]
    found = search(problem, norm, epsilons, tier_of(*attacks, steps=5, guess_steps=guess_steps))
    assert len(found.broken_at.unique()) >= 4
    check_order(calls, found, epsilons, attacks=3, guess_steps=guess_steps)


def test_examples_share_calls_at_epsilons_of_their_own(bright):
    attacks, calls = recorded(bright, partial(brighten, 1.0))
    search(bright, "linf", TENTHS, tier_of(*attacks))
    first, second, *_ = (outcomes for _, outcomes, _ in calls)
    assert {epsilon for epsilon, _ in first.values()} == {0.4} and set(first) == set(range(10))
    # What breaks at 0.4 is pulled towards the clean image as far as it goes.
    assert {epsilon for epsilon, _ in second.values()} == {0.1, 0.2, 0.3}
    assert len(calls) <= 4


@every_norm
@pytest.mark.parametrize("batch_size", [1, 3, 13, 14, 50])
def test_batches_change_no_result(norm, batch_size, problem):
    expected = search(problem, norm, GRIDS[norm], STANDARD)
    sizes, (model, pixels, labels) = [], problem

    def counted(images):
        sizes.append(len(images))
        return model(images)

    clean = model(pixels).argmax(dim=1)
    found = search(
        (counted, pixels, labels), norm, GRIDS[norm], STANDARD, batch_size=batch_size, clean_predictions=clean
    )
    assert_same(found, expected)
    assert max(sizes) <= batch_size


def test_batches_stay_full_while_there_are_enough_examples(bright):
    """Eight copies: what returns to the first attack waits until it fills a batch, or nothing else does."""
    sizes = []

    def sized(attack):
        def wrapper(forward, pixels, labels, **options):
            sizes.append(len(pixels))
            return attack(forward, pixels, labels, **options)

        return wrapper

    tier = tier_of(sized(partial(brighten, 0.5)), sized(partial(brighten, 1.0)))
    model, pixels, labels = bright
    many = model, pixels.repeat(8, 1, 1, 1), labels.repeat(8)
    found = search(many, "linf", TENTHS, tier, batch_size=10)
    in_batches = sizes.copy()
    alone = search(bright, "linf", TENTHS, tier)
    assert found.broken_at.tolist() == 8 * alone.broken_at.tolist()
    assert in_batches[:8] == [10] * 8 and max(in_batches) == 10
    assert sum(size for size in in_batches if size == 10) > 0.8 * sum(in_batches)
    calls_alone = 8 * len(sizes[len(in_batches) :])
    assert len(in_batches) < 0.6 * calls_alone


def test_a_success_counts_at_every_epsilon_it_reaches(bright):
    """Shrinking leads from a success at 0.4 to within 1/64 of the distance: one call decides what breaks first."""
    attacks, calls = recorded(bright, partial(brighten, 1.0))
    model, pixels, labels = bright
    found = search((model, pixels[:3], labels[:3]), "linf", TENTHS, tier_of(*attacks))
    assert found.broken_at.tolist() == [1, 1, 1] and len(calls) == 1
    nearest = 0.4 / 64 * torch.tensor([2, 5, 8], dtype=torch.float64)  # the multiples above 0.01, 0.03 and 0.045
    torch.testing.assert_close(found.distances, nearest)


def test_restarts_go_on_from_one_run_to_the_next(bright):
    attacks, calls = recorded(bright, partial(brighten, 0.0), partial(brighten, 1.0))
    tier = Tier("custom", (AttackRun(attacks[0], 1, restarts=3), AttackRun(attacks[1], 1)))
    model, pixels, labels = bright
    found = search((model, pixels[6:10], labels[6:10]), "linf", TENTHS[:4], tier)
    assert found.broken_at.tolist() == [3, 4, 4, 4]
    assert [number for number, _, _ in calls] == [0, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("attack", [pgd, apgd, apgd_dlr])
def test_an_attack_that_can_stop_is_asked_to(attack):
    """Within this radius each example is fooled within a few steps."""
    forward, pixels, labels, distances = linear_classifier(4, "l2")
    counted = CountedForward(forward)
    epsilons = [Fraction(0), Fraction(10 * distances.max().item()).limit_denominator(1000)]
    found = search((counted, pixels, labels), "l2", epsilons, tier_of(attack, steps=50))
    assert found.broken_at.tolist() == 8 * [1]
    assert counted.passes.backward <= 8 * 10


def test_epsilon_zero_alone_attacks_nothing(problem):
    def attack(*args, **kwargs):
        raise AssertionError("called")

    found = search(problem, "linf", [Fraction(0)], tier_of(attack, guess_steps=5))
    assert torch.equal(found.predictions(1), problem[0](problem[1]).argmax(dim=1, keepdim=True))
    assert torch.equal(found.broken_at, (found.clean_predictions == problem[2]).long())


def test_empty_batch(problem):
    found = search(problem, "l2", GRIDS["l2"], STANDARD, part=slice(0, 0))
    assert found.predictions(4).shape == (0, 4) and found.adversarial.shape == (0, 3, 4, 5)


# --- Noise ---


@every_norm
@pytest.mark.parametrize("size", [1, 4, 13])
def test_results_do_not_depend_on_the_batch_size(norm, size, problem):
    tier = tier_of(pgd, square, steps=9, guess_steps=5)
    expected = search(problem, norm, GRIDS[norm], tier)
    parts = [
        search(problem, norm, GRIDS[norm], tier, part=slice(first, first + size)) for first in range(0, COUNT, size)
    ]
    assert_same(type(expected)(*(torch.cat(tensors) for tensors in zip(*parts, strict=True))), expected)


def test_noise_depends_on_seed_position_and_run(problem):
    drawn = []

    def attack(forward, pixels, labels, *, threat_model, steps, generator):
        drawn.append([torch.rand((), generator=one).item() for one in generator])
        return pixels

    tier = Tier("custom", (AttackRun(attack, 1, restarts=2), AttackRun(attack, 1)))
    is_right = problem[0](problem[1]).argmax(dim=1) == problem[2]
    for seed in (0, 1):
        search(problem, "linf", GRIDS["linf"], tier, seed=seed)
    assert [len(run) for run in drawn] == 6 * [is_right.sum()]
    assert len({value for run in drawn for value in run}) == 6 * is_right.sum()
    whole = drawn[:3]
    drawn.clear()
    for part in (slice(0, 8), slice(8, COUNT)):
        search(problem, "linf", GRIDS["linf"], tier, part=part, seed=0)
    assert [one + other for one, other in zip(drawn[:3], drawn[3:], strict=True)] == whole


# --- Two models: one to attack, one to believe ---


def lies_about_changes(model):
    """Wrong about every image some pixel of which is no multiple of 1/64."""

    def forward(images):
        is_changed = (64 * images).frac().ne(0).flatten(1).any(dim=1)
        return model(images) * torch.where(is_changed, -1, 1).unsqueeze(1)

    return forward


@every_norm
@pytest.mark.parametrize("lie", [lies_about_changes, lambda model: lambda images: -model(images)])
def test_only_what_fools_verify_counts(norm, lie, problem):
    """Where `forward` is wrong about nearly everything, `verify` is attacked, and gives what it gives alone."""
    model, pixels, labels = problem
    forward = lie(model)
    attacks, calls = recorded(problem, partial(apgd, early_stop=True), apgd_targeted)
    tier = tier_of(*attacks)
    expected = search(problem, norm, GRIDS[norm], tier)
    assert {call[2] for call in calls} == {model}
    calls.clear()
    found = search((forward, pixels, labels), norm, GRIDS[norm], tier, verify=model)
    assert_same(found, expected)
    assert torch.equal(model(found.adversarial).argmax(dim=1) != labels, found.broken_at < 4)

    # After an attack on `forward`, the same one on `verify`: with what did not fool it, and nothing else.
    is_verified = [call[2] is model for call in calls]
    assert not is_verified[0] and any(is_verified)
    for (number, outcomes, _), (next_number, verified, _), follows in zip(
        calls, calls[1:], is_verified[1:], strict=False
    ):
        if follows:
            assert next_number == number
            doubtful = {example: epsilon for example, (epsilon, fooled) in outcomes.items() if not fooled}
            assert {example: epsilon for example, (epsilon, _) in verified.items()} == doubtful


def test_a_verify_that_agrees_is_not_attacked(problem):
    model, pixels, labels = problem
    attacks, calls = recorded(problem, partial(apgd, early_stop=True))
    expected = search(problem, "l2", GRIDS["l2"], tier_of(*attacks, guess_steps=10))
    found = search((model, pixels, labels), "l2", GRIDS["l2"], tier_of(*attacks, guess_steps=10), verify=model.forward)
    assert_same(found, expected)
    assert {call[2] for call in calls} == {model}


def test_known_clean_predictions_are_used(problem):
    model, pixels, labels = problem
    attacks, calls = recorded(problem, apgd)
    clean_predictions = labels.clone()
    clean_predictions[1] = (labels[1] + 1) % 4
    found = search(problem, "l2", GRIDS["l2"], tier_of(*attacks), clean_predictions=clean_predictions)
    assert torch.equal(found.predictions(4)[:, 0], clean_predictions)
    assert torch.equal(found.clean_predictions, clean_predictions)
    assert found.broken_at[1] == 0 and found.adversarial_predictions[1] == clean_predictions[1]
    assert set(calls[0][1]) == set(range(COUNT)) - {1}


@pytest.mark.parametrize("attack", [apgd_targeted, fmn])
def test_known_clean_predictions_are_those_at_epsilon_zero_whatever_an_attack_finds(attack, problem):
    """In other precision the model may be wrong about a clean image after all; that does not change its accuracy."""
    labels = problem[2]
    found = search(problem, "l2", GRIDS["l2"], tier_of(attack), clean_predictions=labels)
    assert torch.equal(found.predictions(4)[:, 0], labels)


# --- Progress, and an end ---


@pytest.mark.parametrize("guess_steps", [0, 5])
def test_progress(problem, guess_steps):
    seen = []
    tier = Tier("custom", (AttackRun(apgd, 5, restarts=2), AttackRun(partial(square), 20)), guess_steps)
    search(problem, "l2", GRIDS["l2"], tier, on_progress=lambda *progress: seen.append(progress))
    stages, decided = zip(*seen, strict=True)
    assert set(stages[:-1]) == {"apgd", "square"} and stages[-1] == ""
    assert list(decided) == sorted(decided) and decided[0] == 3 and decided[-1] == COUNT
    assert len(set(decided)) >= 3


def give_up(calls=200):
    """For `on_progress`: a search that does not end fails."""
    remaining = iter(range(calls))

    def on_progress(stage, decided):
        assert next(remaining, None) is not None, f"{decided} decided after {calls} calls"

    return on_progress


@pytest.mark.parametrize("share", [1 + 3e-5, 1 + 5e-5])
def test_ends_when_an_attack_leaves_the_ball_by_rounding(share, bright):
    """As much as `checked` lets pass, and just what the example needs."""
    model, pixels, labels = bright
    problem = model, torch.full_like(pixels[:1], 0.5 - 0.4 * (1 + 2e-5)), labels[:1]
    tier = make_tier([(partial(brighten, share), 1)])
    found = search(problem, "linf", TENTHS, tier, on_progress=give_up())
    assert found.broken_at.item() in (4, 5)


def test_ends_at_small_epsilons_in_float32():
    """0.5/255 is a quarter of 2/255; each example needs nearly all of it."""
    problem = linear_problem("linf", 0)
    epsilon = Fraction(1, 510)
    away = problem.pixels + (1 - 0.995 * float(epsilon) / problem.distances).reshape(-1, 1, 1, 1) * (
        nearest_on_plane(problem) - problem.pixels
    )
    tier = make_tier([("apgd", 20)])
    model = (problem.forward, away.float(), problem.labels)
    found = search(model, "linf", [Fraction(0), epsilon, 2 * epsilon], tier, on_progress=give_up())
    assert found.broken_at.tolist() == 8 * [1]


def nearest_on_plane(problem):
    """In L-inf all pixels move by the distance."""
    threat_model = ThreatModel("linf", problem.distances)
    return pgd(
        problem.forward,
        problem.pixels,
        problem.labels,
        threat_model=threat_model,
        steps=1,
        step_size=1.0,
        random_start=False,
    )


# --- A user's attack ---


def test_own_attack_is_called_with_the_arguments_of_the_signature_only(problem):
    given = []

    def attack(forward, pixels, labels, **options):
        given.append(set(options))
        return pixels

    search(problem, "l2", GRIDS["l2"], make_tier([(attack, 3)]))
    assert given == [{"threat_model", "steps", "generator"}]


def test_own_attack_may_return_another_dtype(problem):
    model, pixels, labels = problem

    def attack(forward, pixels, labels, *, threat_model, steps, generator):
        return pgd(forward, pixels.double(), labels, threat_model=threat_model, steps=steps, generator=generator)

    single = (lambda images: model(images.double()), pixels.float(), labels)
    found = search(single, "l2", GRIDS["l2"], make_tier([(attack, 10)]))
    expected = search(problem, "l2", GRIDS["l2"], make_tier([(attack, 10)]))
    assert torch.equal(found.broken_at, expected.broken_at)
