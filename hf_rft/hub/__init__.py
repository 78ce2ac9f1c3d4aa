"""Publishing robust models on the Hub, with evidence of their robustness, and loading them from there."""

from .evidence import attach_report
from .loading import RobustModel, load_robust_model
from .pushing import PushError, push_folder


__all__ = ["PushError", "RobustModel", "attach_report", "load_robust_model", "push_folder"]
