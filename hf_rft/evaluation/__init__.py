"""Measuring robustness at fixed epsilons."""

from .grid import adversarial_predictions
from .metrics import robust_metrics


__all__ = ["adversarial_predictions", "robust_metrics"]
