import doctest
import math
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerState

from hf_rft import EpsilonScheduleCallback, EpsilonScheduleType, get_epsilon_schedule, schedules
from hf_rft.schedules import scaled_steps


NAMES = ["constant", "linear", "hinge", "cosine", "smoothed", "piecewise", "adaptive"]

shares = st.floats(0, 1)
hinges = st.tuples(shares, shares).map(sorted)


def build(name, start, end):
    kwargs = {
        "constant": {"multiplier": start},
        "linear": {"end": end},
        "piecewise": {"points": [(0.0, 0.0), (1.0, end)]},
        "adaptive": {"start": start, "end": end},
    }.get(name, {"start": start, "end": end})
    return get_epsilon_schedule(name, **kwargs)


def test_every_type_has_a_schedule():
    assert list(schedules.SCHEDULES) == [schedule_type.value for schedule_type in EpsilonScheduleType] == NAMES


@given(shares)
def test_constant(progress):
    assert get_epsilon_schedule("constant")(progress) == 1.0
    assert get_epsilon_schedule("constant", multiplier=0.25)(progress) == 0.25


def test_hinge_of_the_paper():
    """T1 = 12 and T2 = 37 of 50 epochs: 0, then (t - T1) / (T2 - T1), then 1."""
    schedule = get_epsilon_schedule("hinge", start=12 / 50, end=37 / 50)
    for epoch in range(51):
        expected = 0.0 if epoch < 12 else (epoch - 12) / 25 if epoch < 37 else 1.0
        assert schedule(epoch / 50) == pytest.approx(expected, abs=1e-12)


def test_hinge_defaults():
    schedule = get_epsilon_schedule("hinge")
    assert [schedule(p) for p in (0.0, 0.25, 0.375, 0.5, 0.75, 1.0)] == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]


@given(st.floats(0, 1), shares)
def test_linear_is_hinge_from_the_start(end, progress):
    linear, hinge = get_epsilon_schedule("linear", end=end), get_epsilon_schedule("hinge", start=0.0, end=end)
    assert linear(progress) == hinge(progress)


@given(shares)
def test_start_equal_to_end_is_a_jump(progress):
    schedule = get_epsilon_schedule("hinge", start=0.5, end=0.5)
    assert schedule(progress) == (1.0 if progress >= 0.5 else 0.0)
    assert get_epsilon_schedule("hinge", start=0.0, end=0.0)(progress) == 1.0


@given(shares)
def test_cosine(progress):
    u = min(max((progress - 0.2) / 0.6, 0.0), 1.0)
    schedule = get_epsilon_schedule("cosine", start=0.2, end=0.8)
    assert schedule(progress) == pytest.approx(math.sin(math.pi * u / 2) ** 2, abs=1e-9)


@given(st.floats(0.05, 0.95), st.floats(1, 6))
def test_smoothed_is_continuous_with_its_slope(middle, power):
    schedule = get_epsilon_schedule("smoothed", start=0.0, end=1.0, middle=middle, power=power)
    h = 1e-6
    left = (schedule(middle) - schedule(middle - h)) / h
    right = (schedule(middle + h) - schedule(middle)) / h
    assert schedule(middle - h) == pytest.approx(schedule(middle), abs=1e-3)
    assert left == pytest.approx(right, rel=1e-3, abs=1e-6)
    # a u^p below the middle, and a straight line from there to 1.
    assert schedule(middle / 2) == pytest.approx(schedule(middle) / 2**power, rel=1e-9)
    assert schedule((1 + middle) / 2) == pytest.approx((1 + schedule(middle)) / 2, rel=1e-9)
    assert schedule(1.0) == pytest.approx(1.0)


@given(shares)
def test_piecewise(progress):
    schedule = get_epsilon_schedule("piecewise", points=[(0.2, 0.5), (0.4, 0.0), (0.8, 1.0)])
    if progress <= 0.2:
        expected = 0.5
    elif progress <= 0.4:
        expected = 0.5 * (0.4 - progress) / 0.2
    else:
        expected = min((progress - 0.4) / 0.4, 1.0)
    assert schedule(progress) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
@given(hinge=hinges, progresses=st.lists(shares, min_size=2, max_size=10))
@settings(deadline=None, max_examples=50)
def test_values_lie_between_0_and_1_and_never_fall(name, hinge, progresses):
    schedule = build(name, *hinge)
    values = [schedule(progress) for progress in sorted(progresses)]
    assert all(isinstance(value, float) and -1e-12 <= value <= 1 + 1e-12 for value in values)
    assert all(b >= a - 1e-12 for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "constant"])
