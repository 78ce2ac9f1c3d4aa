"""Epsilon schedules: pure functions from training progress to a multiplier of the target epsilon, and their callback.

Progress is the share of optimizer steps already completed, in [0, 1]. A schedule has no state, so resuming, the number
of processes and the number of accumulation steps cannot change it.

The two-hinge schedule is the Epsilon-Scheduling of "Robust Fine-Tuning from Non-Robust Pretrained Models: Mitigating
Suboptimal Transfer With Epsilon-Scheduling" (https://huggingface.co/papers/2509.23325).
"""

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging
from transformers.utils.generic import ExplicitEnum


logger = logging.get_logger(__name__)

EpsilonSchedule = Callable[[float], float]


def _ramp(progress: float, start: float, end: float) -> float:
    """0 before `start`, 1 from `end` on, linear in between; a jump where the two coincide."""
    if progress >= end:
        return 1.0
    if progress < start:
        return 0.0
    return (progress - start) / (end - start)


def _check_hinges(start: float, end: float) -> None:
    for name, value in (("start", start), ("end", end)):
        if not isinstance(value, Real) or not 0 <= value <= 1:
            raise ValueError(f"`{name}={value}` is not a share of training; give a number in [0, 1].")
    if start > end:
        raise ValueError(f"`start={start}` is after `end={end}`; the ramp of epsilon must not end before it starts.")


def constant(*, multiplier: float = 1.0) -> EpsilonSchedule:
    """The same multiplier throughout: `1` is standard adversarial training, `0` is plain fine-tuning."""
    if not isinstance(multiplier, Real) or not 0 <= multiplier <= 1:
        raise ValueError(f"`multiplier={multiplier}` is outside [0, 1]; raise `epsilon` to train beyond it.")
    return lambda progress: float(multiplier)


def hinge(*, start: float = 0.25, end: float = 0.75) -> EpsilonSchedule:
    """Epsilon-Scheduling: `0` before `start`, `(p - start) / (end - start)` up to `end`, then `1` (paper, section 4).

    The defaults follow the paper's hinges, epochs 12 and 37 of 50. `start = end = 0` is a constant epsilon.
    """
    _check_hinges(start, end)
    return lambda progress: _ramp(progress, start, end)


def linear(*, end: float = 0.75) -> EpsilonSchedule:
    """Linear warm-up from the first step: the hinge schedule with `start = 0`."""
    return hinge(start=0.0, end=end)


def cosine(*, start: float = 0.25, end: float = 0.75) -> EpsilonSchedule:
    """Half a cosine wave between the hinges: `(1 - cos(pi u)) / 2`, where `u` is the share of the ramp."""
    _check_hinges(start, end)
    return lambda progress: (1.0 - math.cos(math.pi * _ramp(progress, start, end))) / 2.0


def smoothed(*, start: float = 0.25, end: float = 0.75, middle: float = 0.25, power: float = 4.0) -> EpsilonSchedule:
    """A slow start: `a u^power` up to `middle` of the ramp, then along the tangent, reaching 1 at the end.

    Used in certified training (Zhang et al., CROWN-IBP, https://huggingface.co/papers/1906.06316).
    """
    _check_hinges(start, end)
    if not isinstance(middle, Real) or not 0 < middle < 1:
        raise ValueError(f"`middle={middle}` must lie strictly between 0 and 1: it is a share of the ramp.")
    if not isinstance(power, Real) or not 1 <= power <= 100:
        raise ValueError(f"`power={power}` must be at least 1, or epsilon jumps at the start, and at most 100.")
    scale = 1.0 / (middle**power + power * middle ** (power - 1.0) * (1.0 - middle))

    def schedule(progress: float) -> float:
        u = _ramp(progress, start, end)
        if u < middle:
            return scale * u**power
        return scale * (middle**power + power * middle ** (power - 1.0) * (u - middle))

    return schedule


