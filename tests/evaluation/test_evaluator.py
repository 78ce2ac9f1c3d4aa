from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rft.evaluation.evaluator import robust_metrics


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
