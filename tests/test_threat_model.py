import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import kstest

from hf_rft.threat_model import (
    NORM_NAMES,
    NORMS,
    ThreatModel,
    format_approximately,
    format_epsilon,
    parse_epsilon,
    parse_epsilons,
)
from hf_rft.utils.noise import example_generators


ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}

shapes = st.tuples(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 6), st.integers(1, 6))
seeds = st.integers(0, 2**31)


def random_images(shape, seed, dtype=torch.float32):
    """Pixels in [0, 1], about a third of them on the border of the box."""
    generator = torch.Generator().manual_seed(seed)
    return (1.5 * torch.rand(shape, generator=generator, dtype=torch.float64) - 0.25).clamp(0, 1).to(dtype)


def random_radii(count, seed, largest=2.0):
    generator = torch.Generator().manual_seed(seed + 1)
    return largest * torch.rand(count, generator=generator, dtype=torch.float64)


def norms_of(delta, norm):
    return np.linalg.norm(delta.double().flatten(1).numpy(), ord=ORDERS[norm], axis=1)


def assert_inside(adversarial, pixels, norm, radii):
    assert adversarial.shape == pixels.shape and adversarial.dtype == pixels.dtype
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    # Pixels are rounded to multiples of about 6e-8, so a difference of two is exact to that only.
    rounding = 1e-7 * pixels[0].numel() ** (0 if norm == "linf" else 1 / ORDERS[norm])
    assert (norms_of(adversarial - pixels, norm) <= (1 + 1e-5) * np.asarray(radii) + rounding).all()


# --- Epsilon ---


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("8/255", Fraction(8, 255)),
        (" 8 / 255 ", Fraction(8, 255)),
        ("0.5/255", Fraction(1, 510)),
        ("0.03", Fraction(3, 100)),
        (".5", Fraction(1, 2)),
        ("1e-3", Fraction(1, 1000)),
        ("0", Fraction(0)),
        (0.1, Fraction(1, 10)),
        (2, Fraction(2)),
        (np.float64(0.3), Fraction(3, 10)),
        (8 / 255, Fraction(8, 255)),
        (0.5 / 255, Fraction(1, 510)),
        (0.1234567, Fraction(1234567, 10**7)),
        (np.float64(1 / 3), Fraction(85, 255)),
        (Fraction(1, 3), Fraction(1, 3)),
    ],
)
def test_parse_epsilon_is_exact(written, expected):
    assert parse_epsilon(written) == expected


def test_a_grid_is_read_exactly():
    grid = parse_epsilons("l2", (epsilon for epsilon in ("0", 0.1, Fraction(1, 3), "2")))
    assert grid == [0, Fraction(1, 10), Fraction(1, 3), 2] and all(isinstance(one, Fraction) for one in grid)


@pytest.mark.parametrize(
    ("norm", "epsilons", "message"),
    [
        ("linf", "0", r"`grid='0'` must be a list, for example \['0', '2/255', '4/255'\]"),
        ("linf", 0.1, "`grid=0.1` must be a list"),
        ("linf", [], r"`grid=\[\]` must start with 0 and increase strictly, with at least two values, for example"),
        ("linf", [0], r"`grid=\['0'\]` must start with 0 and increase strictly, with at least two values"),
        ("linf", ["1/255", "2/255"], "must start with 0"),
        ("linf", [0, 0.2, 0.2], "increase strictly"),
        ("linf", [0, 0.2, 0.1], "increase strictly"),
        ("linf", [0, "much"], "`grid` holds a wrong value: `epsilon='much'` is not a number"),
        ("linf", [0, 2, 8], "`grid` holds a wrong value: `epsilon=2` is above 1, but .* did you mean '2/255'"),
        ("l7", [0, 1], r"^`norm='l7'` is unknown; choose one of \['linf', 'l2', 'l1'\]"),
    ],
)
def test_what_is_no_grid_is_refused_under_its_name(norm, epsilons, message):
    with pytest.raises(ValueError, match=message):
        parse_epsilons(norm, epsilons, argument="grid")


@given(st.integers(0, 255))
def test_format_epsilon_round_trip_of_byte_levels(level):
    epsilon = Fraction(level, 255)
    assert parse_epsilon(format_epsilon(epsilon)) == epsilon
    assert format_epsilon(epsilon) == {0: "0", 51: "0.2", 102: "0.4", 153: "0.6", 204: "0.8", 255: "1"}.get(
        level, f"{level}/255"
    )


