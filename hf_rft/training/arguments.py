"""`RobustTrainingArguments`: the arguments of robust fine-tuning, and their checks."""

import json
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, cast

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from ..attacks import ATTACKS, TRAINING_ATTACKS
from ..losses import LOSSES
from ..schedules import SCHEDULES, EpsilonSchedule, EpsilonScheduleCallback, get_epsilon_schedule
from ..threat_model import NORMS, ThreatModel, parse_epsilon, parse_epsilons
from ..utils.values import COUNT, NOT_NEGATIVE, POSITIVE, SECONDS, SHARE, check_ranges
from .argument_checks import (
    check_attacks,
    check_choices,
    check_eval_epsilons,
    check_loss_arguments,
    check_supported,
    check_weights,
)


# Learning rate schedules that follow `metric_for_best_model`, which they expect to decrease.
METRIC_SCHEDULERS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
TIED = {"epsilon_schedule_type": "epsilon_schedule_kwargs"}  # whatever sets the first drops an earlier second
RANGES = {
    "attack_steps": COUNT._replace(hint="; for training without an attack set `robust_loss='standard'`"),
    "attack_step_size": POSITIVE._replace(hint="; it is relative to epsilon"),
    "robust_loss_weight": NOT_NEGATIVE,
    "mixup_alpha": NOT_NEGATIVE,
    "cutmix_alpha": NOT_NEGATIVE,
    "head_learning_rate": NOT_NEGATIVE,
    "layer_decay": SHARE._replace(is_open=True),
    "head_warmup_steps": NOT_NEGATIVE,
    "awp_gamma": POSITIVE._replace(hint="; leave it out for training without weight perturbation"),
    "awp_warmup_steps": NOT_NEGATIVE,
    "ema_decay": SHARE,
    "eval_attack_steps": COUNT,
    "hub_timeout": SECONDS,
}


