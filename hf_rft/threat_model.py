"""What an attacker may do: a norm, a radius, and the three moves that attacks are built from.

Images have shape `(batch, channels, height, width)` and pixels in [0, 1]; distances use the same units.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch

from .utils.noise import Generators, default_generator, rand, randn


# A dense L1 step would spend the budget on coordinates that hardly matter; PGD moves this share of them at a time.
L1_SPARSITY = 0.05

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_EPSILON = re.compile(rf"\s*({_NUMBER})\s*(?:/\s*({_NUMBER})\s*)?")


def parse_epsilon(value: str | int | float | Fraction) -> Fraction:
    """Read a perturbation strength exactly.

    Args:
        value (`str`, `int`, `float` or `Fraction`):
            `"8/255"`, `"0.03"`, `"0.5/255"` or a number: a float is n/255 if that rounds to it, else what it prints.

    Returns:
        `Fraction`: the same number, exactly.

    Raises:
        ValueError: if `value` is not a finite number, or is negative.
    """
    match = _EPSILON.fullmatch(str(value))
    if isinstance(value, bool) or match is None:
        raise ValueError(f"`epsilon={value!r}` is not a number; write a fraction such as '8/255' or a decimal '0.03'.")
    numerator, denominator = Fraction(match[1]), Fraction(match[2] or 1)
    if denominator == 0:
        raise ValueError(f"`epsilon={value!r}` divides by zero; write a fraction such as '8/255'.")
    epsilon = numerator / denominator
    if epsilon < 0:
        raise ValueError(f"`epsilon={value!r}` is negative; a perturbation strength is 0 or more.")
    levels = round(255 * epsilon, 6) / 255
    return levels if isinstance(value, float) and float(levels) == value else epsilon


def parse_epsilons(norm: str, epsilons: Iterable[Any], *, argument: str = "epsilons") -> list[Fraction]:
    """Read a grid of perturbation strengths exactly.

    Args:
        norm (`str`):
            A name in `NORMS`.
        epsilons (`Iterable` of `str`, number or `Fraction`):
            Strictly increasing, starting at 0, with at least two values.
        argument (`str`, *optional*, defaults to `"epsilons"`):
            Name of the grid in messages.

    Raises:
        ValueError: if it is not such a grid, the norm is unknown, or an L-inf epsilon is above 1.
    """
    example = "['0', '2/255', '4/255']"
    if isinstance(epsilons, str) or not isinstance(epsilons, Iterable):
        raise ValueError(f"`{argument}={epsilons!r}` must be a list, for example {example}.")
    epsilons = list(epsilons)
    ThreatModel(norm, 0)  # refuses an unknown norm
    try:
        grid = [ThreatModel(norm, epsilon).epsilon for epsilon in epsilons]
    except ValueError as error:
        raise ValueError(f"`{argument}` holds a wrong value: {error}") from error
    if len(grid) < 2 or grid[0] != 0 or grid != sorted(set(grid)):
        raise ValueError(
            f"`{argument}={[str(epsilon) for epsilon in epsilons]}` must start with 0 and increase strictly, with "
            f"at least two values, for example {example}."
        )
    return grid


def _decimal(value: Fraction) -> str | None:
    """`value` as an exact decimal with at most six places, or None."""
    for digits in range(7):
        if (value * 10**digits).denominator == 1:
            return f"{float(value):.{digits}f}"
    return None


def format_epsilon(epsilon: Fraction) -> str:
    """Write epsilon in the usual notation, `3/255` or `0.5`; `parse_epsilon` reads back the same number."""
    if (decimal := _decimal(epsilon)) is not None:
        return decimal
    if (levels := _decimal(epsilon * 255)) is not None:
        return f"{levels}/255"
    return str(epsilon)


def format_approximately(epsilon: float, target: Fraction) -> str:
    """Write an epsilon on the way to `target` to three digits, in the target's notation: `1.33/255`, `0.25`."""
    if math.isclose(epsilon, target, rel_tol=1e-6):
        return format_epsilon(target)
    unit = 255 if "/255" in format_epsilon(target) else 1
    return format_epsilon(Fraction(f"{epsilon * unit:.3g}") / unit)


