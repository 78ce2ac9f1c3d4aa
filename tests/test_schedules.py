import doctest
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
        "adaptive": {"end": end},
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


def test_adaptive_is_a_ramp_that_spares_wrong_examples():
    schedule, ramp = get_epsilon_schedule("adaptive", end=0.4), get_epsilon_schedule("linear", end=0.4)
    assert all(schedule(share / 10) == ramp(share / 10) for share in range(11))
    assert EpsilonScheduleCallback(schedule).spares_wrong and not EpsilonScheduleCallback(ramp).spares_wrong
    with pytest.raises(ValueError, match="`end=2` is not a share of training"):
        get_epsilon_schedule("adaptive", end=2)