@dataclass
class RobustTrainingArguments(TrainingArguments):
    r"""
    Arguments of [`RobustTrainer`]: those of [`~transformers.TrainingArguments`], plus the following.

    Parameters:
        > Parameters that control the threat model

        norm (`str`, *optional*, defaults to `"linf"`):
            A name in `hf_rft.threat_model.NORMS`.
        epsilon (`str`, *optional*, defaults to `"4/255"`):
            Target perturbation strength, in pixels scaled to [0, 1]; a fraction or a decimal.

        > Parameters that control the training attack

        attack (`str`, *optional*, defaults to `"apgd"`):
            A name in `hf_rft.attacks.TRAINING_ATTACKS`.
        attack_steps (`int`, *optional*, defaults to 7):
            Gradient evaluations per example; 1 for `"fgsm"` and `"nfgsm"`.
        attack_steps_schedule (`str`, *optional*, defaults to `"constant"`):
            `"constant"`, or `"epsilon"`: `attack_steps` times the current share of epsilon, rounded up (18 % cheaper,
            for 0.7 points of expected robustness, in benchmarks/README.md). Evaluation always takes all its steps.
        attack_step_size (`float`, *optional*):
            Step size relative to the current epsilon. None: the attack's own rule.
        attack_random_start (`bool`, *optional*, defaults to `True`):
            Start the attack from a random point of the ball.
        attack_model_mode (`str`, *optional*, defaults to `"eval"`):
            Mode of the model while it is attacked: `"eval"` (no dropout) or `"train"`.
        attack_dtype (`str`, *optional*):
            `"bfloat16"` runs the training attack under autocast. Gradients are rounded, so its examples, which stay
            inside the ball, are slightly weaker; robust accuracy was the same within the spread of seeds
            (benchmarks/README.md). Update and evaluation do not change. None: the precision of the update.
        freeze_batch_norm (`bool`, *optional*, defaults to `True`):
            Keep BatchNorm in evaluation mode while training. If False, the clean and adversarial examples of TRADES
            and MART share their batch statistics.

        > Parameters that control the loss

        robust_loss (`str`, *optional*, defaults to `"at"`):
            A name in `hf_rft.losses.LOSSES`; `"standard"` is plain fine-tuning.
        robust_loss_weight (`float`, *optional*):
            Weight of the loss's regulariser, if it has one. None: the published weight.

        > Parameters that control the epsilon schedule

        epsilon_schedule_type (`str`, *optional*, defaults to `"hinge"`):
            A name in `hf_rft.schedules.SCHEDULES`.
        epsilon_schedule_kwargs (`dict`, *optional*):
            Arguments of the schedule. None: its defaults, for `"hinge"` `{"start": 0.25, "end": 0.75}`.
        epsilon_schedule_interval (`str`, *optional*, defaults to `"step"`):
            `"step"`, or `"epoch"` for the paper's staircase.

        > Parameters that control mixing

        mixup_alpha (`float`, *optional*, defaults to 0):
            Blend each training image with another, and their labels: the share is drawn from Beta(alpha, alpha), once
            a batch. 0: off. Evaluation never mixes.
        cutmix_alpha (`float`, *optional*, defaults to 0):
            Likewise, but paste a rectangle of the other image. With both, each batch is mixed by one of them.

        > Parameters that control what learns how fast

        head_learning_rate (`float`, *optional*):
            Learning rate of the classification head. None: `learning_rate`.
        layer_decay (`float`, *optional*):
            Learning rate of each layer relative to that of the next deeper one, such as 0.75. None: all layers have
            the same.
        head_warmup_steps (`float`, *optional*, defaults to 0):
            Optimizer steps in which only the head learns, from adversarial examples like all others; below 1: their
            share of all.

        > Parameters that control weight perturbation

        awp_gamma (`float`, *optional*):
            Adversarial weight perturbation: length of the perturbation of each tensor, relative to the tensor. The
            paper has 0.01 for `"at"` and 0.005 for `"trades"`, with BatchNorm in training mode; a pretrained network
            with frozen BatchNorm needs far less, such as 0.0005. One forward and backward pass more per example.
        awp_warmup_steps (`float`, *optional*, defaults to 0.1):
            Optimizer steps without perturbation; below 1: their share of all.

        > Parameters that control weight averaging

        weight_averaging (`str`, *optional*):
            `"ema"` evaluates, saves and returns an exponential moving average of the weights (and of BatchNorm's
            statistics), at the memory of one more copy. Checkpoints also hold the weights that training goes on with.
        ema_decay (`float`, *optional*, defaults to 0.999):
            Weight of the former average after each optimizer step. It grows to this value as `(1 + n) / (10 + n)`
            after `n` steps.

        > Parameters that control the evaluation

        eval_attack (`str`, *optional*, defaults to `"apgd"`):
            A name in `hf_rft.attacks.ATTACKS`. Evaluation uses fixed epsilons, whatever the training schedule.
        eval_attack_steps (`int`, *optional*, defaults to 10):
            Gradient evaluations of the evaluation attack.
        eval_epsilons (`list[str]`, *optional*):
            Increasing, from 0, with `epsilon` among them. None: 0, 1/4, 1/2, 3/4 and 1 times `epsilon`. Expected
            robustness depends on this grid.
        eval_attack_during_training (`bool`, *optional*, defaults to `True`):
            Attack in the evaluations during training. If False, those report only clean accuracy, which is cheap;
            calling `evaluate` always attacks.
        best_model_at_any_epsilon (`bool`, *optional*, defaults to `False`):
            Let every evaluation determine the best model. If False, only those at the final epsilon count, since
            models trained at different epsilons are not comparable; `load_best_model_at_end`, `save_strategy="best"`
            and [`~transformers.EarlyStoppingCallback`] take effect from there.

        > Parameters that control the alarms

        abort_on_alarm (`bool`, *optional*, defaults to `False`):
            Stop at an alarm (transfer failure, catastrophic or robust overfitting, gradient masking): a checkpoint is
            written, and `train` raises [`hf_rft.AlarmRaised`]. If False, an alarm is only a warning and an entry of
            the log history. Each is raised once per run, so resuming continues despite it.

        > Parameters that control tracking

        save_adversarial_examples (`bool`, *optional*, defaults to `False`):
            Send a picture of some adversarial training examples to TensorBoard and Trackio with each training log.

        > Parameters that control pushing to the Hub

        hub_timeout (`float`, *optional*):
            Time limit of an upload in seconds. None: five minutes plus the time it takes at 250 kB/s.

    Activation checkpointing applies to the update, but not to the attack, which runs in evaluation mode on the bare
    model. `torch_compile` applies to both: the pass that an attack repeats is a separate graph. (CUDA graphs,
    `torch_compile_mode="reduce-overhead"`, do not support `gradient_accumulation_steps`, a limitation of torch.)

    > [!NOTE]
    > Defaults that differ from [`~transformers.TrainingArguments`]: `remove_unused_columns` is `False`, since images
    > are transformed on the fly from a column that the model does not know. With `load_best_model_at_end`,
    > `metric_for_best_model` is `"robust_accuracy"` instead of the clean `"loss"`, since a model that overfits loses
    > its robustness first. (It stays `"loss"` with `eval_attack_during_training=False`, and for learning rate
    > schedules that follow the metric.) If left at None, `ddp_find_unused_parameters` is on only for models that have
    > unused parameters, and `ddp_broadcast_buffers` only if BatchNorm is not frozen.

    Raises:
        ValueError: naming the argument, its value and the remedy.
    """

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Remove columns not used by the model's forward from `datasets.Dataset`s."}
    )

    # --- Threat model ---
    norm: str = field(default="linf", metadata={"help": "Norm of the perturbation.", "choices": NORMS})
    epsilon: str = field(
        default="4/255",
        metadata={"help": "Target perturbation strength in pixels scaled to [0, 1], such as 8/255 or 0.03."},
    )

    # --- Training attack ---
    attack: str = field(default="apgd", metadata={"help": "Training attack.", "choices": TRAINING_ATTACKS})
    attack_steps: int = field(default=7, metadata={"help": "Gradient evaluations of the training attack."})
    attack_steps_schedule: str = field(
        default="constant",
        metadata={
            "help": "Always take attack_steps, or fewer while epsilon is below its target.",
            "choices": ["constant", "epsilon"],
        },
    )
    attack_step_size: float | None = field(
        default=None, metadata={"help": "Step size relative to the current epsilon. Default: the attack's own rule."}
    )
    attack_random_start: bool = field(
        default=True, metadata={"help": "Start the training attack from a random point of the ball."}
    )
    attack_model_mode: str = field(
        default="eval",
        metadata={"help": "Mode of the model while it is attacked in training.", "choices": ["eval", "train"]},
    )
    attack_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the training attack: bfloat16. Default: that of the update.",
            "choices": ["bfloat16"],
        },
    )
    freeze_batch_norm: bool = field(
        default=True, metadata={"help": "Keep modules with running statistics in evaluation mode while training."}
    )

    # --- Loss ---
    robust_loss: str = field(default="at", metadata={"help": "Training loss.", "choices": LOSSES})
    robust_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the loss's regulariser, if any. Default: the published weight."}
    )

    # --- Epsilon schedule ---
    epsilon_schedule_type: str = field(
        default="hinge", metadata={"help": "How epsilon grows while training.", "choices": SCHEDULES}
    )
    epsilon_schedule_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Arguments of the schedule, as JSON on the command line: \'{"start": 0.25, "end": 0.75}\'.'},
    )
    epsilon_schedule_interval: str = field(
        default="step",
        metadata={"help": "Change epsilon at every step, or once per epoch.", "choices": ["step", "epoch"]},
    )

    # --- Mixing ---
    mixup_alpha: float = field(default=0, metadata={"help": "Mixup of training images, such as 0.2. 0: off."})
    cutmix_alpha: float = field(default=0, metadata={"help": "CutMix of training images, such as 1. 0: off."})

    # --- What learns how fast ---
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the classification head. Default: learning_rate."}
    )
    layer_decay: float | None = field(
        default=None, metadata={"help": "Learning rate of each layer relative to that of the next deeper one."}
    )
    head_warmup_steps: float = field(
        default=0, metadata={"help": "First steps, in which only the head learns; below 1: their share of all."}
    )

    # --- Weight perturbation ---
    awp_gamma: float | None = field(
        default=None, metadata={"help": "Adversarial weight perturbation of this relative length, such as 0.0005."}
    )
    awp_warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps without weight perturbation; below 1: their share of all."}
    )

    # --- Weight averaging ---
    weight_averaging: str | None = field(
        default=None,
        metadata={"help": "Evaluate and save an average of the weights instead of the last.", "choices": ["ema"]},
    )
    ema_decay: float = field(
        default=0.999, metadata={"help": "Weight of the former average after each step; smaller at first."}
    )

    # --- Robust evaluation ---
    eval_attack: str = field(default="apgd", metadata={"help": "Evaluation attack.", "choices": ATTACKS})
    eval_attack_steps: int = field(default=10, metadata={"help": "Gradient evaluations of the evaluation attack."})
    eval_epsilons: list[str] | None = field(
        default=None,
        metadata={"help": "Epsilons of the evaluation, from 0. Default: 0, 1/4, 1/2, 3/4 and 1 times epsilon."},
    )
    eval_attack_during_training: bool = field(
        default=True,
        metadata={"help": "Attack in evaluations while training runs; if not, those report clean accuracy only."},
    )
    best_model_at_any_epsilon: bool = field(
        default=False,
        metadata={"help": "Choose the best model on the ramp of epsilon too, not only at its final value."},
    )

    # --- Alarms ---
    abort_on_alarm: bool = field(
        default=False,
        metadata={"help": "Save and stop when an alarm says that the run is failing; if not, warn only."},
    )

    # --- Tracking ---
    save_adversarial_examples: bool = field(
        default=False, metadata={"help": "Show adversarial training examples in TensorBoard and Trackio."}
    )

    # --- Hub ---
    hub_timeout: float | None = field(
        default=None,
        metadata={"help": "Seconds an upload may take. Default: five minutes plus the time it takes at 250 kB/s."},
    )

    def __post_init__(self):
        check_ranges(self, RANGES)
        check_choices(self)
        self.epsilon_schedule_kwargs = _read_json("epsilon_schedule_kwargs", self.epsilon_schedule_kwargs)
        follows_metric = SchedulerType(self.lr_scheduler_type) in METRIC_SCHEDULERS
        if self.metric_for_best_model is None and self.load_best_model_at_end and not follows_metric:
            self.metric_for_best_model = "robust_accuracy" if self.eval_attack_during_training else None
        super().__post_init__()
        self.epsilon = str(self.epsilon)
        check_attacks(self)
        check_loss_arguments(self)
        check_weights(self)
        # Raise for a bad epsilon or schedule now, not after the model has been loaded.
        ThreatModel(self.norm, self.epsilon)
        EpsilonScheduleCallback(self.make_epsilon_schedule(), self.epsilon_schedule_interval)
        check_eval_epsilons(self)
        check_supported(self)

    def make_epsilon_schedule(self) -> EpsilonSchedule:
        """The schedule that `epsilon_schedule_type` and `epsilon_schedule_kwargs` name."""
        kwargs = cast(dict[str, Any], self.epsilon_schedule_kwargs or {})
        return get_epsilon_schedule(self.epsilon_schedule_type, **kwargs)

    @property
    def epsilon_grid(self) -> list[Fraction]:
        """The epsilons of the evaluation, exactly, in increasing order; the first is 0."""
        if self.eval_epsilons is None:
            return [parse_epsilon(self.epsilon) * share / 4 for share in range(5)]
        return parse_epsilons(self.norm, self.eval_epsilons, argument="eval_epsilons")


def _read_json(name: str, value: Any) -> Any:
    """A dictionary, given as JSON on the command line."""
    if not isinstance(value, str):
        return value
    try:
        return dict(json.loads(value))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`{name}={value!r}` is not a JSON object ({error}); write '{{\"name\": value}}', with double quotes."
        ) from error