def piecewise(*, points: Sequence[tuple[float, float]]) -> EpsilonSchedule:
    """Linear between `points`, `(progress, multiplier)` pairs; constant before the first and after the last."""
    try:
        progress_points, multipliers = np.array(points, dtype=float).reshape(len(points), 2).T
        if len(points) == 0:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"`points={points}` must be a non-empty list of (progress, multiplier) pairs.") from None
    if not (np.all(np.diff(progress_points) > 0) and progress_points[0] >= 0 and progress_points[-1] <= 1):
        raise ValueError(f"`points={points}`: progress must increase strictly and stay in [0, 1].")
    if not np.all((multipliers >= 0) & (multipliers <= 1)):
        raise ValueError(f"`points={points}`: multipliers must lie in [0, 1]; raise `epsilon` to train beyond it.")
    return lambda progress: float(np.interp(progress, progress_points, multipliers))


def adaptive(
    *, duration: float = 0.35, low: float = 0.05, high: float = 0.5, start: float = 0.5, end: float = 0.9
) -> EpsilonSchedule:
    """A ramp at the pace of the model: epsilon rises while the model masters the epsilon it has.

    Its speed is proportional to the accuracy on the adversarial training examples, as far as that exceeds `low`; from
    `high` on it is full speed, at which the ramp takes `duration`, a share of training. So it is over early where the
    task is easy, and waits where it is hard. It is never behind a late hinge schedule from `start` to `end`, so that
    epsilon is reached in time. No extra pass: the accuracy is that of the log, with which epsilon moves. With fewer
    than 20 classes, guessing alone exceeds the default `low`.

    Unlike instance-adaptive training (Balaji et al. 2019, https://huggingface.co/papers/1910.08051) and MMA (Ding et
    al. 2020, https://huggingface.co/papers/1812.02637), all examples share one epsilon, and the log is all its memory.
    """
    late = hinge(start=start, end=end)
    for name, value in (("low", low), ("high", high), ("duration", duration)):
        if not isinstance(value, Real) or not 0 <= value <= 1:
            raise ValueError(f"`{name}={value}` is outside [0, 1].")
    if duration == 0 or low >= high:
        raise ValueError(f"`duration={duration}` must be above 0, and `low={low}` below `high={high}`.")

    def schedule(progress: float, accuracies: Sequence[tuple[float, float]] = ()) -> float:
        paced = before = 0.0
        for at, accuracy in accuracies:
            paced += _ramp(accuracy, low, high) * (at - before) / duration
            before = at
        return min(max(paced, late(progress)), 1.0)

    schedule.follows_accuracy = True  # pyright: ignore[reportFunctionMemberAccess]
    return schedule


def check_schedule(schedule: Any) -> None:
    """Refuse anything that cannot be called with progress alone, as far as its signature can be read."""
    if not callable(schedule):
        raise ValueError(
            f"`epsilon_schedule={schedule!r}` is not a function; pass one from progress in [0, 1] to a multiplier of "
            "epsilon, or name a built-in one with `RobustTrainingArguments(epsilon_schedule_type=...)`."
        )
    try:
        inspect.signature(schedule).bind(0.0)
    except TypeError as error:
        raise ValueError(
            f"`epsilon_schedule={schedule!r}` is called as `epsilon_schedule(progress)`, with one positional "
            f"argument, which its signature {inspect.signature(schedule)} does not allow: {error}."
        ) from error
    except ValueError:  # some callables written in C have no signature
        pass


def checked_multiplier(multiplier: float, progress: float) -> float:
    """The multiplier a schedule returned at `progress`, checked and capped at 1.

    Raises:
        ValueError: naming the value, the progress and the remedy.
    """
    # A formula that ends at 1 may exceed it by a few units in the last place.
    if not isinstance(multiplier, Real) or not 0 <= multiplier <= 1 + 1e-9:
        raise ValueError(
            f"`epsilon_schedule` returned {multiplier!r} at progress {progress:.3f}; it must return a multiplier of "
            "epsilon from 0 to 1. To train beyond `epsilon`, raise it."
        )
    return min(float(multiplier), 1.0)


