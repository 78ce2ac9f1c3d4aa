"""From predictions at a grid of epsilons to the numbers a trainer logs."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from ..threat_model import ThreatModel, format_epsilon


def robust_metrics(
    predictions: np.ndarray, labels: np.ndarray, epsilons: Sequence[Fraction], threat_model: ThreatModel
) -> dict[str, float]:
    """Accuracy, robust accuracy at the threat model's epsilon, expected robustness and the accuracy at each epsilon.

    Args:
        predictions (`np.ndarray` of shape `(examples, len(epsilons))`):
            Predicted label of each example at each epsilon.
        labels (`np.ndarray` of shape `(examples,)`):
            True labels.
        epsilons (`Sequence[Fraction]`):
            Increasing, the first is 0. With 0 alone only the accuracy is returned: nothing was attacked.
        threat_model ([`ThreatModel`]):
            Its epsilon is where robust accuracy is measured.
    """
    # The evaluate module holds the one definition; `evaluate` itself is slow to import and needed here only.
    from ..metrics.expected_robustness.expected_robustness import expected_robustness, still_correct

    accuracies = still_correct(predictions, labels).mean(axis=0).tolist()
    if len(epsilons) == 1:
        return {"accuracy": accuracies[0]}
    at_epsilon = dict(zip(epsilons, accuracies, strict=True))
    return {
        "accuracy": accuracies[0],
        "robust_accuracy": at_epsilon[threat_model.epsilon],
        "expected_robustness": float(expected_robustness([float(epsilon) for epsilon in epsilons], accuracies)),
        **{f"accuracy_at_{format_epsilon(epsilon)}": accuracy for epsilon, accuracy in at_epsilon.items()},
    }
