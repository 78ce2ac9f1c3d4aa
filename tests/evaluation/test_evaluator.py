import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import SIZE, Images, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rft.evaluation.cache import hash_levels
from hf_rft.evaluation.evaluator import Evaluator, robust_metrics
from hf_rft.evaluation.provenance import versions
from hf_rft.evaluation.tiers import make_tier
from hf_rft.models.classifier import PixelClassifier
from hf_rft.models.pixel_space import PixelNormalization


GRID = [Fraction(0), Fraction(2, 255), Fraction(4, 255), Fraction(1, 2)]


def test_names_and_values():
    predictions = np.array([[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 1]])
    metrics = robust_metrics(predictions, np.array([0, 1, 1, 0]), GRID, Fraction("4/255"))
    half = float(GRID[1])
    area = half * (0.75 + 0.75) / 2 + half * (0.75 + 0.5) / 2 + (0.5 - 2 * half) * (0.5 + 0.25) / 2
    assert metrics == {
        "accuracy": 0.75,
        "robust_accuracy": 0.5,
        "expected_robustness": pytest.approx(area / 0.5),
        "accuracy_at_0": 0.75,
        "accuracy_at_2/255": 0.75,
        "accuracy_at_4/255": 0.5,
        "accuracy_at_0.5": 0.25,
    }


@given(st.integers(1, 12), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_accuracies_never_rise_and_start_at_the_clean_one(count, seed):
    rng = np.random.default_rng(seed)
    predictions, labels = rng.integers(3, size=(count, 4)), rng.integers(3, size=count)
    metrics = robust_metrics(predictions, labels, GRID, Fraction("1/2"))
    accuracies = [value for name, value in metrics.items() if name.startswith("accuracy_at_")]
    assert accuracies == sorted(accuracies, reverse=True)
    assert metrics["accuracy"] == accuracies[0] == (predictions[:, 0] == labels).mean()
    assert metrics["robust_accuracy"] == accuracies[-1] <= metrics["expected_robustness"] <= metrics["accuracy"]


def test_without_an_attack_only_the_accuracy_is_returned():
    metrics = robust_metrics(np.array([[0], [1]]), np.array([0, 0]), GRID[:1], Fraction("4/255"))
    assert metrics == {"accuracy": 0.5}


def test_epsilon_of_the_threat_model_must_be_in_the_grid():
    with pytest.raises((KeyError, ValueError), match="8"):
        robust_metrics(np.zeros((2, 4), int), np.zeros(2, int), GRID, Fraction("8/255"))


# --- One batch ---


@pytest.fixture
def evaluator():
    return Evaluator("linf", GRID, make_tier([("pgd", 3)]), seed=7)


@pytest.fixture
def classifier():
    return PixelClassifier(make_model("vit").double(), PixelNormalization((0.5,) * 3, (0.5,) * 3))


@pytest.fixture
def images():
    return Images(6, dtype=torch.float64)


def clean_logits(classifier, pixels):
    with classifier.under_attack(), torch.no_grad():
        return classifier(pixels)


def test_a_batch_of_a_trainer_is_attacked_like_its_pixels(evaluator, classifier, images):
    """The last two images pad the batch, and are left out."""
    pixels, labels, positions = images.pixels[:4], images.labels[:4], range(10, 14)
    logits = clean_logits(classifier, pixels)
    labels[:2] = logits.argmax(dim=1)[:2]  # an untrained model is right about something
    inputs = {"pixel_values": 2 * images.pixels - 1, "labels": images.labels}
    found, attacked = evaluator.attack_inputs(classifier, inputs, logits, positions)
    with classifier.under_attack():
        expected = evaluator.attack(classifier, pixels, labels, positions, logits.argmax(dim=1))
    assert attacked.passes == expected[1] and set(inputs) == {"pixel_values", "labels"}
    assert attacked.image_shape == [3, SIZE, SIZE] and list(attacked.hashes) == [10, 11, 12, 13]
    assert list(attacked.hashes.values()) == hash_levels(pixels, labels)
    for name, one, other in zip(found._fields, found, expected[0], strict=True):
        torch.testing.assert_close(one, other, msg=name)
    assert (found.broken_at[:2] > 0).all()


def test_the_clean_pass_is_counted_where_nothing_else_is_spent(evaluator, classifier, images):
    logits = clean_logits(classifier, images.pixels)
    wrong = (logits.argmax(dim=1) + 1) % logits.shape[1]
    _, passes = evaluator.attack(classifier, images.pixels, wrong, range(6), logits.argmax(dim=1))
    assert passes == (6, 0)


def test_every_pass_of_every_model_is_counted(evaluator, classifier, images):
    seen = {"forward": 0, "crafting": 0}

    def counting(name):
        def forward(pixels):
            seen[name] += len(pixels)
            return classifier(pixels)

        return forward

    with classifier.under_attack():
        logits = classifier(images.pixels).detach()
        prediction = logits.argmax(dim=1)
        _, passes = evaluator.attack(
            counting("forward"),
            images.pixels,
            prediction,
            range(6),
            prediction,
            crafting=counting("crafting"),
        )
    assert min(seen.values()) > 0 and passes.backward > 0
    assert passes.forward == sum(seen.values()) + 6


def test_shown_in_a_line(evaluator):
    assert repr(evaluator) == "Evaluator(linf at 0, 2/255, 4/255, 0.5; Tier(custom: pgd 3); seed 7)"


def test_the_description_is_complete_and_json():
    evaluator = Evaluator("linf", GRID, make_tier([("pgd", 3)]), seed=7)
    described = evaluator.describe()
    assert json.loads(json.dumps(described)) == described
    assert described == {
        "norm": "linf",
        "epsilons": ["0", "2/255", "4/255", "0.5"],
        "tier": "custom",
        "attacks": [{"attack": "pgd", "steps": 3, "restarts": 1}],
        "guess_steps": 0,
        "seed": 7,
        "versions": versions(),
    }
