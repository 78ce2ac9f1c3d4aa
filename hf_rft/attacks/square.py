"""Square Attack: random search over squares. It needs predictions only, so masked gradients cannot mislead it.

Andriushchenko et al. 2020, "Square Attack: a query-efficient black-box adversarial attack via random search"
(https://huggingface.co/papers/1912.00049), algorithms 1 to 3. L1 works like L2 with the norm swapped (Croce and Hein
2021, https://huggingface.co/papers/2103.01208, section 4).
"""

import bisect
import functools
import math

import torch

from ..threat_model import ThreatModel
from ..utils.noise import Generators, rand
from .base import Forward, Passes, PerNorm, check_inputs, evaluate, margin, per_example, states_passes, where


# Initially a square covers this share of the image; the share halves after each of these query counts.
SHARE = 0.8
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@states_passes(lambda steps, norm="linf": Passes(steps + 1, 0))
def square(
    forward: Forward,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    *,
    threat_model: ThreatModel,
    steps: int,
    generator: Generators = None,
) -> torch.Tensor:
    """Change one random square at a time, keeping changes that bring the example closer to misclassification.

    See [`Attack`] for the common arguments. Passes: `steps + 1` forward, none backward; once fooled, an example costs
    nothing more. Images may have any height and width.

    Args:
        steps (`int`):
            Number of squares to try. AutoAttack tries 5000; a tenth of that shows whether gradients are masked.

    Returns:
        `torch.Tensor`: the first misclassified image found; if an example withstands, the one that came closest.
    """
    pixels = check_inputs(pixels, labels, steps)
    if threat_model.is_trivial or len(pixels) == 0:
        return pixels
    propose, start = MOVES[threat_model.norm]
    # Draw all random numbers before the first query, so that an example's numbers do not depend on the others.
    channels, height, width = pixels.shape[1:]
    first_noise = rand(pixels, generator)
    noise = rand(pixels.new_empty(len(pixels), steps, 5 + channels), generator)

    best = start(pixels, first_noise, threat_model)
    current = evaluate(forward, best, labels, margin, gradient=False)
    best_margin, fooled = current.objective, current.fooled
    for step in range(steps):
        standing = (~fooled).nonzero().flatten()
        if len(standing) == 0:
            break
        share = SHARE / 2 ** bisect.bisect_left(HALVINGS, step)
        side = min(max(round(math.sqrt(share * height * width)), 1), height, width)
        tried = propose(best[standing], pixels[standing], noise[standing, step], side, threat_model.select(standing))
        current = evaluate(forward, tried, labels[standing], margin, gradient=False)
        better = current.fooled | (current.objective > best_margin[standing])
        best[standing] = where(better, tried, best[standing])
        best_margin[standing] = torch.where(better, current.objective, best_margin[standing])
        fooled[standing] = current.fooled
    return best


def _signs(noise: torch.Tensor) -> torch.Tensor:
    return torch.where(noise < 0.5, -1.0, 1.0).to(noise)


