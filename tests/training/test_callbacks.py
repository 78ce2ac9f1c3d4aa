import copy
import logging
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerState, TrainingArguments

from hf_rft import EpsilonScheduleCallback, get_epsilon_schedule
from hf_rft.training.callbacks import DatasetEpochCallback, DataWaitCallback, data_wait_message


def make_state(step=0, epoch=0.0, max_steps=100, epochs=10):
    return TrainerState(global_step=step, epoch=epoch, max_steps=max_steps, num_train_epochs=epochs)


def identity(progress):
    return progress


@given(st.integers(0, 100))
def test_progress_by_step(step):
    callback = EpsilonScheduleCallback(identity)
    assert callback.progress(make_state(step=step, epoch=step / 10)) == step / 100


@pytest.mark.parametrize(
    ("epoch", "expected"), [(None, 0.0), (0.0, 0.0), (0.9, 0.0), (1.0, 0.1), (1.5, 0.1), (9.9, 0.9), (10.0, 1.0)]
)
def test_progress_by_epoch_is_a_staircase(epoch, expected):
    assert EpsilonScheduleCallback(identity, "epoch").progress(make_state(step=5, epoch=epoch)) == expected


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_progress_stays_in_0_1(interval):
    callback = EpsilonScheduleCallback(identity, interval)
    assert callback.progress(make_state(step=120, epoch=12.0)) == 1.0
    assert callback.progress(TrainerState()) == 0.0


def test_staircase_of_the_paper():
    """12 epochs without perturbation, a ramp over 25, 13 at full epsilon."""
    callback = EpsilonScheduleCallback(get_epsilon_schedule("hinge", start=12 / 50, end=37 / 50), "epoch")
    for epoch in range(50):
        state = make_state(step=20 * epoch + 19, epoch=epoch + 0.95, max_steps=1000, epochs=50)
        expected = 0.0 if epoch < 12 else min((epoch - 12) / 25, 1.0)
        assert callback.multiplier(state) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_callback_has_no_state(interval):
    callback = EpsilonScheduleCallback(identity, interval)
    before = copy.deepcopy(vars(callback))
    state = make_state(step=42, epoch=4.2)
    untouched = copy.deepcopy(state)
    first = callback.multiplier(state)
    callback.multiplier(make_state(step=99, epoch=9.9))
    callback.on_train_begin(SimpleNamespace(), state, SimpleNamespace())
    assert callback.multiplier(state) == first == {"step": 0.42, "epoch": 0.4}[interval]
    assert vars(callback) == before and state == untouched


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
def test_schedule_must_return_a_finite_non_negative_number(value):
    callback = EpsilonScheduleCallback(lambda progress: value)
    with pytest.raises(ValueError, match=rf"`epsilon_schedule` returned {value!r} at progress 0.500; it must return"):
        callback.multiplier(make_state(step=50))


@pytest.mark.parametrize("value", [None, "0.5"])
def test_schedule_must_return_a_number(value):
    callback = EpsilonScheduleCallback(lambda progress: value)
    with pytest.raises(ValueError, match=rf"`epsilon_schedule` returned {value!r} at progress 0.500; it must return"):
        callback.multiplier(make_state(step=50))


def test_multipliers_above_one_are_refused_before_the_first_step_and_in_each():
    callback = EpsilonScheduleCallback(lambda progress: 2 * progress)
    assert callback.multiplier(make_state(step=50)) == 1.0
    message = "returned 1.5 at progress 0.750; it must return .* from 0 to 1. To train beyond `epsilon`, raise it."
    with pytest.raises(ValueError, match=message):
        callback.multiplier(make_state(step=75))
    with pytest.raises(ValueError, match=message):
        callback.on_train_begin(SimpleNamespace(), make_state(), SimpleNamespace())


def test_rounding_above_one_is_cut_off():
    assert EpsilonScheduleCallback(lambda progress: 1 + 1e-15).multiplier(make_state()) == 1.0


@pytest.mark.parametrize("schedule", [lambda: 1.0, lambda progress, step: 1.0, lambda *, progress: 1.0])
def test_a_schedule_that_does_not_take_progress_alone_is_refused(schedule):
    with pytest.raises(ValueError, match=r"is called as `epsilon_schedule\(progress\)`, with one positional argument"):
        EpsilonScheduleCallback(schedule)


def test_a_schedule_must_be_a_function():
    with pytest.raises(ValueError, match="`epsilon_schedule=0.5` is not a function; pass one from progress in"):
        EpsilonScheduleCallback(0.5)
    EpsilonScheduleCallback(max)  # written in C, without a signature: nobody can tell


# --- The length of training, and its last step ---


def states_of(total_steps, batches, accumulation):
    """The state after each step, as `Trainer` counts, and how many whole epochs lie behind."""
    steps_per_epoch = math.ceil(batches / accumulation)
    for step in range(total_steps + 1):
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        share = min(step_in_epoch * accumulation, batches) / batches
        yield epoch, make_state(step, epoch + share, total_steps, math.ceil(total_steps / steps_per_epoch))


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 40))
def test_staircase_counts_the_epochs_exactly_also_where_the_last_one_is_cut_short(total_steps, batches, accumulation):
    """Closed form: whole epochs completed, times the steps of one, over all steps."""
    callback = EpsilonScheduleCallback(identity, "epoch")
    steps_per_epoch = math.ceil(batches / accumulation)
    for epoch, state in states_of(total_steps, batches, accumulation):
        assert callback.progress(state) == pytest.approx(epoch * steps_per_epoch / total_steps, abs=1e-12)