def test_all_ramps_end_at_full_epsilon(name):
    assert build(name, 0.25, 1.0)(1.0) == pytest.approx(1.0)


def test_schedule_and_callback_are_shown_with_their_arguments():
    schedule = get_epsilon_schedule(EpsilonScheduleType.HINGE, start=0.5)
    assert repr(schedule).startswith("<function hinge(start=0.5, end=0.75) at ")
    shown = repr(EpsilonScheduleCallback(schedule, "epoch"))
    assert shown == "EpsilonScheduleCallback(hinge(start=0.5, end=0.75), interval='epoch')"


def test_name_may_be_the_enum():
    assert get_epsilon_schedule(EpsilonScheduleType.HINGE, start=0.0, end=1.0)(0.5) == 0.5


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match=rf"`epsilon_schedule_type='hinges'` is unknown.*{re.escape(str(NAMES))}"):
        get_epsilon_schedule("hinges")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("hinge", {"begin": 0.1}, r"'hinge' epsilon schedule takes \['start', 'end'\], got \['begin'\]"),
        ("linear", {"start": 0.1}, r"'linear' epsilon schedule takes \['end'\], got \['start'\]"),
        ("piecewise", {}, r"'piecewise' epsilon schedule takes \['points'\], got \[\].*missing"),
        ("hinge", {"start": 0.6, "end": 0.5}, "`start=0.6` is after `end=0.5`"),
        ("cosine", {"start": 0.6, "end": 0.5}, "`start=0.6` is after `end=0.5`"),
        ("smoothed", {"start": 0.6, "end": 0.5}, "`start=0.6` is after `end=0.5`"),
        ("hinge", {"start": -0.1}, r"`start=-0.1` is not a share of training; give a number in \[0, 1\]"),
        ("hinge", {"end": 37}, "`end=37` is not a share of training"),
        ("linear", {"end": 1.5}, "`end=1.5` is not a share of training"),
        ("hinge", {"start": math.nan}, "`start=nan` is not a share of training"),
        ("hinge", {"start": "a quarter"}, "`start=.*a quarter.* is not a share of training"),
        ("constant", {"multiplier": 1.5}, r"`multiplier=1.5` is outside \[0, 1\]"),
        ("constant", {"multiplier": math.nan}, "`multiplier=nan` is outside"),
        ("smoothed", {"middle": 0.0}, "`middle=0.0` must lie strictly between 0 and 1"),
        ("smoothed", {"middle": 1.0}, "`middle=1.0` must lie strictly between 0 and 1"),
        ("smoothed", {"power": 0.5}, "`power=0.5` must be at least 1"),
        ("smoothed", {"power": math.nan}, "`power=nan`"),
        ("piecewise", {"points": []}, "`points=.*` must be a non-empty list"),
        ("piecewise", {"points": [(0.0, 1.0, 2.0)]}, "`points=.*` must be a non-empty list of .* pairs"),
        ("piecewise", {"points": [0.0, 1.0]}, "`points=.*` must be a non-empty list of .* pairs"),
        ("piecewise", {"points": [(0.5, 0.0), (0.5, 1.0)]}, "`points=.*progress must increase strictly"),
        ("piecewise", {"points": [(0.0, 0.0), (1.1, 1.0)]}, r"`points=.*progress must .*stay in \[0, 1\]"),
        ("piecewise", {"points": [(0.0, 0.0), (1.0, 1.5)]}, r"`points=.*multipliers must lie in \[0, 1\]"),
        ("piecewise", {"points": [(0.0, -0.1)]}, r"`points=.*multipliers must lie in \[0, 1\]"),
        ("piecewise", {"points": [(0.0, math.nan), (1.0, 1.0)]}, "`points=.*multipliers must lie"),
    ],
)
def test_bad_arguments(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        get_epsilon_schedule(name, **kwargs)


@pytest.mark.parametrize("steps", [1, 3, 7, 10])
def test_scaled_steps_round_up_and_whole_shares_are_exact(steps):
    assert [scaled_steps(steps, k / steps) for k in range(1, steps + 1)] == list(range(1, steps + 1))
    assert [scaled_steps(steps, (k + 0.01) / steps) for k in range(steps)] == list(range(1, steps + 1))


def test_scaled_steps_stay_between_one_and_all():
    assert [scaled_steps(7, multiplier) for multiplier in (0.0, 1e-12, 1.0, 1.5)] == [1, 1, 7, 7]


def test_docstring_example():
    results = doctest.testmod(schedules)
    assert results.attempted > 0 and results.failed == 0


# --- Adaptive: scripted accuracies, one log every 5 % of training ---


def ramp_of(accuracy, **kwargs):
    """The multiplier after each log, where the accuracy is a function of progress and of the multiplier so far."""
    schedule, logged, multipliers = get_epsilon_schedule("adaptive", **kwargs), [], []
    for place in range(1, 21):
        progress = place / 20
        logged.append((progress, accuracy(progress, multipliers[-1] if multipliers else 0.0)))
        multipliers.append(schedule(progress, logged))
    return multipliers


def test_an_easy_task_is_ramped_at_full_speed():
    multipliers = ramp_of(lambda progress, multiplier: 0.9)
    assert multipliers[:7] == pytest.approx([place / 7 for place in range(1, 8)])
    assert set(multipliers[7:]) == {1.0}


def test_a_task_that_is_never_learned_gets_the_late_ramp():
    late = get_epsilon_schedule("hinge", start=0.5, end=0.9)
    assert ramp_of(lambda *_: 0.05) == [late(place / 20) for place in range(1, 21)]
    assert get_epsilon_schedule("adaptive")(0.7) == late(0.7), "nor is anything known without a log"


def test_a_hard_task_waits_until_it_is_learned():
    multipliers = ramp_of(lambda progress, multiplier: 0.02 if progress <= 0.3 else 0.275)
    assert multipliers[:6] == [0] * 6
    assert multipliers[6] == pytest.approx(0.05 / 0.35 / 2), "half-way from 5 to 50 %: half the speed"
    assert multipliers[-1] == 1 and multipliers == sorted(multipliers)


def test_the_ramp_slows_down_where_the_attack_wins():
    multipliers = ramp_of(lambda progress, multiplier: 0.6 * (1 - multiplier))
    steps = [after - before for before, after in zip([0.0, *multipliers], multipliers, strict=False)]
    paced = steps[: next(place for place, value in enumerate(multipliers) if place >= 10)]
    assert all(after <= before + 1e-12 for before, after in zip(paced, paced[1:], strict=False))


@given(st.lists(shares, max_size=30), shares)
def test_adaptive_stays_between_the_late_ramp_and_one_and_never_falls(accuracies, progress):
    schedule, late = get_epsilon_schedule("adaptive"), get_epsilon_schedule("hinge", start=0.5, end=0.9)
    logged = [((place + 1) * progress / 31, accuracy) for place, accuracy in enumerate(accuracies)]
    values = [schedule(progress, logged[:count]) for count in range(len(logged) + 1)]
    assert values == sorted(values) and late(progress) <= values[0] and values[-1] <= 1


def test_the_callback_gives_it_what_was_logged_up_to_the_step():
    state = TrainerState(global_step=30, max_steps=100, num_train_epochs=1, epoch=0.3, logging_steps=10)
    state.log_history = [
        {"step": 10, "loss": 1.0, "adversarial_accuracy": 0.5},
        {"step": 15, "eval_accuracy": 0.9},
        {"step": 20, "adversarial_accuracy": 0.05},
        {"step": 40, "adversarial_accuracy": 0.9},
    ]
    callback = EpsilonScheduleCallback(get_epsilon_schedule("adaptive"))
    assert callback.multiplier(state) == pytest.approx(0.1 / 0.35)
    assert [callback.multiplier_of_step(state, step) for step in (0, 9, 10)] == pytest.approx([0, 0, 0.1 / 0.35])
    assert callback.grows(state)
    state.global_step = 95
    assert callback.is_final(state)


@pytest.mark.parametrize(
    ("strategy", "logging_steps", "is_enough"),
    [("steps", 10, True), ("steps", 11, False), ("epoch", 10, False), ("no", 10, False)],
)
def test_too_few_logs_to_follow_are_refused(strategy, logging_steps, is_enough):
    callback = EpsilonScheduleCallback(get_epsilon_schedule("adaptive"))
    state = TrainerState(max_steps=100, num_train_epochs=1, logging_steps=logging_steps)
    args = SimpleNamespace(logging_strategy=strategy, best_model_at_any_epsilon=False)
    with (
        nullcontext() if is_enough else pytest.raises(ValueError, match="at least 10 logs: set `logging_steps` to 10")
    ):
        callback.on_train_begin(args, state, None)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"duration": 0}, "`duration=0` must be above 0"),
        ({"low": 0.5, "high": 0.5}, "`low=0.5` below `high=0.5`"),
        ({"high": 50}, r"`high=50` is outside \[0, 1\]"),
        ({"end": 2}, "`end=2` is not a share of training"),
    ],
)
def test_bad_arguments_of_adaptive(kwargs, message):
    with pytest.raises(ValueError, match=message):
        get_epsilon_schedule("adaptive", **kwargs)