def _offsets(noise: torch.Tensor, side: int, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each pixel relative to a randomly placed square; inside it, both are in 0 ... `side - 1`.

    `noise` has shape `(batch, 2)`; the results have shapes `(batch, height, 1)` and `(batch, 1, width)`.
    """
    height, width = images.shape[2:]
    top, left = ((noise[:, axis] * (size - side + 1)).long() for axis, size in enumerate((height, width)))
    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    return rows.reshape(1, -1, 1) - top.reshape(-1, 1, 1), columns.reshape(1, 1, -1) - left.reshape(-1, 1, 1)


def _inside(offsets: tuple[torch.Tensor, torch.Tensor], side: int) -> torch.Tensor:
    """Mask of the square, shape `(batch, 1, height, width)`."""
    rows, columns = offsets
    return ((rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)).unsqueeze(1)


# --- L-inf: every pixel changes by plus or minus epsilon ---


def _stripes(pixels: torch.Tensor, noise: torch.Tensor, threat_model: ThreatModel) -> torch.Tensor:
    """Vertical stripes, one sign per channel and column."""
    return threat_model.project(pixels + threat_model.radius(pixels) * _signs(noise[:, :, :1]), pixels)


def _paint(
    best: torch.Tensor, pixels: torch.Tensor, noise: torch.Tensor, side: int, threat_model: ThreatModel
) -> torch.Tensor:
    """A square with one new sign per channel."""
    inside = _inside(_offsets(noise[:, :2], side, pixels), side)
    painted = pixels + threat_model.radius(pixels) * _signs(noise[:, 5:]).reshape(len(pixels), -1, 1, 1)
    return threat_model.project(torch.where(inside, painted, best), pixels)


# --- L2 and L1: squares compete for a shared budget ---


def _bump(side: int, like: torch.Tensor) -> torch.Tensor:
    """The change within a square, shape `(side, side)`: two pyramids side by side, one up and one down."""

    def pyramid(height: int, width: int) -> torch.Tensor:
        from_edge = height // 2
        rows = (torch.arange(height) - height // 2).abs().reshape(-1, 1)
        columns = (torch.arange(width) - width // 2).abs().reshape(1, -1)
        level = from_edge - torch.maximum(rows, columns)
        heights = torch.cumsum(1 / (from_edge + 1 - torch.arange(from_edge + 1.0)).square(), dim=0)
        return torch.where(level >= 0, heights[level.clamp_min(0)], 0.0)

    upper = side // 2
    return torch.cat([pyramid(upper, side), -pyramid(side - upper, side)]).to(like)


def _scale_to_radius(delta: torch.Tensor, pixels: torch.Tensor, threat_model: ThreatModel) -> torch.Tensor:
    """The perturbed image, with `delta` stretched onto the sphere and the result projected onto ball and box."""
    length = per_example(threat_model.distance(delta, torch.zeros_like(delta)))
    stretched = delta * threat_model.radius(pixels) / length.clamp_min(torch.finfo(delta.dtype).tiny)
    return threat_model.project(pixels + stretched, pixels)


def _tiles(pixels: torch.Tensor, noise: torch.Tensor, threat_model: ThreatModel) -> torch.Tensor:
    """The image tiled with bumps, five along its shorter side, each with its own sign per channel."""
    height, width = pixels.shape[2:]
    side = max(min(height, width) // 5, 1)
    rows, columns = torch.arange(height, device=pixels.device), torch.arange(width, device=pixels.device)
    bumps = _bump(side, pixels)[rows % side][:, columns % side]
    first_of_tile = noise[:, :, rows - rows % side][:, :, :, columns - columns % side]
    return _scale_to_radius(bumps * _signs(first_of_tile), pixels, threat_model)


def _move_budget(
    best: torch.Tensor, pixels: torch.Tensor, noise: torch.Tensor, side: int, threat_model: ThreatModel, *, order: int
) -> torch.Tensor:
    """Empty one square and spend its budget, plus any unused budget, on a bump in another; `order` is the norm's."""
    side = min(max(side, 3), *pixels.shape[2:])
    offsets, donor = _offsets(noise[:, :2], side, pixels), _inside(_offsets(noise[:, 2:4], side, pixels), side)
    inside = _inside(offsets, side)
    delta = best - pixels

    def power(images: torch.Tensor) -> torch.Tensor:
        """Sum of the entries to the power of the norm's order, per channel."""
        return images.abs().pow(order).sum(dim=(2, 3), keepdim=True)

    rows, columns = (offset.clamp(0, side - 1) for offset in offsets)
    bump = _bump(side, pixels)
    turned = (noise[:, 4] < 0.5).reshape(-1, 1, 1)
    bump = torch.where(turned, bump[columns, rows], bump[rows, columns]).unsqueeze(1)
    tiny = torch.finfo(pixels.dtype).tiny
    kept = delta * inside
    kept = kept / power(kept).pow(1 / order).clamp_min(tiny)
    bump = bump * inside / power(bump * inside).pow(1 / order).clamp_min(tiny)
    filling = kept + bump * _signs(noise[:, 5:]).reshape(len(pixels), -1, 1, 1)
    unused = threat_model.radius(pixels).pow(order) - power(delta).sum(dim=1, keepdim=True)
    budget = power(delta * (inside | donor)) + unused.clamp_min(0) / pixels.shape[1]
    filling = filling * (budget / power(filling).clamp_min(tiny)).pow(1 / order)
    moved = torch.where(inside, filling, delta.masked_fill(donor, 0))
    return _scale_to_radius(moved, pixels, threat_model)


# The function that changes a square, and the one that makes the starting image.
MOVES = PerNorm(
    "square.MOVES",
    {
        "linf": (_paint, _stripes),
        "l2": (functools.partial(_move_budget, order=2), _tiles),
        "l1": (functools.partial(_move_budget, order=1), _tiles),
    },
)