def test_staircase_of_one_and_a_half_epochs_ends_as_high_as_it_says():
    """The second epoch begins at 2/3 of training, where this ramp ends, and not at 1/2."""
    callback = EpsilonScheduleCallback(get_epsilon_schedule("hinge", start=1 / 3, end=2 / 3), "epoch")
    multipliers = [callback.multiplier(state) for _, state in states_of(15, 10, 1)]
    assert multipliers == [0.0] * 10 + [1.0] * 6


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 40), st.sampled_from(["step", "epoch"]), st.data())
def test_any_step_of_a_run_is_foretold_from_any_state_of_it(total_steps, batches, accumulation, interval, data):
    callback = EpsilonScheduleCallback(identity, interval)
    states = [state for _, state in states_of(total_steps, batches, accumulation)]
    now, step = data.draw(st.sampled_from(states[1:])), data.draw(st.integers(0, total_steps - 1))
    assert callback.multiplier_of_step(now, step) == pytest.approx(callback.multiplier(states[step]), abs=1e-12)


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize(
    ("name", "kwargs", "grows", "final_from"),
    [
        ("constant", {}, False, 1),
        ("constant", {"multiplier": 0}, False, 1),
        ("hinge", {"start": 0.2, "end": 0.5}, True, 51),
        ("linear", {"end": 0.5}, True, 51),
        ("smoothed", {"start": 0.2, "end": 0.5}, True, 51),
        ("piecewise", {"points": [(0.2, 0.1), (0.5, 0.7)]}, True, 51),
    ],
)
def test_the_last_epsilon_of_training_is_recognised(interval, name, kwargs, grows, final_from):
    """After step 51 of 100 the step before was the first at progress 0.5."""
    callback = EpsilonScheduleCallback(get_epsilon_schedule(name, **kwargs), interval)
    states = [state for _, state in states_of(100, 10, 1)]
    assert all(callback.grows(state) == grows for state in states)
    assert [callback.is_final(state) for state in states[1:]] == [step >= final_from for step in range(1, 101)]


def test_where_epsilon_grows_to_the_end_only_the_last_step_is_final():
    callback = EpsilonScheduleCallback(lambda progress: progress**2)
    assert [callback.is_final(state) for _, state in states_of(5, 5, 1)][1:] == [False] * 4 + [True]


@pytest.mark.parametrize("interval", ["steps", "", None])
def test_unknown_interval(interval):
    with pytest.raises(ValueError, match=rf"`epsilon_schedule_interval={interval!r}` is unknown; choose 'step' or"):
        EpsilonScheduleCallback(identity, interval)


def test_dataset_is_told_the_epoch():
    epochs = []
    callback = DatasetEpochCallback()
    told = SimpleNamespace(dataset=SimpleNamespace(set_epoch=epochs.append))
    for epoch in (0.0, 1.0, 2.0):
        callback.on_epoch_begin(None, make_state(epoch=epoch), None, train_dataloader=told)
    assert epochs == [0, 1, 2]
    callback.on_epoch_begin(None, make_state(), None, train_dataloader=SimpleNamespace(dataset=[1, 2]))
    callback.on_epoch_begin(None, make_state(), None)
    assert epochs == [0, 1, 2]


@pytest.mark.parametrize(
    ("waited", "elapsed", "is_told"), [(7, 61, True), (5.9, 59.9, False), (6, 60, False), (0, 1e6, False)]
)
def test_waiting_for_data_is_told_after_a_minute_and_above_a_tenth(waited, elapsed, is_told):
    message = data_wait_message(waited, elapsed, num_workers=3)
    assert (message is not None) == is_told
    if message:
        assert message.startswith("11% of the training time") and "`dataloader_num_workers` (now 3)" in message


def test_waiting_for_data_is_told_once(monkeypatch, caplog):
    """Of this training, not of an earlier one, and by one process of a machine."""
    seconds = {"now": 0.0, "waited": 500.0}
    monkeypatch.setattr("hf_rft.training.callbacks.time.perf_counter", lambda: seconds["now"])
    monkeypatch.setattr(logging.getLogger("hf_rft"), "propagate", True)
    callback, others = (DataWaitCallback(lambda: seconds["waited"]) for _ in range(2))
    args, state = TrainingArguments(use_cpu=True), TrainerState(is_local_process_zero=True)
    of_another_process = TrainerState(is_local_process_zero=False)
    callback.on_train_begin(args, state, None)
    others.on_train_begin(args, of_another_process, None)
    for _ in range(10):
        seconds["now"] += 20
        seconds["waited"] += 5
        callback.on_step_end(args, state, None)
        others.on_step_end(args, of_another_process, None)
    assert [record.getMessage()[:3] for record in caplog.records] == ["25%"]