def scaled_steps(steps: int, multiplier: float) -> int:
    """Number of attack steps, scaled with epsilon: `multiplier * steps`, rounded up, between 1 and `steps`.

    A smaller ball needs fewer steps: the loss is closer to linear there, and for a linear loss one step is enough.
    """
    # 3/7 is not a float; without rounding, 7 times it might come out above 3.
    return min(max(1, math.ceil(round(steps * multiplier, 9))), steps)


# Names for the command line. In Python, any function of progress will do.
SCHEDULES: dict[str, Callable[..., EpsilonSchedule]] = {
    "constant": constant,
    "linear": linear,
    "hinge": hinge,
    "cosine": cosine,
    "smoothed": smoothed,
    "piecewise": piecewise,
    "adaptive": adaptive,
}

# The same names as an enumeration: `EpsilonScheduleType.HINGE`.
EpsilonScheduleType = ExplicitEnum("EpsilonScheduleType", {name.upper(): name for name in SCHEDULES}, module=__name__)


def get_epsilon_schedule(name: str, **kwargs) -> EpsilonSchedule:
    """Build a schedule by name.

    Args:
        name (`str` or [`EpsilonScheduleType`]):
            A name in `SCHEDULES`.
        kwargs:
            The schedule's own arguments, such as `start` and `end`, which are shares of training in [0, 1].

    Returns:
        `Callable[[float], float]`: maps progress in [0, 1] to the multiplier of epsilon, in [0, 1].

    Raises:
        ValueError: for an unknown name, or an argument that is unknown, missing or out of range.

    Example:

    ```python
    >>> from hf_rft import get_epsilon_schedule

    >>> schedule = get_epsilon_schedule("hinge", start=0.25, end=0.75)
    >>> [schedule(progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [0.0, 0.0, 0.5, 1.0, 1.0]

    ```
    """
    if name not in SCHEDULES:
        raise ValueError(f"`epsilon_schedule_type={name!r}` is unknown; choose one of {list(SCHEDULES)}.")
    factory = SCHEDULES[name]
    signature = inspect.signature(factory)
    try:
        bound = signature.bind(**kwargs)
    except TypeError as error:
        raise ValueError(
            f"The {name!r} epsilon schedule takes {list(signature.parameters)}, got {sorted(kwargs)}: {error}."
        ) from error
    schedule = factory(**kwargs)
    bound.apply_defaults()
    arguments = ", ".join(f"{key}={value}" for key, value in bound.arguments.items())
    schedule.__qualname__ = f"{factory.__name__}({arguments})"  # for its `repr`
    return schedule


def is_stream(state: TrainerState) -> bool:
    """Whether the training dataset has no length, so that the number of epochs is unknown."""
    return state.num_train_epochs >= sys.maxsize


def _steps_per_epoch(state: TrainerState) -> int:
    """Optimizer steps per epoch: exact once a step has been taken, a lower bound before that.

    `state.epoch` counts micro-batches, and the last step of an epoch may have fewer of them. So within an epoch it
    equals the share of completed steps, or exceeds it by less than one step.
    """
    if not state.epoch or not state.global_step:
        return math.ceil(state.max_steps / max(state.num_train_epochs, 1))
    return math.ceil(round(state.global_step / state.epoch, 6))


def _accuracies(state: TrainerState, progress: float) -> list[tuple[float, float]]:
    """Progress and accuracy of each training log up to `progress`; checkpoints restore the log."""
    name = "adversarial_accuracy"
    found = [(entry["step"] / state.max_steps, entry[name]) for entry in state.log_history if name in entry]
    return [(at, accuracy) for at, accuracy in found if at <= progress]