@given(st.decimals(0, 1000, places=6) | st.fractions(0, 1000))
def test_format_epsilon_round_trip(value):
    assert parse_epsilon(format_epsilon(Fraction(value))) == Fraction(value)


@pytest.mark.parametrize("value", ["abc", "", "nan", "inf", float("nan"), float("inf"), None, True, "1/2/3", "8\\255"])
def test_parse_epsilon_refuses_what_is_no_number(value):
    with pytest.raises(ValueError, match=rf"`epsilon={re.escape(repr(value))}` is not a number; write a fraction"):
        parse_epsilon(value)


@pytest.mark.parametrize("value", ["-1/255", "1/-255", -0.1])
def test_parse_epsilon_refuses_negative_numbers(value):
    with pytest.raises(ValueError, match=rf"`epsilon={re.escape(repr(value))}` is negative"):
        parse_epsilon(value)


def test_parse_epsilon_refuses_division_by_zero():
    with pytest.raises(ValueError, match="`epsilon='8/0'` divides by zero"):
        parse_epsilon("8/0")


# --- ThreatModel ---


def test_shown_in_a_line():
    assert repr(ThreatModel("linf", 8 / 255)) == "ThreatModel('linf', '8/255')"
    assert repr(ThreatModel("l2", torch.ones(3))) == "ThreatModel('l2', 'one per example')"


@pytest.mark.parametrize("epsilon", ["8", 8, 8.0, Fraction(8)])
def test_linf_epsilon_above_one_suggests_a_fraction_of_255(epsilon):
    with pytest.raises(ValueError, match=r"`epsilon='?.*8.*` is above 1, but pixels lie in \[0, 1\]") as error:
        ThreatModel("linf", epsilon)
    assert parse_epsilon(re.search("did you mean '(.*)'", str(error.value))[1]) == Fraction(8, 255)


def test_linf_epsilon_above_one_makes_no_senseless_suggestion():
    with pytest.raises(ValueError, match="`epsilon='300/255'` is above 1") as error:
        ThreatModel("linf", "300/255")
    assert "/255/255" not in str(error.value)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_other_norms_allow_epsilon_above_one(norm):
    assert ThreatModel(norm, "12").epsilon == 12


@pytest.mark.parametrize("norm", ["l3", "Linf", "", None])
def test_unknown_norm(norm):
    with pytest.raises(ValueError, match=rf"`norm={norm!r}` is unknown; choose one of \['linf', 'l2', 'l1'\]"):
        ThreatModel(norm, "1/255")


@pytest.mark.parametrize("norm", NORMS)
def test_epsilon_of_every_example(norm):
    with pytest.raises(ValueError, match=r"one value per example; got shape \(2, 1\)"):
        ThreatModel(norm, torch.zeros(2, 1))
    with pytest.raises(ValueError, match="`epsilon` holds 3 values for a batch of 2 images"):
        ThreatModel(norm, torch.zeros(3)).radius(torch.zeros(2, 1, 4, 4))
    radius = ThreatModel(norm, torch.tensor([0.1, 0.2])).radius(torch.zeros(2, 1, 4, 4, dtype=torch.float64))
    assert radius.shape == (2, 1, 1, 1) and radius.dtype == torch.float64


def test_is_trivial():
    assert ThreatModel("l2", 0).is_trivial and ThreatModel("l2", "0/255").is_trivial
    assert not ThreatModel("l2", "1e-9").is_trivial
    assert not ThreatModel("l2", torch.zeros(2)).is_trivial


@pytest.mark.parametrize("norm", NORMS)
def test_distance(norm):
    pixels = torch.zeros(2, 1, 2, 2)
    adversarial = torch.tensor([[0.3, 0.0, 0.4, 0.0], [1.0, 1.0, 1.0, 1.0]]).reshape(2, 1, 2, 2)
    expected = {"linf": [0.4, 1.0], "l2": [0.5, 2.0], "l1": [0.7, 4.0]}[norm]
    torch.testing.assert_close(ThreatModel(norm, 1).distance(adversarial, pixels), torch.tensor(expected))


# --- Random start ---


