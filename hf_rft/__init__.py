"""Robust fine-tuning of image classifiers with Hugging Face tools."""

from .callbacks import EpsilonScheduleCallback
from .evaluation.evaluate import evaluate_robustness
from .evaluation.report import RobustnessReport
from .hub import load_robust_model
from .pixel_space import PixelNormalization
from .schedules import EpsilonScheduleType, get_epsilon_schedule
from .threat_model import ThreatModel
from .trainer import RobustTrainer
from .training_args import RobustTrainingArguments


__all__ = [
    "EpsilonScheduleCallback",
    "EpsilonScheduleType",
    "PixelNormalization",
    "RobustTrainer",
    "RobustTrainingArguments",
    "RobustnessReport",
    "ThreatModel",
    "evaluate_robustness",
    "get_epsilon_schedule",
    "load_robust_model",
]
