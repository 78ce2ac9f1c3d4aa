import importlib.util
import logging
import sys

import pytest
import torch
from attacks import linear_classifier

from hf_rft import threat_model as threat_models
from hf_rft.attacks.base import Passes
from hf_rft.evaluation.reference import ATTACKS, check_installed, reference_attacks, run_autoattack
from hf_rft.threat_model import ThreatModel


APGD = ("apgd-ce", "apgd-t")


def epsilon_between(distances):
    """In the widest gap between the distances, so that no example is near it."""
    ordered = distances.sort().values[1:]
    gap = (ordered[1:] / ordered[:-1]).argmax()
    return (ordered[gap] * ordered[gap + 1]).sqrt().item()


def run(problem, norm, classes, epsilon=None, **options):
    pytest.importorskip("pyautoattack")
    forward, pixels, labels, distances = problem
    threat_model = ThreatModel(norm, epsilon_between(distances) if epsilon is None else epsilon)
    return run_autoattack(
        forward,
        pixels.float(),
        labels,
        threat_model=threat_model,
        num_classes=classes,
        **{"attacks": APGD, **options},
    )


@pytest.mark.parametrize(
    ("norm", "classes"),
    [*((norm, classes) for norm in ("linf", "l2") for classes in (2, 3, 4, 10)), ("l1", 4)],
)
def test_robust_are_those_farther_from_the_nearest_plane(norm, classes):
    problem = linear_classifier(classes, norm)
    forward, pixels, labels, distances = problem
    labels[0] = (labels[0] + 1) % classes
    epsilon = epsilon_between(distances)
    result = run(problem, norm, classes, epsilon)
    expected = distances > epsilon
    expected[0] = False
    assert torch.equal(result.robust, expected) and 0 < expected.sum() < 7
    assert result.attacks == (APGD if classes >= 4 else APGD[:1])

    fooled = forward(result.adversarial).argmax(dim=1) != labels
    assert torch.equal(fooled, ~expected)
    assert torch.equal(result.adversarial[expected], pixels[expected].float())
    assert result.adversarial.min() >= 0 and result.adversarial.max() <= 1
    moved = ThreatModel(norm, 1).distance(result.adversarial, pixels.float())
    assert (moved <= epsilon * (1 + 1e-4)).all()


def test_other_attacks_of_the_package():
    """FAB, which asks for gradients of logits, aims at no more classes than there are."""
    problem = linear_classifier(3, "l2", count=6)
    result = run(problem, "l2", 3, attacks=("fab-t",))
    assert result.attacks == ("fab-t",)
    assert torch.equal(result.robust, problem.distances > epsilon_between(problem.distances))


def test_attacks_that_are_defined():
    assert reference_attacks(ATTACKS, 10) == reference_attacks(ATTACKS, 4) == ATTACKS
    assert reference_attacks(ATTACKS, 3) == reference_attacks(ATTACKS, 2) == ("apgd-ce", "fab-t", "square")


def test_leaves_the_global_state_alone():
    """Random numbers, the trace function of a debugger, gradients switched on or off, loggers."""
    problem = linear_classifier(2, "l2", count=4)
    torch.manual_seed(17)
    state, trace, level = torch.get_rng_state(), sys.gettrace(), logging.getLogger().level

    def tracing(frame, event, argument):
        return None

    sys.settrace(tracing)
    try:
        results = [run(problem, "l2", 2) for _ in range(2)]
        assert sys.gettrace() is tracing
    finally:
        sys.settrace(trace)
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.getLogger().level == level
    assert torch.is_grad_enabled()
    assert torch.equal(results[0].adversarial, results[1].adversarial)


def test_seed_changes_the_noise():
    problem = linear_classifier(4, "linf", count=4)
    epsilon = 5 * problem.distances.max().item()
    results = [run(problem, "linf", 4, epsilon, attacks=["square"], seed=seed) for seed in (0, 1)]
    assert not results[0].robust.any()
    assert not torch.equal(results[0].adversarial, results[1].adversarial)


def test_passes_are_counted():
    forward, pixels, labels, distances = linear_classifier(4, "l2", count=4)
    count = [0, 0]

    def counting(images):
        logits = forward(images)
        count[0] += len(images)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: count.__setitem__(1, count[1] + len(gradient)))
        return logits

    result = run((counting, pixels, labels, distances), "l2", 4, 1e-6)
    assert result.robust.all()
    assert result.passes == Passes(*count)
    # A run of 100 steps with cross-entropy, then one for each of the three other classes.
    assert 4 * 400 <= result.passes.backward <= 4 * 410


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("attack", ["apgd-ce", "square"])
def test_logits_become_float32(dtype, attack):
    """Square fails on any other dtype."""
    forward, pixels, labels, distances = linear_classifier(4, "linf", count=4)
    seen = set()

    def other_precision(images):
        seen.add(images.dtype)
        return forward(images.double()).to(dtype)

    problem = (other_precision, pixels, labels, distances)
    result = run(problem, "linf", 4, 5 * distances.max().item(), attacks=[attack])
    assert seen == {torch.float32}
    assert result.adversarial.dtype == torch.float32
    assert not result.robust.any()


@pytest.mark.parametrize(("count", "norm"), [(1, "linf"), (3, "l2")])
def test_channels_last_model_of_timm(count, norm):
    """The package's `view` cannot take channels_last images."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=4).eval().to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand((count, 3, 32, 32), generator=generator).to(memory_format=torch.channels_last)
    epsilon = {"linf": 0.3, "l2": 8.0}[norm]
    with torch.no_grad():
        labels = model(pixels).argmax(dim=1)
    result = run((model, pixels, labels, None), norm, 4, epsilon, attacks=["apgd-ce"], batch_size=2)
    assert result.robust.shape == (count,) and not result.robust.all()
    with torch.no_grad():
        fooled = model(result.adversarial).argmax(dim=1) != labels
    assert torch.equal(fooled, ~result.robust)
    moved = ThreatModel(norm, 1).distance(result.adversarial, pixels)
    assert (moved <= epsilon * (1 + 1e-4)).all() and (moved[fooled] > 0).all()


@pytest.mark.parametrize(
    "attack",
    ["apgd-ce", "fab-t"],
)
def test_parameters_get_no_gradient(attack):
    forward, pixels, labels, distances = linear_classifier(4, "l2", count=4)
    bias = torch.nn.Parameter(torch.zeros(4))
    run((lambda images: forward(images) + bias, pixels, labels, distances), "l2", 4, attacks=[attack])
    assert bias.grad is None and bias.requires_grad


def test_says_how_to_install_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"extra `autoattack` of hf_rft: `pip install pyautoattack==0.2.0`"):
        check_installed()
    with pytest.raises(ImportError, match="pyautoattack"):
        run_autoattack(
            None, torch.rand(1, 3, 2, 2), torch.tensor([0]), threat_model=ThreatModel("l2", 1), num_classes=2
        )


def test_a_norm_that_autoattack_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(threat_models, "NORMS", (*threat_models.NORMS, "l3"))
    forward, pixels, labels, _ = linear_classifier(4, "l2")
    with pytest.raises(ValueError, match=r"AutoAttack has no norm 'l3'; the reference knows \['linf', 'l2', 'l1'\]"):
        run_autoattack(forward, pixels, labels, threat_model=ThreatModel("l3", 1), num_classes=4)
