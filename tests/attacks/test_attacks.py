"""The contract that every row of `ATTACKS` keeps."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_rft import threat_model as norms
from hf_rft.attacks import ATTACKS
from hf_rft.attacks.base import takes
from hf_rft.threat_model import NORMS, ThreatModel
from hf_rft.utils.noise import example_generators

from . import fools, linear_problem


EPSILONS = {"linf": 0.1, "l2": 0.5, "l1": 3.0}
every_attack = pytest.mark.parametrize("name", ATTACKS)
every_norm = pytest.mark.parametrize("norm", NORMS)
# Those that go on when an example is fooled, unless asked to stop. The others always stop.
ASCENTS = [name for name in ATTACKS if takes(ATTACKS[name], "early_stop")]
every_ascent = pytest.mark.parametrize("name", ASCENTS)
every_way = pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in ATTACKS] + [(name, {"early_stop": True}) for name in ASCENTS],
    ids=str,
)


def make_model(channels=3, height=6, width=5, classes=4, seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(6 * height * width, classes),
        )
    return model.to(dtype).eval()


def make_batch(count=5, channels=3, height=6, width=5, classes=4, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    pixels = (1.4 * torch.rand((count, channels, height, width), generator=generator) - 0.2).clamp(0, 1)
    return pixels.to(dtype), torch.randint(classes, (count,), generator=generator)


def make_problem(count=5, channels=3, height=6, width=5, classes=4, seed=0, dtype=torch.float32, wrong=1):
    """A model and a batch that it classifies correctly, but for the first examples, which have random labels."""
    model = make_model(channels, height, width, classes, seed, torch.promote_types(dtype, torch.float32))
    pixels, labels = make_batch(count, channels, height, width, classes, seed, dtype)
    with torch.no_grad():
        labels[wrong:] = model(pixels.to(model[0].weight)).argmax(dim=1)[wrong:]
    return model, pixels, labels


def steps_of(name, steps=3):
    return 1 if name == "fgsm" else steps


def attack(name, model, pixels, labels, norm="linf", epsilon=None, steps=3, generator=None, **options):
    threat_model = ThreatModel(norm, EPSILONS[norm] if epsilon is None else epsilon)
    return ATTACKS[name](
        model, pixels, labels, threat_model=threat_model, steps=steps_of(name, steps), generator=generator, **options
    )


def taken(name, **options):
    """Those of the options that the attack has."""
    return {option: value for option, value in options.items() if takes(ATTACKS[name], option)}


class Recorded:
    """Counts passes and keeps the images that the model is asked about."""

    def __init__(self, model):
        self.model = model
        self.images = []
        self.count = Counter()

    def __call__(self, pixels):
        self.images.append(pixels.detach().clone())
        self.count["forward"] += 1
        logits = self.model(pixels)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: self.count.update(["backward"]))
        return logits


@every_way
@every_norm
def test_attack_is_pure(name, options, norm):
    model, pixels, labels = make_problem()
    model[0].train()  # modes and flags are mixed, so that none is right by chance
    model[3].weight.requires_grad_(False)
    for number, parameter in enumerate(model.parameters()):
        if number % 2 and parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, float(number))

    def snapshot():
        return (
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            [None if parameter.grad is None else parameter.grad.tolist() for parameter in model.parameters()],
            [tensor.tolist() for tensor in model.state_dict().values()],
            [pixels.tolist(), pixels.requires_grad, pixels.grad, labels.tolist()],
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
        )

    before = snapshot()
    adversarial = attack(name, model, pixels, labels, norm, **options)
    assert snapshot() == before
    assert not adversarial.requires_grad and adversarial.grad_fn is None
    assert not torch.equal(adversarial, pixels)


@every_attack
@given(
    norm=st.sampled_from(NORMS),
    shape=st.tuples(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(2, 7), st.integers(2, 7)),
    classes=st.integers(2, 5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    strength=st.sampled_from([0.01, 1.0, 8.0]),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    options=st.fixed_dictionaries({}, optional={"random_start": st.booleans(), "early_stop": st.booleans()}),
    steps=st.sampled_from([1, 4, 11]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=30)
def test_result_is_in_ball_and_box(name, norm, shape, classes, dtype, strength, memory_format, options, steps, seed):
    count, channels, height, width = shape
    model, pixels, labels = make_problem(count, channels, height, width, classes, seed, dtype)
    pixels = pixels.to(memory_format=memory_format)
    wide = torch.promote_types(dtype, torch.float32)
    largest = min(1.0, strength * EPSILONS[norm]) if norm == "linf" else strength * EPSILONS[norm]
    epsilon = largest * torch.rand(count, generator=torch.Generator().manual_seed(seed))
    epsilon[-1] = 0
    generator = example_generators("cpu", range(count), seed)
    options = taken(name, **options)
    adversarial = attack(name, model, pixels, labels, norm, epsilon, steps, generator, **options)

    assert adversarial.shape == pixels.shape and adversarial.dtype == wide
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    delta = (adversarial.double() - pixels.double()).flatten(1).numpy()
    rounding = 1e-7 * delta.shape[1] ** (0 if norm == "linf" else 1 / order)
    sizes = np.linalg.norm(delta, ord=order, axis=1)
    assert (sizes <= (1 + 1e-5) * epsilon.double().numpy() + rounding).all()


@every_attack
@every_norm
def test_epsilon_zero_does_not_call_the_model(name, norm):
    pixels, labels = make_batch()
    model = Recorded(make_model())
    assert torch.equal(attack(name, model, pixels, labels, norm, epsilon="0"), pixels)
    assert model.count["forward"] == 0


@every_attack
def test_empty_batch(name):
    pixels, labels = make_batch()
    assert attack(name, make_model(), pixels[:0], labels[:0]).shape == (0, 3, 6, 5)


@every_attack
@every_norm
def test_same_generator_same_result(name, norm):
    model, pixels, labels = make_problem()
    for make in (
        lambda seed: None,
        torch.Generator().manual_seed,
        lambda seed: example_generators("cpu", range(5), seed),
    ):
        first, again, other = (attack(name, model, pixels, labels, norm, generator=make(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert torch.equal(first, other) == (make(1) is None or name == "fmn")  # which has no use for noise
        torch.rand(3)


@every_way
@every_norm
@pytest.mark.parametrize("cuts", [[1, 2, 3, 4], [2], [4]])
def test_result_does_not_depend_on_how_the_batch_is_divided(name, options, norm, cuts):
    model, pixels, labels = make_problem(dtype=torch.float64)
    epsilon = EPSILONS[norm] * torch.linspace(0.2, 1, 5, dtype=torch.float64)

    def run(a, b):
        generator = example_generators("cpu", range(a, b), 7)
        return attack(name, model, pixels[a:b], labels[a:b], norm, epsilon[a:b], 11, generator, **options)

    bounds = [0, *cuts, 5]
    parts = [run(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    torch.testing.assert_close(torch.cat(parts), run(0, 5), rtol=0, atol=1e-9)


@every_attack
@every_norm
def test_an_example_does_not_see_its_batch_mates(name, norm):
    model, pixels, labels = make_problem(dtype=torch.float64)
    others, other_labels = make_batch(seed=1, dtype=torch.float64)
    others[2], other_labels[2] = pixels[2], labels[2]
    generators = [example_generators("cpu", positions, 0) for positions in ([0, 1, 2, 3, 4], [8, 9, 2, 6, 7])]
    first = attack(name, model, pixels, labels, norm, generator=generators[0], steps=11)
    second = attack(name, model, others, other_labels, norm, generator=generators[1], steps=11)
    torch.testing.assert_close(first[2], second[2], rtol=0, atol=1e-9)


@every_attack
@every_norm
def test_works_under_autocast(name, norm):
    model, pixels, labels = make_problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(pixels).dtype == torch.bfloat16
        adversarial = attack(name, model, pixels, labels, norm)
        model(adversarial).float().sum().backward()
    assert adversarial.dtype == torch.float32
    assert (ThreatModel(norm, 1).distance(adversarial, pixels) <= EPSILONS[norm] * (1 + 1e-5)).all()
    assert not torch.equal(adversarial, pixels)
    # Autocast caches cast weights: those of an attack must not cut the gradient of the training step that follows.
    assert all(parameter.grad is not None for parameter in model.parameters())


@every_attack
@every_norm
def test_works_where_gradients_are_disabled(name, norm):
    model, pixels, labels = make_problem(dtype=torch.float64)
    expected = attack(name, model, pixels, labels, norm)
    with torch.no_grad():
        assert torch.equal(attack(name, model, pixels, labels, norm), expected)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert torch.equal(attack(name, model, pixels, labels, norm), expected)


@every_attack
@every_norm
def test_channels_last_gives_the_same_result(name, norm):
    model, pixels, labels = make_problem(dtype=torch.float64)
    expected = attack(name, model, pixels, labels, norm)
    adversarial = attack(name, model, pixels.to(memory_format=torch.channels_last), labels, norm)
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-9)


OPTIONS_OF_TARGETED = {
    "apgd_targeted": {"targets": 3},
    "fmn": {"targets": 3},
    "malt": {"targets": 2, "candidates": 3},
}


@every_attack
@every_norm
@pytest.mark.parametrize("steps", [1, 2, 9, 10, 23])
def test_passes_states_the_cost(name, norm, steps):
    """Of an example that withstands: here epsilon is too small to fool anything."""
    model, pixels, labels = make_problem(wrong=0)
    recorded, options = Recorded(model), OPTIONS_OF_TARGETED.get(name, {})
    adversarial = attack(name, recorded, pixels, labels, norm, 1e-4, steps, **options)
    assert torch.equal(model(adversarial).argmax(dim=1), labels)
    stated = ATTACKS[name].passes(steps_of(name, steps), norm, **options)
    assert (recorded.count["forward"], recorded.count["backward"]) == stated
    if name in ASCENTS:
        assert stated.backward == steps_of(name, steps)


@every_ascent
@every_norm
def test_early_stop_returns_the_first_misclassified_iterate_and_spends_no_more(name, norm):
    pixels, labels = make_batch(count=12)
    model = make_model()
    labels[:9] = model(pixels)[:9].argmax(dim=1)
    generator = example_generators("cpu", range(12), 3)
    recorded = Recorded(model)
    adversarial = attack(name, recorded, pixels, labels, norm, generator=generator, steps=9, early_stop=True)
    standing, first_wrong = torch.arange(12), {}
    for images in recorded.images:
        assert len(images) == len(standing)  # decided examples cost no pass
        wrong = model(images).argmax(dim=1) != labels[standing]
        first_wrong |= dict(zip(standing[wrong].tolist(), images[wrong], strict=True))
        standing = standing[~wrong]
    assert first_wrong
    for i, image in first_wrong.items():
        assert torch.equal(adversarial[i], image)


@every_ascent
@every_norm
def test_early_stop_asks_once_when_all_are_misclassified_already(name, norm):
    pixels, _ = make_batch()
    model = Recorded(make_model())
    labels = (model.model(pixels).argmax(dim=1) + 1) % 4
    adversarial = attack(name, model, pixels, labels, norm, steps=9, random_start=False, early_stop=True)
    assert torch.equal(adversarial, pixels) and model.count["forward"] == 1


@every_ascent
@every_norm
def test_early_stop_fools_no_fewer(name, norm):
    pixels, labels = make_batch(count=16, dtype=torch.float64)
    model = make_model(dtype=torch.float64)
    labels[:12] = model(pixels)[:12].argmax(dim=1)
    fooled = [
        model(attack(name, model, pixels, labels, norm, steps=9, early_stop=early_stop)).argmax(dim=1) != labels
        for early_stop in (False, True)
    ]
    assert (fooled[1] | ~fooled[0]).all()


@pytest.mark.parametrize("name", [*ASCENTS, "apgd_targeted", "malt"])  # the others stop at the boundary
def test_objective_rises(name):
    model, pixels, labels = make_problem(count=12)
    adversarial = attack(name, model, pixels, labels, steps=9, random_start=False)
    with torch.no_grad():
        before, after = (nn.functional.cross_entropy(model(images), labels) for images in (pixels, adversarial))
    assert after > before + 0.01


@pytest.mark.parametrize("name", ["pgd", "apgd", "apgd_dlr", "apgd_targeted", "malt", "fmn"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_confident_classifier_is_no_more_robust(name, norm):
    """Large logits move no decision boundary; margins of 6 to 36 here, where float32 rounds the confidence to 1."""
    problem = linear_problem(norm, 0, scale=300.0)
    adversarial = attack(
        name, problem.forward, problem.pixels.float(), problem.labels, norm, 1.01 * problem.distances, steps=40
    )
    assert fools(problem, adversarial).all()


@every_attack
@every_norm
def test_an_undefined_gradient_does_not_leave_the_box(name, norm):
    """The square root has no derivative at 0: a model that measures distances returns NaN there."""
    pixels, labels = make_batch()
    prototypes = torch.cat([pixels[:2], torch.rand((2, 3, 6, 5), generator=torch.Generator().manual_seed(1))])

    def forward(images):
        return -(images.unsqueeze(1) - prototypes).square().flatten(2).sum(dim=2).sqrt()

    adversarial = attack(name, forward, pixels, labels, norm, **taken(name, random_start=False))
    assert adversarial.isfinite().all()
    assert (ThreatModel(norm, 1).distance(adversarial, pixels) <= EPSILONS[norm] * (1 + 1e-5)).all()
    assert not torch.equal(adversarial[2:], pixels[2:])


@every_attack
def test_refuses_bad_input(name):
    pixels, labels = make_batch()
    model = make_model()
    with pytest.raises(ValueError, match="`steps=0`"):
        ATTACKS[name](model, pixels, labels, threat_model=ThreatModel("linf", "1/255"), steps=0)
    with pytest.raises(ValueError, match=r"one label per image; got \(5, 3, 6, 5\) and \(4,\)"):
        attack(name, model, pixels, labels[:4])
    with pytest.raises(ValueError, match=r"pixels of shape \(batch, channels, height, width\).*got \(5, 3, 6\)"):
        attack(name, model, pixels[..., 0], labels)


@every_attack
@pytest.mark.parametrize("count", [4, 6])
def test_refuses_another_number_of_epsilons_or_generators(name, count):
    model, pixels, labels = make_problem()
    with pytest.raises(ValueError, match=f"`epsilon` holds {count} values for a batch of 5 images"):
        attack(name, model, pixels, labels, epsilon=torch.full((count,), 0.1))
    if name != "fmn":  # which has no use for them
        with pytest.raises(ValueError, match=f"`generator` holds {count} generators for a batch of 5 images"):
            attack(name, model, pixels, labels, generator=example_generators("cpu", range(count), 0))


def test_half_precision_does_not_weaken_an_attack_on_a_confident_model():
    """Gradients of the cross-entropy underflow on their way back through a float16 model, unless they are scaled."""
    model = make_model(classes=4).requires_grad_(False)
    pixels = make_batch(count=64)[0]
    labels = model(pixels).argmax(dim=1)
    fooled = {}
    for scale in (1, 300):  # the logits' scale changes confidence, but no prediction

        def forward(images, scale=scale):
            with torch.autocast("cpu", torch.float16):
                return scale * model(images)

        adversarial = attack("apgd", forward, pixels, labels, epsilon=0.05, steps=10)
        fooled[scale] = (model(adversarial).argmax(dim=1) != labels).float().mean().item()
    assert fooled[1] > 0.2
    assert fooled[300] >= fooled[1] - 0.05


@pytest.mark.parametrize(("name", "table"), [("pgd", "PATH_LENGTH"), ("apgd", "RULES"), ("square", "MOVES")])
def test_a_norm_without_a_row_is_an_error_that_names_the_table(name, table, monkeypatch):
    monkeypatch.setattr(norms, "NORMS", (*NORMS, "l3"))
    monkeypatch.setitem(norms._NORMS, "l3", norms._NORMS["l2"])
    pixels, labels = torch.full((2, 3, 6, 5), 0.5), torch.zeros(2, dtype=torch.long)
    message = (
        rf"The attack '{name}' has no rule for `norm='l3'`, only for \['linf', 'l2', 'l1'\]; add a row to `{table}` "
        rf"in hf_rft/attacks/{name}.py."
    )
    with pytest.raises(ValueError, match=message):
        ATTACKS[name](make_model(), pixels, labels, threat_model=ThreatModel("l3", 0.1), steps=3)
