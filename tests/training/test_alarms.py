import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerState

from hf_rft.losses import LOSSES
from hf_rft.training.alarm_callback import AlarmCallback
from hf_rft.training.alarms import (
    Run,
    alarm_entry,
    catastrophic_overfitting,
    detect,
    gradient_masking,
    recorded_alarms,
    robust_overfitting,
    transfer_failure,
)
from hf_rft.training.interruption import AlarmRaised


CHANCE = math.log(100)


def make_run(**changes):
    """100 classes, 50 epochs of 20 steps, 1000 validation examples: onset is due by epoch 10, above 5 %."""
    defaults = {"num_classes": 100, "chance_loss": lambda: CHANCE, "max_steps": 1000, "num_epochs": 50}
    return Run(**{**defaults, "num_eval_examples": 1000, **changes})


def losses(values, *, every=20, accuracy=0.5, epsilon=0.1):
    """A training log after every epoch of 20 steps."""
    return [
        {
            "loss": value,
            "epsilon": epsilon,
            "adversarial_accuracy": accuracy,
            "step": every * number,
            "epoch": every * number / 20,
        }
        for number, value in enumerate(values, start=1)
    ]


def evaluation(epoch, accuracy, robust=0.0, prefix="eval"):
    return {
        f"{prefix}_accuracy": accuracy,
        f"{prefix}_robust_accuracy": robust,
        "epoch": float(epoch),
        "step": 20 * epoch,
    }


def a_probe(single, multi, *, epoch=1.0, clean=0.0, zero=0.0, epsilon=0.1):
    return {
        "probe_epsilon": epsilon,
        "probe_clean_accuracy": clean,
        "probe_zero_gradient_share": zero,
        "probe_single_step_accuracy": single,
        "probe_multi_step_accuracy": multi,
        "epoch": epoch,
        "step": int(20 * epoch),
    }


# --- Transfer failure ---


@pytest.mark.parametrize(
    ("epochs", "share", "fires"),
    [(9, 1.0, False), (10, 1.0, True), (10, 0.951, True), (10, 0.949, False), (10, 1.5, True), (50, 0.99, True)],
)
def test_loss_of_guessing_after_a_fifth_of_training(epochs, share, fires):
    alarm = transfer_failure(losses([share * CHANCE] * epochs), make_run())
    assert (alarm is not None) == fires
    if fires:
        assert alarm.name == "transfer_failure"
        assert f"at epoch {epochs} the training loss is {share * CHANCE:.4g}, that of guessing" in alarm.message
        assert "https://huggingface.co/papers/2509.23325" in alarm.message


def test_the_loss_is_averaged_over_the_last_tenth_of_training():
    """Five epochs: what was before does not count, and neither does one bad epoch alone."""
    assert transfer_failure(losses([CHANCE] * 40 + [0.5 * CHANCE] * 5), make_run()) is None
    assert transfer_failure(losses([0.5 * CHANCE] * 40 + [CHANCE]), make_run()) is None
    assert transfer_failure(losses([0.5 * CHANCE] * 40 + [CHANCE] * 5), make_run())
    # Where logs are rarer than that, the last one counts.
    assert transfer_failure(losses([0.5 * CHANCE, CHANCE], every=400), make_run())


@pytest.mark.parametrize(
    ("num_epochs", "epoch", "fires"), [(1, 0.9, False), (1, 1.0, True), (6, 1.9, False), (6, 2, True)]
)
def test_due_by_whole_epochs(num_epochs, epoch, fires):
    history = [{"loss": CHANCE, "step": 100, "epoch": epoch}]
    run = make_run(num_epochs=num_epochs, max_steps=round(100 * num_epochs / epoch))
    assert (transfer_failure(history, run) is not None) == fires


def test_chance_loss_is_not_asked_for_before_it_is_needed():
    def never():
        raise AssertionError

    assert transfer_failure(losses([CHANCE] * 9), make_run(chance_loss=never)) is None


@pytest.mark.parametrize("clean", [evaluation(10, 0.06), a_probe(0, 0, clean=0.06)])
def test_an_attack_that_is_too_strong_is_no_transfer_failure(clean):
    """The clean accuracy says that the task is being learnt."""
    assert transfer_failure([*losses([CHANCE] * 10), clean], make_run()) is None
    still_guessing = {key: 0.05 if "accuracy" in key else value for key, value in clean.items()}
    assert transfer_failure([*losses([CHANCE] * 10), still_guessing], make_run())


