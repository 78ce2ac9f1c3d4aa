"""Alarms: the signs that a training run is failing, and what to do about it.

Each alarm is a pure function of `TrainerState.log_history`, so resuming changes nothing. alarm_callback.py calls them
after every log. An alarm is raised once per run: as a warning, and as an entry `alarm_<name>` of the history with its
`message`; with `abort_on_alarm`, training stops too.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..attacks.base import ZERO_GRADIENT_SHARE
from .onset import chance_accuracy, evaluations, first_above_chance, onset_threshold, while_training


History = Sequence[Mapping[str, Any]]

# A loss above this share of the loss of guessing means that nothing was learnt.
SHARE_OF_GUESSING = 0.95
# Shorter runs only try the code: they are not expected to learn.
FEW_STEPS = 20
# Share of training after which adaptation is due, and over which the loss is averaged.
DUE, WINDOW = 0.2, 0.1
# Drop of the accuracy under several attack steps (Wong et al. 2020, section 5.4).
MULTI_STEP_DROP = 0.2
# Drop of the robust validation accuracy, and the drop if the size of the validation set (hence its noise) is unknown.
ROBUST_DROP, ROBUST_DROP_UNKNOWN_NOISE = 0.02, 0.1

_PREFIX = "alarm_"


@dataclass(frozen=True)
class Run:
    """What the alarms need to know about a run besides its history.

    Args:
        num_classes (`int`):
            Number of classes of the task.
        chance_loss (`Callable[[], float]`):
            Returns the training loss of a model that gives every class the same probability: ln(num_classes) for AT.
            Called only when needed, since the loss may be the user's own.
        max_steps (`int`), num_epochs (`float`):
            Length of training, in optimizer steps and in epochs.
        num_eval_examples (`int`, *optional*):
            Size of the validation set; None if unknown.
        prefix (`str`, *optional*, defaults to `"eval"`):
            Prefix of the evaluation's metrics.
        epsilon_grows (`bool`, *optional*, defaults to `False`):
            Whether the schedule starts with a smaller epsilon than it ends with.
    """

    num_classes: int
    chance_loss: Callable[[], float]
    max_steps: int
    num_epochs: float
    num_eval_examples: int | None = None
    prefix: str = "eval"
    epsilon_grows: bool = False


class Alarm(NamedTuple):
    name: str
    message: str  # what was observed, what it means, and what to do about it


# --- Detection ---


def transfer_failure(history: History, run: Run) -> Alarm | None:
    """The model does not begin to learn the task (paper, section 3): after 20 % of the epochs, rounded up, the loss is
    still near that of guessing, or no evaluation has passed the threshold of adaptation.

    A loss near that of guessing is not a failure while the latest clean accuracy, of an evaluation or a probe, is
    above the threshold: then the attack is merely too strong. Runs of fewer than 20 steps raise no alarm.
    """
    if run.max_steps < FEW_STEPS:
        return None
    losses = [entry for entry in history if "loss" in entry]
    measured = evaluations(history, run.prefix)
    threshold = onset_threshold(chance_accuracy(history, run.num_classes, run.prefix))
    due = max(1, math.ceil(DUE * run.num_epochs))
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
            return Alarm(
                "transfer_failure",
                f"Transfer failure: at epoch {epoch:.3g} the training loss is {loss:.4g}, that of guessing among "
                f"{run.num_classes} classes {run.chance_loss():.4g}. {meaning}",
            )
    has_adapted = first_above_chance(history, run.num_classes, run.prefix) is not None
    if measured and measured[-1]["epoch"] >= due and not has_adapted:
        best = max(entry[f"{run.prefix}_accuracy"] for entry in measured)
        return Alarm(
            "transfer_failure",
            f"Transfer failure: at epoch {measured[-1]['epoch']:.3g} no evaluation has had a clean accuracy above "
            f"{_percent(threshold)} (the best: {_percent(best)}); one is due by epoch {due}. {meaning}",
        )
    return None


def _remedy(losses: History, run: Run) -> str:
    """What to try when a model does not learn, given the epsilons it has been trained with."""
    if losses and all(entry.get("epsilon") == 0 for entry in losses):
        return "Epsilon has been 0 so far, so no attack is to blame: try another `learning_rate` and check the labels."
    remedy = "Let epsilon grow from 0 (`epsilon_schedule_type='hinge'`), or try a smaller `epsilon`"
    if run.epsilon_grows:
        remedy = "Try a smaller `epsilon`, a later ramp (`start` and `end` of `epsilon_schedule_kwargs`)"
    return (
        f"{remedy} or another `learning_rate`; see 'Robust Fine-Tuning from Non-Robust Pretrained Models', "
        "https://huggingface.co/papers/2509.23325."
    )


def catastrophic_overfitting(history: History, run: Run) -> Alarm | None:
    """The model withstands one attack step as well as before, but no longer several (Wong et al. 2020, "Fast is better
    than free", https://huggingface.co/papers/2001.03994): in two consecutive probes, the accuracy under several steps
    is more than 20 points below that of an earlier probe, the accuracy under one step no lower.
    """
    probes = [entry for entry in history if "probe_multi_step_accuracy" in entry]
    if len(probes) < 3:
        return None
    single, multi = "probe_single_step_accuracy", "probe_multi_step_accuracy"
    *earlier, last_but_one, now = probes
    earlier = [entry for entry in earlier if entry[single] <= min(last_but_one[single], now[single])]
    before = max(earlier, key=lambda entry: entry[multi], default=now)
    if not all(_drops_by_more(before[multi], entry[multi], MULTI_STEP_DROP) for entry in (last_but_one, now)):
        return None
    return Alarm(
        "catastrophic_overfitting",
        f"Catastrophic overfitting: from epoch {before['epoch']:.3g} to {now['epoch']:.3g} the accuracy of "
        f"training examples under one step went from {_percent(before[single])} to {_percent(now[single])}, under "
        f"several steps from {_percent(before[multi])} to {_percent(now[multi])}. The model has learnt to fool "
        "the training attack; it is not robust. Go back to an earlier checkpoint, and train with more `attack_steps`, "
        "with `attack_random_start`, or with a smaller `attack_step_size`.",
    )


def robust_overfitting(history: History, run: Run) -> Alarm | None:
    """Robust accuracy falls on validation data while it rises on training data (Rice et al. 2020, "Overfitting in
    adversarially robust deep learning", https://huggingface.co/papers/2002.11569).

    The last two evaluations must lie more than 2 points and two standard errors of the difference below the best one,
    and below the training accuracy. Only evaluations after training at the current epsilon are compared. Runs of fewer
    than 20 steps raise no alarm.
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
        if not _drops_by_more(best.validation, entry.validation, margin):
            return None
        if not _drops_by_more(entry.training, entry.validation, margin):
            return None
    if last.training <= best.training:
        return None
    return Alarm(
        "robust_overfitting",
        f"Robust overfitting: from epoch {best.epoch:.3g} to {last.epoch:.3g} robust accuracy fell from "
        f"{_percent(best.validation)} to {_percent(last.validation)} on validation data, and rose from "
        f"{_percent(best.training)} to {_percent(last.training)} on training data. The best model has passed: keep "
        "it with `load_best_model_at_end=True` and `metric_for_best_model='robust_accuracy'`, or stop earlier.",
    )


def gradient_masking(history: History, run: Run) -> Alarm | None:
    """The input gradient is exactly zero for more than 5 % of the probed examples, so that attacks find nothing."""
    share = _last(history, "probe_zero_gradient_share")
    if not share or share[0] <= ZERO_GRADIENT_SHARE:
        return None
    return Alarm(
        "gradient_masking",
        f"Gradient masking: the input gradient is exactly zero for {_percent(share[0])} of the probed training "
        "examples. Quantisation, a dead activation or another operation without a derivative hides it, so the "
        "training attack finds nothing there, and robust accuracies cannot be trusted. Remove that operation from "
        "the model, or lower `learning_rate` if units have died in training.",
    )


def detect(history: History, run: Run, logged: Mapping[str, Any]) -> list[Alarm]:
    """The alarms that `logged`, the newest entry of the history, raises."""
    detectors: tuple[Callable[[History, Run], Alarm | None], ...] = ()
    if "loss" in logged:
        detectors = (transfer_failure,)
    elif "probe_epsilon" in logged:
        detectors = (catastrophic_overfitting, gradient_masking)
    elif f"{run.prefix}_accuracy" in logged:
        detectors = (transfer_failure, robust_overfitting)
    return [alarm for detector in detectors if (alarm := detector(history, run)) is not None]


class _RobustEvaluation(NamedTuple):
    epoch: float
    validation: float  # robust accuracy
    training: float  # adversarial accuracy of the training steps since the previous evaluation, at `epsilon`
    epsilon: float  # of the last training step


def _robust_evaluations(history: History, accuracy: str) -> list[_RobustEvaluation]:
    """Each evaluation with the training before it."""
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
    """A drop that noise may explain: the larger of 2 points and two standard errors of the difference."""
    if run.num_eval_examples is None:
        return ROBUST_DROP_UNKNOWN_NOISE
    variance = (before * (1 - before) + after * (1 - after)) / run.num_eval_examples
    return max(ROBUST_DROP, 2 * math.sqrt(variance))


def _drops_by_more(before: float, after: float, margin: float) -> bool:
    return before - after > margin + 1e-9  # in floating point, 0.3 - 0.1 > 0.2


def _last(history: History, key: str) -> list[float]:
    """The latest value under `key`; empty if there is none."""
    return next(([entry[key]] for entry in reversed(history) if key in entry), [])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# --- Recorded alarms ---


def alarm_entry(name: str) -> dict[str, float]:
    """What is logged when an alarm is raised: a number, since loggers expect numbers."""
    return {f"{_PREFIX}{name}": 1.0}


def recorded_alarms(history: History) -> dict[str, str]:
    """Name and message of the alarms raised so far, in order."""
    return {
        key.removeprefix(_PREFIX): entry.get("message", "")
        for entry in history
        for key in entry
        if key.startswith(_PREFIX)
    }