@dataclass(eq=False)
class ThreatModel:
    """All images within `epsilon` of the original in `norm` that lie in the box [0, 1].

    Args:
        norm (`str`):
            A name in `NORMS`.
        epsilon (`str`, number, `Fraction`, or `torch.Tensor` of shape `(batch,)`):
            Radius of the ball, for pixels scaled to [0, 1]. Stored as an exact `Fraction`; a tensor gives every
            example its own radius, and its values are not checked.

    Raises:
        ValueError: for an unknown norm, or an epsilon that is not a number, is negative, or is above 1 for `"linf"`.
    """

    norm: str
    epsilon: Any  # becomes a `Fraction`, or stays a tensor

    def __post_init__(self):
        if self.norm not in NORMS:
            raise ValueError(f"`norm={self.norm!r}` is unknown; choose one of {list(NORMS)}.")
        if isinstance(self.epsilon, torch.Tensor):
            if self.epsilon.dim() != 1:
                shape = tuple(self.epsilon.shape)
                raise ValueError(f"An `epsilon` tensor holds one value per example; got shape {shape}.")
            return
        written, self.epsilon = self.epsilon, parse_epsilon(self.epsilon)
        if self.norm == "linf" and self.epsilon > 1:
            is_level = self.epsilon in range(256)
            remedy = f"did you mean '{written}/255'?" if is_level else "write it as a fraction x/255."
            raise ValueError(f"`epsilon={written!r}` is above 1, but pixels lie in [0, 1]; {remedy}")

    def __repr__(self) -> str:
        epsilon = "one per example" if isinstance(self.epsilon, torch.Tensor) else format_epsilon(self.epsilon)
        return f"ThreatModel({self.norm!r}, {epsilon!r})"

    @property
    def is_trivial(self) -> bool:
        """Whether the ball is known to hold only the original image; False for a tensor, whose values are not read."""
        return not isinstance(self.epsilon, torch.Tensor) and self.epsilon == 0

    def radius(self, pixels: torch.Tensor) -> torch.Tensor:
        """Epsilon as a tensor of shape `(batch, 1, 1, 1)` on the device and in the dtype of `pixels`."""
        if not isinstance(self.epsilon, torch.Tensor):
            return pixels.new_full((len(pixels), 1, 1, 1), float(self.epsilon))
        if len(self.epsilon) != len(pixels):
            raise ValueError(f"`epsilon` holds {len(self.epsilon)} values for a batch of {len(pixels)} images.")
        return self.epsilon.to(pixels).reshape(-1, 1, 1, 1)

    def select(self, indices: torch.Tensor) -> "ThreatModel":
        """The threat model of the selected examples."""
        return ThreatModel(self.norm, self.epsilon[indices]) if isinstance(self.epsilon, torch.Tensor) else self

    def distance(self, adversarial: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Size of each perturbation in the norm, shape `(batch,)`."""
        return _norm(adversarial - pixels, self.norm).flatten()

    def dual_norm(self, gradient: torch.Tensor) -> torch.Tensor:
        """The steepest rise per unit of distance of a linear loss with this gradient, shape `(batch,)`."""
        return torch.linalg.vector_norm(gradient.flatten(1), ord=_NORMS[self.norm].dual_order, dim=1)

    def random_start(self, pixels: torch.Tensor, generator: Generators = None) -> torch.Tensor:
        """A uniform point of the ball, projected onto ball and box."""
        generator = default_generator(pixels.device) if generator is None else generator
        direction = _NORMS[self.norm].uniform(pixels, generator)
        return self.project(pixels + self.radius(pixels) * direction, pixels)

    def step(
        self, gradient: torch.Tensor, step_size: torch.Tensor, sparsity: float | torch.Tensor = L1_SPARSITY
    ) -> torch.Tensor:
        """The steepest ascent step of length `step_size` in the norm; zero where the gradient is zero.

        Args:
            gradient (`torch.Tensor` of shape `(batch, channels, height, width)`):
                Gradient of the loss at the current point.
            step_size (`torch.Tensor` that broadcasts against `gradient`):
                Length of the step, in pixels.
            sparsity (`float` or `torch.Tensor` of shape `(batch,)`):
                For `"l1"`, the share of coordinates that move at a time, those with the largest gradients.
        """
        return step_size * _NORMS[self.norm].steepest(gradient, sparsity)

    def project(self, adversarial: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """The point in both ball and box that is nearest to `adversarial` in Euclidean distance.

        `pixels` must lie in the box. Exact up to rounding for all norms: projecting onto the ball and then clamping
        would also stay inside, but would waste part of the budget where the box binds.
        """
        return _NORMS[self.norm].nearest(adversarial, pixels, self.radius(pixels))


def _norm(images: torch.Tensor, norm: str) -> torch.Tensor:
    """Norm of each image, shape `(batch, 1, 1, 1)`."""
    return torch.linalg.vector_norm(images.flatten(1), ord=_NORMS[norm].order, dim=1).reshape(-1, 1, 1, 1)


def _unit(images: torch.Tensor, norm: str) -> torch.Tensor:
    """Each image divided by its norm, after scaling by its largest entry so that tiny gradients do not underflow."""
    tiny = torch.finfo(images.dtype).tiny
    scaled = images / _norm(images, "linf").clamp_min(tiny)
    return scaled / _norm(scaled, norm).clamp_min(tiny)


# --- A uniform point of the unit ball ---


def _uniform_linf(images: torch.Tensor, generator: Generators) -> torch.Tensor:
    return 2 * rand(images, generator) - 1


def _uniform_l2(images: torch.Tensor, generator: Generators) -> torch.Tensor:
    """Uniform in the d-dimensional ball: the direction of a Gaussian, and the radius U^(1/d)."""
    noise = randn(images, generator)
    return _unit(noise, "l2") * rand(images[:, :1, :1, :1], generator) ** (1 / images[0].numel())


def _uniform_l1(images: torch.Tensor, generator: Generators) -> torch.Tensor:
    """Laplace noise divided by its L1 norm plus one more exponential variable."""
    exponential = -torch.log1p(-rand(images, generator))
    sign = torch.where(rand(images, generator) < 0.5, -1.0, 1.0).to(images)
    slack = -torch.log1p(-rand(images[:, :1, :1, :1], generator))
    return sign * exponential / (_norm(exponential, "l1") + slack)


# --- The steepest step of length 1 ---


def _steepest_linf(gradient: torch.Tensor, sparsity: float | torch.Tensor) -> torch.Tensor:
    return gradient.sign()


def _steepest_l2(gradient: torch.Tensor, sparsity: float | torch.Tensor) -> torch.Tensor:
    return _unit(gradient, "l2")


def _steepest_l1(gradient: torch.Tensor, sparsity: float | torch.Tensor) -> torch.Tensor:
    magnitude = gradient.abs().flatten(1)
    if not isinstance(sparsity, torch.Tensor):  # filled on the device, so that nothing waits for a copy
        sparsity = torch.full((1,), sparsity, device=gradient.device)
    count = sparsity * magnitude.shape[1]
    rank = count.long().clamp(1, magnitude.shape[1]).expand(len(magnitude)) - 1
    threshold = magnitude.sort(dim=1, descending=True).values.gather(1, rank.unsqueeze(1))
    sign = gradient.sign() * (magnitude >= threshold).reshape(gradient.shape)
    return sign / _norm(sign, "l1").clamp_min(1)


# --- The nearest point of ball and box ---


def _nearest_linf(adversarial: torch.Tensor, pixels: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    return torch.minimum(torch.maximum(adversarial, pixels - radius), pixels + radius).clamp(0, 1)


def _nearest_by(shrink: Callable) -> Callable:
    """A projection that shrinks the size of each coordinate's change and keeps its sign."""

    def nearest(adversarial: torch.Tensor, pixels: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        delta = adversarial - pixels
        room = torch.where(delta > 0, 1 - pixels, pixels)  # how far each coordinate can move within the box
        size = shrink(delta.abs().flatten(1), room.flatten(1), radius.flatten(1)).reshape(delta.shape)
        # Rounding may still put `pixels + size` just outside the box.
        return (pixels + delta.sign() * size).clamp(0, 1)

    return nearest


def _shrink_l2(size: torch.Tensor, room: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """The nearest vector to `size` with entries in [0, `room`] and L2 norm at most `radius`; shapes `(batch, d)`.

    It is `min(s * size, room)` with one factor `s` in [0, 1] per example. The squared norm grows with `s`, and is
    quadratic between the points `room / size` where an entry reaches its bound, so sorting those gives `s` exactly.
    """
    inside = torch.linalg.vector_norm(torch.minimum(size, room), dim=1, keepdim=True) <= radius
    bounds = (room / size.clamp_min(torch.finfo(size.dtype).tiny)).nan_to_num(posinf=torch.finfo(size.dtype).max)
    bounds, order = bounds.sort(dim=1)
    # Sum in float64: otherwise differences of cumulative sums of squares would lose the small entries.
    free = size.double().square().gather(1, order)
    fixed = room.double().square().gather(1, order)
    fixed_before = fixed.cumsum(1) - fixed  # entries that reach their bounds before the k-th does
    free_from = free.flip(1).cumsum(1).flip(1)
    budget = radius.double().square()
    # With exactly the first k entries at their bounds: fixed_before[k] + s^2 free_from[k] = radius^2.
    factor = ((budget - fixed_before).clamp_min(0) / free_from.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    # The right k is the first whose factor does not push the k-th entry over its bound. Rounding may leave none: then
    # the ball just touches the corner of the box, and all entries are at their bounds.
    fits = factor <= bounds.double()
    k = fits.double().argmax(dim=1, keepdim=True)
    factor = torch.where(fits.any(dim=1, keepdim=True), factor.gather(1, k), 1.0)
    shrunk = torch.minimum(size * factor.to(size.dtype).clamp_max(1), room)
    # The last bit: rounding must not leave the ball.
    length = torch.linalg.vector_norm(shrunk, dim=1, keepdim=True)
    shrunk = shrunk * (radius / length.clamp_min(torch.finfo(size.dtype).tiny)).clamp_max(1)
    return torch.where(inside, torch.minimum(size, room), shrunk)


def _shrink_l1(size: torch.Tensor, room: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """The nearest vector to `size` with entries in [0, `room`] and L1 norm at most `radius`; shapes `(batch, d)`.

    It is `clamp(size - t, 0, room)` with one threshold `t >= 0` per example (Croce and Hein 2021, "Mind the box",
    proposition 2.2). The sum falls with `t`, and is linear between the 2d points where an entry leaves its upper bound
    (`size - room`) or reaches zero (`size`), so sorting those gives `t` exactly.
    """
    clipped = torch.minimum(size, room)
    inside = clipped.sum(dim=1, keepdim=True) <= radius
    points = torch.cat([(size - room).clamp_min(0), size], dim=1).double()
    # Beyond its first point, an entry falls with slope 1; beyond its second, it stays at zero.
    slope_changes = torch.cat([torch.ones_like(size), -torch.ones_like(size)], dim=1).double()
    points, order = points.sort(dim=1)
    slopes = slope_changes.gather(1, order).cumsum(1)  # number of entries that fall after each point
    fall = (slopes[:, :-1] * points.diff(dim=1)).cumsum(1)
    total = clipped.double().sum(dim=1, keepdim=True)
    sums = torch.cat([total, total - fall], dim=1)  # the sum at each point
    # The last point where the sum is still at least the radius; from there on, it falls linearly to the radius.
    k = ((sums >= radius.double()).long().sum(dim=1, keepdim=True) - 1).clamp_min(0)
    rest = (sums.gather(1, k) - radius.double()) / slopes.gather(1, k).clamp_min(1)
    threshold = (points.gather(1, k) + rest).to(size.dtype)
    shrunk = torch.minimum((size - threshold).clamp_min(0), room)
    # The last bit: rounding must not leave the ball.
    shrunk = shrunk * (radius / shrunk.sum(dim=1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)).clamp_max(1)
    return torch.where(inside, clipped, shrunk)


class _Norm(NamedTuple):
    """What a threat model needs to know about a norm."""

    title: str  # for people to read
    order: float  # as `torch.linalg.vector_norm` takes it
    uniform: Callable[[torch.Tensor, Generators], torch.Tensor]
    steepest: Callable[[torch.Tensor, float | torch.Tensor], torch.Tensor]
    nearest: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

    @property
    def dual_order(self) -> float:
        """The order q with 1/p + 1/q = 1."""
        return 1 / (1 - 1 / self.order) if self.order > 1 else torch.inf


_NORMS = {
    "linf": _Norm("L∞", torch.inf, _uniform_linf, _steepest_linf, _nearest_linf),
    "l2": _Norm("L2", 2, _uniform_l2, _steepest_l2, _nearest_by(_shrink_l2)),
    "l1": _Norm("L1", 1, _uniform_l1, _steepest_l1, _nearest_by(_shrink_l1)),
}
NORMS = tuple(_NORMS)
NORM_NAMES = {name: norm.title for name, norm in _NORMS.items()}