def test_a_model_that_names_the_largest_class_has_not_learnt():
    """Its loss is well below that of guessing, and its accuracy well above 5 %."""
    collapsed = [evaluation(epoch, 0.3) | {"eval_majority_class_share": 0.3} for epoch in range(1, 11)]
    alarm = transfer_failure([*losses([0.8 * CHANCE] * 10), *collapsed], make_run())
    assert alarm and "no evaluation has had a clean accuracy above 35.0 % (the best: 30.0 %)" in alarm.message
    assert transfer_failure([*losses([0.8 * CHANCE] * 10), *collapsed[:9]], make_run()) is None
    collapsed[3]["eval_accuracy"] = 0.36
    assert transfer_failure([*losses([0.8 * CHANCE] * 10), *collapsed], make_run()) is None


@pytest.mark.parametrize(
    ("epsilons", "grows", "advice"),
    [
        ([0.1] * 10, False, "Let epsilon grow from 0 (`epsilon_schedule_type='hinge'`), or try a smaller `epsilon`"),
        ([0.0] * 5 + [0.1] * 5, True, "Try a smaller `epsilon`, a later ramp (`start` and `end` of"),
        ([0.0] * 10, True, "Epsilon has been 0 so far, so no attack is to blame: try another `learning_rate`"),
        ([0.0] * 10, False, "Epsilon has been 0 so far, so no attack is to blame: try another `learning_rate`"),
    ],
)
def test_the_advice_is_what_has_not_been_tried(epsilons, grows, advice):
    history = [{**entry, "epsilon": epsilon} for entry, epsilon in zip(losses([CHANCE] * 10), epsilons, strict=True)]
    message = transfer_failure(history, make_run(epsilon_grows=grows)).message
    assert advice in message and "`learning_rate`" in message
    assert ("hinge'" in message) == (not grows and epsilons[0] > 0)


@pytest.mark.parametrize("max_steps", [4, 19, 20])
def test_nothing_is_expected_of_a_run_of_a_few_steps(max_steps):
    run = make_run(max_steps=max_steps, num_epochs=1)
    failing = losses([CHANCE] * max_steps, every=1)
    failing[-1]["epoch"] = 1.0
    overfitting = stretches((0.5, 0.5), (0.7, 0.4), (0.8, 0.4))
    assert bool(transfer_failure(failing, run)) == bool(robust_overfitting(overfitting, run)) == (max_steps >= 20)


@pytest.mark.parametrize(
    ("accuracies", "fires"),
    [
        ([0.05] * 9, False),
        ([0.05] * 10, True),
        ([0.05] * 9 + [0.051], False),
        ([0.06] + [0.01] * 11, False),
        ([], False),
    ],
)
def test_no_onset_by_the_epoch_where_it_is_due(accuracies, fires):
    history = [evaluation(epoch, accuracy) for epoch, accuracy in enumerate(accuracies, start=1)]
    alarm = transfer_failure(history, make_run())
    assert (alarm is not None) == fires
    if fires:
        assert "no evaluation has had a clean accuracy above 5.0 % (the best: 5.0 %); one is due by" in alarm.message


# --- Catastrophic overfitting ---


@pytest.mark.parametrize(
    ("now", "fires"),
    [((0.6, 0.3), True), ((0.9, 0.0), True), ((0.6, 0.31), False), ((0.5, 0.0), False), ((0.6, 0.6), False)],
)
def test_several_steps_fall_by_more_than_20_points_and_one_step_does_not(now, fires):
    history = [a_probe(0.55, 0.51), a_probe(*now), a_probe(*now)]
    alarm = catastrophic_overfitting(history, make_run())
    assert (alarm is not None) == fires


def test_exactly_20_points_are_not_enough():
    assert catastrophic_overfitting([a_probe(0.3, 0.3), a_probe(0.3, 0.1), a_probe(0.3, 0.1)], make_run()) is None


def test_one_bad_probe_is_not_enough():
    assert catastrophic_overfitting([a_probe(0.6, 0.6), a_probe(0.7, 0.0)], make_run()) is None
    assert catastrophic_overfitting([a_probe(0.6, 0.6), a_probe(0.7, 0.0), a_probe(0.7, 0.6)], make_run()) is None


