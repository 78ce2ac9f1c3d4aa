"""Alarms: a run says while it runs that it is failing, and what to do about it.

Each is a pure function of `TrainerState.log_history`, so that resuming changes nothing, and quiet when all is well.
The callback in alarm_callback.py asks them whenever something was logged. An alarm goes off once a run: it is a
warning, and an entry `alarm_<name>` of the history, with its `message`; with `abort_on_alarm` training stops too.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers.utils import logging

from ..attacks.base import ZERO_GRADIENT_SHARE
from .onset import evaluations, find_onset, onset_threshold, while_training


logger = logging.get_logger(__name__)

History = Sequence[Mapping[str, Any]]

# A loss this near that of guessing says that nothing was learnt.
SHARE_OF_GUESSING = 0.95
# A shorter run is a trial of the code: nobody expects it to learn.
FEW_STEPS = 20
# Share of the epochs after which adaptation is due, and share of training over which the loss is averaged.
DUE, WINDOW = 0.2, 0.1
# Fall of the accuracy under several steps (Wong et al. 2020, section 5.4).
MULTI_STEP_FALL = 0.2
# Fall of the robust validation accuracy; and where the size of the validation set, and so its noise, is not known.
ROBUST_FALL, ROBUST_FALL_UNKNOWN_NOISE = 0.02, 0.1

_PREFIX = "alarm_"


@dataclass(frozen=True)
class Run:
    """What the alarms must know of a run besides its history.

    Args:
        num_classes (`int`):
            Number of classes of the task.
        chance_loss (`Callable[[], float]`):
            Returns the training loss of a model that gives every class the same probability; ln(num_classes) for AT.
            It is not called before it is needed, since the loss may be a function of the user's.
        max_steps (`int`), num_epochs (`float`):
            Length of training, in optimizer steps and in epochs.
        num_eval_examples (`int`, *optional*):
            Size of the validation set; None if unknown.
        prefix (`str`, *optional*, defaults to `"eval"`):
            Of the evaluation's metrics.
        epsilon_grows (`Callable[[], bool]`, *optional*):
            Returns whether the schedule begins with a smaller epsilon than it ends with. None: it does not.
    """

    num_classes: int
    chance_loss: Callable[[], float]
    max_steps: int
    num_epochs: float
    num_eval_examples: int | None = None
    prefix: str = "eval"
    epsilon_grows: Callable[[], bool] | None = None


class Alarm(NamedTuple):
    """Its name, and what was seen, what it means and what to do about it."""

    name: str
    message: str


# --- Detection ---


def transfer_failure(history: History, run: Run) -> Alarm | None:
    """The model does not begin to learn the task (paper, section 3): the loss stays near that of guessing, or no
    evaluation passes the threshold of adaptation by the epoch where that is due.

    Both are due after 20 % of the epochs, rounded up. A loss near that of guessing is no failure while
    the latest clean accuracy, of an evaluation or a probe, is above the threshold: then only the attack is too strong.
    Nothing is expected of a run of less than 20 steps.
    """
    if run.max_steps < FEW_STEPS:
        return None
    losses = [entry for entry in history if "loss" in entry]
    measured = evaluations(history, run.prefix)
    threshold, due = onset_threshold(run.num_classes), max(1, math.ceil(DUE * run.num_epochs))
    meaning = f"The model does not begin to learn the task. {_remedy(losses, run)}"
    if losses:
        step, epoch = losses[-1]["step"], losses[-1].get("epoch") or 0.0
        loss = statistics.fmean(
            entry["loss"] for entry in losses if entry["step"] > min(step - WINDOW * run.max_steps, step - 1)
        )
        is_due = step >= DUE * run.max_steps and epoch >= due
        accuracies = _last(measured, f"{run.prefix}_accuracy") + _last(history, "probe_clean_accuracy")
        has_learnt = any(accuracy > threshold for accuracy in accuracies)
        if is_due and not has_learnt and loss > SHARE_OF_GUESSING * run.chance_loss():
            seen = (
                f"at epoch {epoch:.3g} the training loss is {loss:.4g}, that of guessing among {run.num_classes} "
                f"classes {run.chance_loss():.4g}."
            )
            return Alarm("transfer_failure", f"Transfer failure: {seen} {meaning}")
    if measured and measured[-1]["epoch"] >= due and find_onset(history, run.num_classes, run.prefix) is None:
        best = max(entry[f"{run.prefix}_accuracy"] for entry in measured)
        seen = (
            f"at epoch {measured[-1]['epoch']:.3g} no evaluation has had a clean accuracy above {_percent(threshold)} "
            f"(the best: {_percent(best)}); one is due by epoch {due}."
        )
        return Alarm("transfer_failure", f"Transfer failure: {seen} {meaning}")
    return None


def _remedy(losses: History, run: Run) -> str:
    """What is left to try when a model does not learn, given the epsilons it was trained at."""
    if losses and all(entry.get("epsilon") == 0 for entry in losses):
        return "Epsilon has been 0 so far, so no attack is to blame: try another `learning_rate`, check the labels."
    if run.epsilon_grows is not None and run.epsilon_grows():
        remedy = (
            "Epsilon grows already: try a smaller `epsilon`, later hinges (`start` and `end` of "
            "`epsilon_schedule_kwargs`) or another `learning_rate`"
        )
    else:
        remedy = (
            "Let epsilon grow from 0 (`epsilon_schedule_type='hinge'`), or try a smaller `epsilon` or another "
            "`learning_rate`"
        )
    return (
        f"{remedy}; see 'Robust Fine-Tuning from Non-Robust Pretrained Models', "
        "https://huggingface.co/papers/2509.23325."
    )


def catastrophic_overfitting(history: History, run: Run) -> Alarm | None:
    """The model withstands one step of an attack as well as before, but several steps no more (Wong et al. 2020, "Fast
    is better than free", https://huggingface.co/papers/2001.03994): compared with an earlier probe, the accuracy under
    one step is no lower, that under several more than 20 points, in two probes in a row.
    """
    probes = [entry for entry in history if "probe_multi_step_accuracy" in entry]
    if len(probes) < 3:
        return None
    single, multi = "probe_single_step_accuracy", "probe_multi_step_accuracy"
    *earlier, last_but_one, now = probes
    earlier = [entry for entry in earlier if entry[single] <= min(last_but_one[single], now[single])]
    before = max(earlier, key=lambda entry: entry[multi], default=now)
    if not all(_falls_by_more(before[multi], entry[multi], MULTI_STEP_FALL) for entry in (last_but_one, now)):
        return None
    return Alarm(
        "catastrophic_overfitting",
        f"Catastrophic overfitting: from epoch {before['epoch']:.3g} to {now['epoch']:.3g} the accuracy of "
        f"training examples under one step went from {_percent(before[single])} to {_percent(now[single])}, under "
        f"several steps from {_percent(before[multi])} to {_percent(now[multi])}. The model has learnt to mislead "
        "the training attack; it is not robust. Go back to an earlier checkpoint, and train with more `attack_steps`, "
        "with `attack_random_start`, or with a smaller `attack_step_size`.",
    )


def robust_overfitting(history: History, run: Run) -> Alarm | None:
    """Robust accuracy falls on validation data while it rises on training data (Rice et al. 2020, "Overfitting in
    adversarially robust deep learning", https://huggingface.co/papers/2002.11569).

    The last two evaluations must lie below the best one by more than 2 points and more than two standard errors of the
    difference, and training accuracy above validation accuracy by as much: what is not learnt on training data either
    is no overfitting. Only evaluations are compared before which training was at the same epsilon as now. Runs of less
    than 20 steps are too short to tell.
    """
    if run.max_steps < FEW_STEPS:
        return None
    accuracy = f"{run.prefix}_robust_accuracy"
    compared = [entry for entry in _robust_evaluations(history, accuracy) if entry.epsilon > 0]
    compared = [entry for entry in compared if math.isclose(entry.epsilon, compared[-1].epsilon, rel_tol=1e-6)]
    if len(compared) < 3:
        return None
    *earlier, last_but_one, last = compared
    best = max(earlier, key=lambda entry: entry.validation)
    for entry in (last_but_one, last):
        margin = _noise(best.validation, entry.validation, run)
        if not _falls_by_more(best.validation, entry.validation, margin):
            return None
        if not _falls_by_more(entry.training, entry.validation, margin):
            return None
    if last.training <= best.training:
        return None
    return Alarm(
        "robust_overfitting",
        f"Robust overfitting: from epoch {best.epoch:.3g} to {last.epoch:.3g} robust accuracy fell from "
        f"{_percent(best.validation)} to {_percent(last.validation)} on validation data, and rose from "
        f"{_percent(best.training)} to {_percent(last.training)} on training data. The best model lies behind: keep "
        "it with `load_best_model_at_end=True` and `metric_for_best_model='robust_accuracy'`, or stop earlier.",
    )


def gradient_masking(history: History, run: Run) -> Alarm | None:
    """Input gradients of exactly zero, for more than 5 % of the probed examples: attacks find nothing there."""
    share = _last(history, "probe_zero_gradient_share")
    if not share or share[0] <= ZERO_GRADIENT_SHARE:
        return None
    return Alarm(
        "gradient_masking",
        f"Gradient masking: the input gradient is exactly zero for {_percent(share[0])} of the probed training "
        "examples. A quantisation, a dead activation or another operation without a derivative hides it, and the "
        "training attack finds nothing there: robust accuracies are not to be believed. Remove that operation from "
        "the model, or lower `learning_rate` if units have died in training.",
    )


# For each kind of entry, by a key it has, what may have changed when one is logged.
_AFTER_LOSS, _AFTER_PROBE = (transfer_failure,), (catastrophic_overfitting, gradient_masking)
_AFTER_EVALUATION = (transfer_failure, robust_overfitting)


def detect(history: History, run: Run, logged: Mapping[str, Any]) -> list[Alarm]:
    """The alarms that `logged`, the newest entry of the history, gives reason for."""
    detectors: tuple[Callable[[History, Run], Alarm | None], ...] = ()
    if "loss" in logged:
        detectors = _AFTER_LOSS
    elif "probe_epsilon" in logged:
        detectors = _AFTER_PROBE
    elif f"{run.prefix}_accuracy" in logged:
        detectors = _AFTER_EVALUATION
    return [alarm for detector in detectors if (alarm := detector(history, run)) is not None]


class _RobustEvaluation(NamedTuple):
    epoch: float
    validation: float  # robust accuracy
    training: float  # adversarial accuracy of the training steps since the evaluation before, at `epsilon`
    epsilon: float  # of the last of those steps


def _robust_evaluations(history: History, accuracy: str) -> list[_RobustEvaluation]:
    """Each evaluation with the training that led to it."""
    found, steps, is_new = [], [], True
    for entry in while_training(history):
        if "adversarial_accuracy" in entry:
            steps = [*([] if is_new else steps), entry]
            is_new = False
        elif accuracy in entry and steps:
            epsilon = steps[-1]["epsilon"]
            of_steps = [step["adversarial_accuracy"] for step in steps if step["epsilon"] == epsilon]
            found.append(_RobustEvaluation(entry["epoch"], entry[accuracy], statistics.fmean(of_steps), epsilon))
            is_new = True
    return found


def _noise(before: float, after: float, run: Run) -> float:
    """The fall of an accuracy that must be passed: 2 points, and two standard errors of the difference."""
    if run.num_eval_examples is None:
        return ROBUST_FALL_UNKNOWN_NOISE
    variance = (before * (1 - before) + after * (1 - after)) / run.num_eval_examples
    return max(ROBUST_FALL, 2 * math.sqrt(variance))


def _falls_by_more(before: float, after: float, margin: float) -> bool:
    return before - after > margin + 1e-9  # 0.3 - 0.1 is more than 0.2 in binary


def _last(history: History, key: str) -> list[float]:
    """The latest value under `key`; empty if there is none."""
    return next(([entry[key]] for entry in reversed(history) if key in entry), [])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# --- Recorded alarms ---


def alarm_entry(name: str) -> dict[str, float]:
    """What is logged when an alarm goes off: a number, which every tool that reads logs can show."""
    return {f"{_PREFIX}{name}": 1.0}


def recorded_alarms(history: History) -> dict[str, str]:
    """Name and message of the alarms that went off, in order."""
    return {
        key.removeprefix(_PREFIX): entry.get("message", "")
        for entry in history
        for key in entry
        if key.startswith(_PREFIX)
    }