@given(st.sampled_from(NORMS), shapes, seeds, st.sampled_from([torch.float32, torch.float64]))
@settings(deadline=None, max_examples=40)
def test_random_start_stays_in_ball_and_box(norm, shape, seed, dtype):
    pixels, radii = random_images(shape, seed, dtype), random_radii(shape[0], seed)
    radii[0] = 0
    start = ThreatModel(norm, radii).random_start(pixels, torch.Generator().manual_seed(seed))
    assert_inside(start, pixels, norm, radii)
    torch.testing.assert_close(start[0], pixels[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("source", ["none", "one", "per example"])
def test_random_start_is_uniform_in_the_ball(norm, source):
    count, dimension, epsilon = 2000, 6, 0.01
    pixels = torch.full((count, 1, 2, 3), 0.5, dtype=torch.float64)
    generator = {
        "none": None,
        "one": torch.Generator().manual_seed(0),
        "per example": example_generators("cpu", range(count), 0),
    }[source]
    threat_model = ThreatModel(norm, epsilon)
    start = threat_model.random_start(pixels, generator)
    # The ball of radius r holds the share (r / epsilon)^d of the volume.
    volumes = (threat_model.distance(start, pixels) / epsilon) ** dimension
    assert kstest(volumes.numpy(), "uniform").pvalue > 1e-3
    # Uniform means symmetric: the sign of a coordinate says nothing about its size.
    delta = (start - pixels).flatten()
    assert abs((delta > 0).double().mean() - 0.5) < 0.03
    assert kstest(delta[delta > 0].numpy(), -delta[delta < 0].numpy()).pvalue > 1e-3


# --- Step ---


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("norm", NORMS)
def test_step_has_the_asked_length_at_any_scale_of_the_gradient(norm, scale):
    gradient = scale * torch.randn((4, 3, 5, 7), generator=torch.Generator().manual_seed(0))
    gradient[1] = 0
    length = torch.tensor([0.1, 0.2, 0.3, 0.4]).reshape(-1, 1, 1, 1)
    step = ThreatModel(norm, 1).step(gradient, length)
    np.testing.assert_allclose(norms_of(step, norm), [0.1, 0, 0.3, 0.4], rtol=1e-5)
    assert (step[1] == 0).all()


@given(st.sampled_from(NORMS), shapes, seeds)
@settings(deadline=None, max_examples=30)
def test_step_is_steepest(norm, shape, seed):
    """It gains as much as the dual norm of the gradient allows."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    step = ThreatModel(norm, 1).step(gradient, torch.tensor(0.5), sparsity=0.0)
    dual = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
    gain = (step * gradient).double().flatten(1).sum(dim=1)
    expected = 0.5 * np.linalg.norm(gradient.double().flatten(1).numpy(), ord=dual, axis=1)
    np.testing.assert_allclose(gain, expected, rtol=1e-5)


def test_l1_step_moves_the_largest_coordinates_only():
    gradient = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.0], [5.0, 1.0, 2.0, -3.0, 4.0]]).reshape(2, 1, 1, 5)
    step = ThreatModel("l1", 1).step(gradient, torch.tensor(1.0), sparsity=torch.tensor([0.4, 0.8]))
    expected = [[0, -0.5, 0.5, 0, 0], [0.25, 0, 0.25, -0.25, 0.25]]
    torch.testing.assert_close(step.flatten(1), torch.tensor(expected))


# --- Projection ---


def nearest(target, pixels, radius, norm):
    """The nearest point of ball and box in float64, by bisection on the dual variable of the ball's constraint."""

    def candidate(dual):
        delta = target - pixels
        if norm == "l2":
            delta = delta / (1 + dual)
        elif norm == "l1":
            delta = np.sign(delta) * np.maximum(np.abs(delta) - dual, 0)
        else:
            delta = np.clip(delta, -radius, radius)
        return np.clip(pixels + delta, 0, 1)

    def size(dual):
        return np.linalg.norm((candidate(dual) - pixels).ravel(), ord=ORDERS[norm])

    if size(0.0) <= radius:
        return candidate(0.0)
    low, high = 0.0, 1.0
    while size(high) > radius and high < 1e12:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) > radius else (low, middle)
    return candidate(high)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("seed", range(3))
def test_oracle_agrees_with_scipy(norm, seed):
    rng = np.random.default_rng(seed)
    pixels, target, radius = rng.uniform(0, 1, 5), rng.uniform(-2, 3, 5), 0.8

    def point(parts):  # smooth in the steps up and down, unlike the L1 norm
        return pixels + parts[:5] - parts[5:]

    def slack(parts):
        return radius - parts.sum() if norm == "l1" else radius**2 - ((point(parts) - pixels) ** 2).sum()

    result = minimize(
        lambda parts: ((point(parts) - target) ** 2).sum(),
        np.zeros(10),
        bounds=[(0, room) for room in (*(1 - pixels), *pixels)],
        constraints=[{"type": "ineq", "fun": slack}],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    np.testing.assert_allclose(nearest(target, pixels, radius, norm), point(result.x), atol=1e-4)


@given(
    st.sampled_from(NORMS),
    shapes,
    seeds,
    st.sampled_from([0.01, 0.3, 3.0, 1000.0]),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None, max_examples=120)
def test_project_is_exact(norm, shape, seed, scale, dtype):
    pixels, radii = random_images(shape, seed, dtype), random_radii(shape[0], seed)
    radii[-1] *= 0.01
    target = pixels + scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    projected = ThreatModel(norm, radii).project(target, pixels)
    assert_inside(projected, pixels, norm, radii)
    tolerance = (1e-6 if dtype == torch.float32 else 1e-11) * max(scale, 1)
    for one, target_one, pixels_one, radius in zip(projected, target, pixels, radii, strict=True):
        expected = nearest(target_one.double().numpy(), pixels_one.double().numpy(), radius.item(), norm)
        np.testing.assert_allclose(one.double().numpy(), expected, atol=tolerance)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_project_spends_what_the_box_leaves(norm):
    """Two coordinates, one with no room: the other gets the whole radius."""
    pixels = torch.tensor([1.0, 0.5]).reshape(1, 1, 1, 2)
    target = torch.tensor([2.0, 1.5]).reshape(1, 1, 1, 2)
    projected = ThreatModel(norm, 0.25).project(target, pixels)
    torch.testing.assert_close(projected.flatten(), torch.tensor([1.0, 0.75]))


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_project_where_the_ball_just_touches_the_corner_of_the_box(norm):
    """The clamped target is in the ball or beyond it by rounding only, so it is the nearest point either way."""
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        pixels = random_images((1, 1, 1, 2 + seed % 40), seed)
        target = torch.where(torch.rand(pixels.shape, generator=generator) < 0.5, -2.0, 1.1)
        corner = target.clamp(0, 1)
        radius = ThreatModel(norm, 1).distance(corner, pixels)
        for near in (radius, torch.nextafter(radius, torch.zeros(1)), radius * (1 - 2e-7)):
            projected = ThreatModel(norm, near).project(target, pixels)
            torch.testing.assert_close(projected, corner, rtol=0, atol=1e-4, msg=f"seed {seed}")


@given(st.sampled_from(NORMS), shapes, seeds)
@settings(deadline=None, max_examples=40)
def test_project_leaves_inside_points_alone_and_is_idempotent(norm, shape, seed):
    pixels, radii = random_images(shape, seed), random_radii(shape[0], seed)
    threat_model = ThreatModel(norm, radii)
    inside = (pixels + 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)
    size = threat_model.distance(inside, pixels)
    inside = pixels + (inside - pixels) * (0.99 * radii / size.clamp_min(1e-9)).clamp_max(1).to(pixels).reshape(
        -1, 1, 1, 1
    )
    torch.testing.assert_close(threat_model.project(inside, pixels), inside, rtol=0, atol=1e-7)
    once = threat_model.project(pixels + torch.randn(shape), pixels)
    torch.testing.assert_close(threat_model.project(once, pixels), once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_project_of_one_example_does_not_depend_on_the_others(norm):
    pixels, radii = random_images((6, 3, 5, 4), 0), random_radii(6, 0)
    target = pixels + torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    together = ThreatModel(norm, radii).project(target, pixels)
    for i in range(6):
        alone = ThreatModel(norm, radii[i : i + 1]).project(target[i : i + 1], pixels[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("epsilon", "target", "written"),
    [(0.0, "8/255", "0"), (8 / 255 / 3, "8/255", "2.67/255"), (8 / 255, "8/255", "8/255"), (1 / 3, "0.5", "0.333")],
)
def test_an_epsilon_on_the_way_is_written_in_the_unit_of_its_target(epsilon, target, written):
    assert format_approximately(epsilon, parse_epsilon(target)) == written


# --- The table ---


@pytest.mark.parametrize("norm", NORMS)
def test_dual_norm_is_the_rise_of_a_linear_loss_along_the_steepest_step(norm):
    gradient = torch.randn((3, 3, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    threat_model = ThreatModel(norm, 1)
    step = threat_model.step(gradient, torch.ones(()), sparsity=0.0)  # in L1 the one largest coordinate
    torch.testing.assert_close(threat_model.dual_norm(gradient), (gradient * step).flatten(1).sum(dim=1))


def test_every_norm_has_a_name_of_its_own_for_people():
    assert tuple(NORM_NAMES) == NORMS and len(set(NORM_NAMES.values())) == len(NORMS)
    assert NORM_NAMES["linf"] == "L∞"
