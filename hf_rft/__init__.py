"""Robust fine-tuning of image classifiers with Hugging Face tools."""

from .callbacks import EpsilonScheduleCallback
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
    "ThreatModel",
    "get_epsilon_schedule",
]