def test_catastrophic_overfitting_is_compared_with_the_best_earlier_probe():
    """That the collapse lies behind, and the last probes do not differ, is no excuse; probes at epsilon 0 are none."""
    at_zero = {"probe_epsilon": 0.0, "probe_clean_accuracy": 0.9, "probe_zero_gradient_share": 0.0, "epoch": 1.0}
    history = [at_zero, a_probe(0.2, 0.1), a_probe(0.5, 0.5, epoch=3.0), *[a_probe(0.9, 0.05, epoch=9.0)] * 4]
    alarm = catastrophic_overfitting(history, make_run())
    assert alarm is not None
    assert "from epoch 3 to 9" in alarm.message
    assert "one step went from 50.0 % to 90.0 %, under several steps from 50.0 % to 5.0 %" in alarm.message


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.2)), max_size=12))
def test_a_small_gap_between_one_step_and_several_is_never_catastrophic(accuracies):
    history = [a_probe(single, max(0.0, single - gap)) for single, gap in accuracies]
    assert catastrophic_overfitting(history, make_run()) is None


# --- Robust overfitting ---


def stretches(*values, epsilon=0.1):
    """For each (training accuracy, robust validation accuracy) an epoch of training and its evaluation."""
    history = []
    for epoch, (training, validation) in enumerate(values, start=1):
        step = {
            "loss": 1.0,
            "epsilon": epsilon,
            "adversarial_accuracy": training,
            "epoch": float(epoch),
            "step": epoch,
        }
        history += [step, evaluation(epoch, 0.9, validation)]
    return history


@pytest.mark.parametrize(
    ("values", "fires"),
    [
        ([(0.5, 0.5), (0.7, 0.4), (0.8, 0.4)], True),
        ([(0.5, 0.5), (0.7, 0.4)], False),  # one evaluation may be chance
        ([(0.5, 0.5), (0.7, 0.4), (0.8, 0.49)], False),
        ([(0.5, 0.5), (0.7, 0.46), (0.8, 0.46)], False),  # within two standard errors: 4.5 points
        ([(0.5, 0.5), (0.7, 0.45), (0.8, 0.45)], True),
        ([(0.9, 0.5), (0.7, 0.4), (0.8, 0.4)], False),  # training fell too: the run diverges
        ([(0.2, 0.5), (0.3, 0.4), (0.4, 0.4)], False),  # not learnt on training data either
    ],
)
def test_robust_accuracy_falls_on_validation_and_rises_on_training_data(values, fires):
    alarm = robust_overfitting(stretches(*values), make_run())
    assert (alarm is not None) == fires
    if fires:
        assert "`load_best_model_at_end=True`" in alarm.message


@pytest.mark.parametrize(
    ("num_examples", "fall", "fires"),
    [
        (10**6, 0.021, True),
        (10**6, 0.019, False),
        (100, 0.13, False),
        (100, 0.15, True),
        (None, 0.09, False),
        (None, 0.11, True),
    ],
)
def test_the_fall_must_exceed_the_noise_of_the_validation_set(num_examples, fall, fires):
    history = stretches((0.5, 0.5), (0.7, 0.5 - fall), (0.8, 0.5 - fall))
    assert (robust_overfitting(history, make_run(num_eval_examples=num_examples)) is not None) == fires


def test_only_training_at_the_same_epsilon_is_compared():
    ramp = stretches((0.6, 0.6), epsilon=0.05)
    plateau = stretches((0.7, 0.4), (0.8, 0.4))
    assert robust_overfitting([*ramp, *plateau], make_run()) is None
    assert robust_overfitting([*ramp, *plateau, *stretches((0.85, 0.3), (0.9, 0.3))], make_run())
    # Plain fine-tuning, epsilon 0: there, that robustness is lost is no overfitting.
    assert robust_overfitting(stretches((0.5, 0.5), (0.7, 0.2), (0.9, 0.1), epsilon=0.0), make_run()) is None


def test_evaluations_without_attack_or_after_training_do_not_count():
    clean = [
        {key: value for key, value in entry.items() if "robust" not in key} for entry in stretches(*[(0.5, 0.5)] * 4)
    ]
    assert robust_overfitting(clean, make_run()) is None
    history = [*stretches((0.5, 0.5), (0.7, 0.4)), {"train_runtime": 1.0}, evaluation(2, 0.9, 0.1)]
    assert robust_overfitting(history, make_run()) is None


# --- Gradient masking ---


@pytest.mark.parametrize(("share", "fires"), [(0.0, False), (0.05, False), (0.0625, True), (1.0, True)])
def test_share_of_zero_gradients(share, fires):
    assert (gradient_masking([a_probe(0.5, 0.5, zero=share)], make_run()) is not None) == fires