class EpsilonScheduleCallback(TrainerCallback):
    """Sets the share of epsilon for the next training step.

    It has no state of its own: everything follows from [`~transformers.TrainerState`], which checkpoints restore. The
    trainer queries its callback before every step, so a subclass that overrides `multiplier` can do what a function of
    progress cannot. Without such a callback, epsilon is constant.

    Args:
        schedule (`Callable[[float], float]`):
            Maps progress in [0, 1] to a multiplier of epsilon. If it has an attribute `follows_accuracy` that is
            true, it is also given what has been logged: pairs of progress and the accuracy on the adversarial training
            examples since the pair before; see [`~hf_rft.schedules.adaptive`].
        interval (`str`, *optional*, defaults to `"step"`):
            `"step"` measures progress in completed optimizer steps, `"epoch"` in completed epochs (a staircase, as in
            the paper).

    Raises:
        ValueError: for an unknown interval, or a schedule that cannot be called with progress alone.
    """

    def __init__(self, schedule: EpsilonSchedule, interval: str = "step"):
        if interval not in ("step", "epoch"):
            raise ValueError(f"`epsilon_schedule_interval={interval!r}` is unknown; choose 'step' or 'epoch'.")
        check_schedule(schedule)
        self.schedule = schedule
        self.interval = interval

    def __repr__(self) -> str:
        schedule = getattr(self.schedule, "__qualname__", repr(self.schedule))
        return f"{type(self).__name__}({schedule}, interval={self.interval!r})"

    @property
    def follows_accuracy(self) -> bool:
        return getattr(self.schedule, "follows_accuracy", False)

    def progress(self, state: TrainerState) -> float:
        """Share of training completed before the next step, in [0, 1]."""
        if state.max_steps <= 0:
            return 0.0
        if self.interval == "step":
            return min(state.global_step / state.max_steps, 1.0)
        # `state.num_train_epochs` is rounded up.
        epochs = min(state.num_train_epochs, state.max_steps / _steps_per_epoch(state))
        return min(math.floor(state.epoch or 0.0) / epochs, 1.0)

    def multiplier(self, state: TrainerState) -> float:
        """The schedule's value for the next step, checked."""
        progress = self.progress(state)
        logged = [_accuracies(state, progress)] if self.follows_accuracy else []
        return checked_multiplier(self.schedule(progress, *logged), progress)

    def share(self, state: TrainerState) -> float:
        """The result of `multiplier`, checked, since a subclass may override it."""
        return checked_multiplier(self.multiplier(state), self.progress(state))

    def multiplier_of_step(self, state: TrainerState, step: int) -> float:
        """The schedule's value for a step of this run, counted from 0."""
        return self.multiplier(replace(state, global_step=step, epoch=step / _steps_per_epoch(state)))

    def grows(self, state: TrainerState) -> bool:
        """Whether training starts with a smaller epsilon than it ends with."""
        return self.multiplier_of_step(state, 0) < self.multiplier_of_step(state, state.max_steps - 1)

    def is_final(self, state: TrainerState) -> bool:
        """Whether the last completed step used the epsilon that training ends with."""
        multipliers = (self.multiplier_of_step(state, step) for step in (state.global_step - 1, state.max_steps - 1))
        return math.isclose(*multipliers, rel_tol=1e-6)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.interval == "epoch" and is_stream(state):
            raise ValueError(
                "`epsilon_schedule_interval='epoch'` needs a training dataset with a length, to know how many epochs "
                "there are; set it to 'step'."
            )
        if self.follows_accuracy and (args.logging_strategy != "steps" or state.logging_steps > state.max_steps / 10):
            raise ValueError(
                "The epsilon schedule follows the accuracy that training logs, and needs at least 10 logs: set "
                f"`logging_steps` to {max(state.max_steps // 10, 1)} or less, with `logging_strategy='steps'`."
            )
        at = {share: checked_multiplier(self.schedule(share), share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)}
        if getattr(args, "best_model_at_any_epsilon", False) and args.metric_for_best_model and self.grows(state):
            logger.warning(
                "`best_model_at_any_epsilon=True`: the best model, or an early stop, may come from the ramp, where "
                "models trained at different epsilons are compared, and a small epsilon favours clean accuracy."
            )
        logger.info("Epsilon by progress: " + ", ".join(f"{share:.0%} -> {value:.3g}x" for share, value in at.items()))
