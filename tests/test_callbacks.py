import copy
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerState

from hf_rft import EpsilonScheduleCallback, get_epsilon_schedule
from hf_rft.callbacks import DatasetEpochCallback


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


def test_multipliers_above_one_are_allowed():
    assert EpsilonScheduleCallback(lambda progress: 1.5).multiplier(make_state()) == 1.5


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
