"""The Hub: robust models with their evidence, there and back."""

from .evidence import attach_report
from .loading import RobustModel, load_robust_model
from .pushing import PushError, push_folder


__all__ = ["PushError", "RobustModel", "attach_report", "load_robust_model", "push_folder"]
