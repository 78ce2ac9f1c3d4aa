"""Measuring robustness at fixed epsilons."""

from .grid import adversarial_predictions
from .metrics import robust_metrics
from .settings import evaluation_settings


__all__ = ["adversarial_predictions", "evaluation_settings", "robust_metrics"]