def test_the_last_probe_counts():
    assert gradient_masking([a_probe(0.5, 0.5, zero=1.0), a_probe(0.5, 0.5, zero=0.0)], make_run()) is None
    assert gradient_masking([], make_run()) is None


# --- All together ---


def test_alarms_are_asked_about_what_was_logged():
    failing = [*losses([CHANCE] * 20), a_probe(0.5, 0.5, zero=1.0)]
    assert [alarm.name for alarm in detect(failing, make_run(), failing[-1])] == ["gradient_masking"]
    assert [alarm.name for alarm in detect(failing, make_run(), failing[-2])] == ["transfer_failure"]
    assert detect(failing, make_run(), {"train_runtime": 1.0}) == []
    assert detect(failing, make_run(), alarm_entry("transfer_failure")) == []


class Trial:
    """A callback with a history of its own instead of a trainer."""

    def __init__(self, history=(), abort=False, probes=None):
        self.args = SimpleNamespace(abort_on_alarm=abort)
        self.state = TrainerState(max_steps=1000, num_train_epochs=50, log_history=list(history))
        self.errors, self.probes = [], probes or {}
        trainer = SimpleNamespace(
            args=SimpleNamespace(device="cpu", robust_loss_weight=None, label_smoothing_factor=0.0),
            model=SimpleNamespace(config=SimpleNamespace(num_labels=100)),
            robust_loss=LOSSES["at"],
            eval_dataset=None,
            epsilon_callback=None,
            state=self.state,
            control=SimpleNamespace(should_log=False),
            interruption=SimpleNamespace(request=self.errors.append),
            log=self.record,
        )
        self.callback = AlarmCallback(trainer)
        self.callback._probe = lambda: dict(self.probes)
        self.callback.on_train_begin(self.args, self.state, None)

    def record(self, metrics):
        self.state.log_history.append({**metrics, "step": self.state.global_step, "epoch": self.state.epoch})
        self.callback.on_log(self.args, self.state, None, logs=metrics)

    def log(self, entry):
        self.state.log_history.append(entry)
        self.callback.on_log(self.args, self.state, None, logs=entry)


def test_an_alarm_goes_off_once(caplog):
    trial = Trial()
    for entry in losses([CHANCE] * 15):
        trial.log(entry)
    assert list(recorded_alarms(trial.state.log_history)) == ["transfer_failure"]
    assert len([entry for entry in trial.state.log_history if "message" in entry]) == 1
    assert trial.errors == []
    resumed = Trial(trial.state.log_history, abort=True)
    resumed.log(losses([CHANCE] * 16)[-1])
    assert resumed.state.log_history == [*trial.state.log_history, losses([CHANCE] * 16)[-1]]
    assert resumed.errors == []


def test_abort_asks_to_interrupt():
    trial = Trial(abort=True)
    for entry in losses([CHANCE] * 10):
        trial.log(entry)
    [error] = trial.errors
    assert isinstance(error, AlarmRaised) and "Transfer failure" in str(error)


def test_onset_is_recorded_once():
    trial = Trial()
    for epoch, accuracy in enumerate([0.01, 0.06, 0.02, 0.08], start=1):
        trial.log(evaluation(epoch, accuracy))
    assert [entry["adaptation_onset"] for entry in trial.state.log_history if "adaptation_onset" in entry] == [2]
    resumed = Trial(trial.state.log_history)
    resumed.log(evaluation(5, 0.9))
    assert len([entry for entry in resumed.state.log_history if "adaptation_onset" in entry]) == 1


def test_silent_outside_training():
    trial = Trial()
    trial.callback.on_train_end(trial.args, trial.state, None)
    for entry in [*losses([CHANCE] * 20), evaluation(20, 0.9)]:
        trial.log(entry)
    assert len(trial.state.log_history) == 21


def test_probes_are_made_between_steps_and_at_the_end():
    trial = Trial(probes=a_probe(0.5, 0.5))
    probed = []
    for step in range(1001):
        trial.state.global_step = step
        before = len(trial.state.log_history)
        if step < 1000:
            trial.callback.on_step_begin(trial.args, trial.state, None)
        if step % 20 == 0:
            trial.callback.on_epoch_end(trial.args, trial.state, None)
        probed += [step] * (len(trial.state.log_history) - before)
    assert probed == list(range(20, 1001, 20))  # once an epoch
