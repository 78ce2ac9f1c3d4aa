"""Robust fine-tuning of image classifiers with Hugging Face tools."""

from .data.augmentation import SeededAugmentation
from .evaluation.evaluate import evaluate_robustness
from .evaluation.report import RobustnessReport
from .hub.loading import load_robust_model
from .hub.pushing import PushError
from .models.module import ModuleForImageClassification
from .models.pixel_space import PixelNormalization
from .schedules import EpsilonScheduleCallback, EpsilonScheduleType, get_epsilon_schedule
from .threat_model import ThreatModel
from .training.alarm_callback import AlarmCallback
from .training.arguments import RobustTrainingArguments
from .training.interruption import AlarmRaised, TrainingPreempted
from .training.trainer import RobustTrainer


__all__ = [
    "AlarmCallback",
    "AlarmRaised",
    "EpsilonScheduleCallback",
    "EpsilonScheduleType",
    "ModuleForImageClassification",
    "PixelNormalization",
    "PushError",
    "RobustTrainer",
    "RobustTrainingArguments",
    "RobustnessReport",
    "SeededAugmentation",
    "ThreatModel",
    "TrainingPreempted",
    "evaluate_robustness",
    "get_epsilon_schedule",
    "load_robust_model",
]
