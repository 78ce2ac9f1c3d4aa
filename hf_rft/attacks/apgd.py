"""Auto-PGD: PGD that chooses its own step size.

Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks"
(https://huggingface.co/papers/2003.01690), algorithm 1; for L1 their "Mind the box" 2021
(https://huggingface.co/papers/2103.01208), algorithm 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..threat_model import ThreatModel
from ..utils.noise import Generators, randn
from .base import (
    Forward,
    Objective,
    Passes,
    PerNorm,
    check_inputs,
    dlr,
    evaluate,
    log_odds,
    per_example,
    states_passes,
    where,
)


MOMENTUM = 0.75
# A step size is kept only if more than this share of the steps since the last checkpoint increased the objective.
MIN_INCREASE = 0.75
# Shorter runs have a single phase and, even in L1, a uniform start.
MIN_STEPS_FOR_PHASES = 10


def _phases(steps: int, norm: str) -> list[tuple[int, int]]:
    """`(factor of epsilon, steps)` of each phase."""
    if steps < MIN_STEPS_FOR_PHASES:
        return [(1, steps)]
    *wider, (factor, _) = RULES[norm].phases
    phases = [(factor, int(share * steps)) for factor, share in wider]
    return [*phases, (factor, steps - sum(phase_steps for _, phase_steps in phases))]


def _sparse_start(threat_model: ThreatModel, pixels: torch.Tensor, generator: Generators) -> torch.Tensor:
    """Gaussian noise projected onto the L1 ball: only the coordinates with the largest noise change, as in the paper.

    Compared with uniform starts, on two CNNs (14 px, 150 images): 0 to 0.7 points fewer examples withstood five runs
    of 100 steps (two epsilons each), and 3 to 7 points fewer withstood one run of 10 steps (one epsilon each). Single
    runs of 100 steps differ by up to 2 points either way. Without phases (20 steps), this start was 2 points weaker.
    """
    return threat_model.project(pixels + randn(pixels, generator), pixels)


def apgd_passes(steps: int, norm: str = "linf") -> Passes:
    """Cost of one run; each phase evaluates its last iterate without a gradient."""
    return Passes(forward=steps + len(_phases(steps, norm)), backward=steps)


@states_passes(apgd_passes)
def apgd(
    forward: Forward,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    *,
    threat_model: ThreatModel,
    steps: int,
    generator: Generators = None,
    random_start: bool = True,
    step_size: float | None = None,
    objective: Objective = log_odds,
    early_stop: bool = False,
) -> torch.Tensor:
    """Ascent with momentum whose step size halves, per example, whenever progress stalls.

    See [`Attack`] for the common arguments. Passes: `steps + 1` forward, `steps` backward (the last iterate needs no
    gradient); two more forward passes for L1 with 10 or more steps.

    Args:
        random_start (`bool`, *optional*, defaults to `True`):
            Start from a random point of the ball instead of the clean image. The point is uniform, except for L1 with
            10 or more steps: there it is sparse, in a ball of three times the radius.
        step_size (`float`, *optional*):
            Length of the first step relative to epsilon. Defaults to 2 (L-inf, L2) or 1 (L1).
        objective (`Callable`, *optional*):
            Maps logits and labels to the value to increase, per example. Defaults to the log-odds, which rise
            together with the cross-entropy; [`apgd_dlr`] uses the paper's other objective.
        early_stop (`bool`, *optional*, defaults to `False`):
            Return the first misclassified iterate of each example and spend no further passes on it. Otherwise,
            return the iterate with the largest objective.
    """
    pixels = check_inputs(pixels, labels, steps)
    if threat_model.is_trivial or len(pixels) == 0:
        return pixels
    norm = threat_model.norm
    phases = [(ThreatModel(norm, threat_model.epsilon * factor), count) for factor, count in _phases(steps, norm)]
    start = RULES[norm].start if steps >= MIN_STEPS_FOR_PHASES else ThreatModel.random_start
    adversarial = start(phases[0][0], pixels, generator) if random_start else pixels
    step_size = RULES[norm].first_step if step_size is None else step_size
    for number, (ball, count) in enumerate(phases, start=1):
        if number > 1:
            adversarial = ball.project(adversarial, pixels)
        stops = early_stop and number == len(phases)  # fooling in a wider ball does not count
        adversarial = _ascend(forward, pixels, labels, adversarial, ball, count, step_size, objective, stops)
    return adversarial


@states_passes(apgd_passes)
def apgd_dlr(
    forward: Forward,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    *,
    objective: Objective = dlr,
    early_stop: bool = False,
    **options,
) -> torch.Tensor:
    """[`apgd`] on the difference-of-logits ratio, the paper's other objective, which ignores the logits' scale."""
    return apgd(forward, pixels, labels, objective=objective, early_stop=early_stop, **options)


def _ascend(
    forward: Forward,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    start: torch.Tensor,
    threat_model: ThreatModel,
    steps: int,
    step_size: float,
    objective: Objective,
    early_stop: bool,
) -> torch.Tensor:
    step_rule = RULES[threat_model.norm].steps(threat_model, pixels, steps, step_size, start)
    current = evaluate(forward, start, labels, objective)
    previous = adversarial = best = start
    best_objective, best_gradient, gradient = current.objective, current.gradient, current.gradient
    fooled, fooling, standing = current.fooled, start, None

    for step in range(1, steps + 1):
        if early_stop:
            standing = (~fooled).nonzero().flatten()
            if len(standing) == 0:
                break
        moved = threat_model.project(adversarial + step_rule.move(gradient), pixels)
        if step_rule.momentum and step > 1:
            blend = adversarial + MOMENTUM * (moved - adversarial) + (1 - MOMENTUM) * (adversarial - previous)
            moved = threat_model.project(blend, pixels)
        previous, adversarial = adversarial, moved

        last = current
        current = evaluate(forward, adversarial, labels, objective, gradient=step < steps, standing=standing)
        fooling = where(current.fooled & ~fooled, adversarial, fooling)
        fooled = fooled | current.fooled
        is_better = current.objective > best_objective
        best_objective = torch.where(is_better, current.objective, best_objective)
        best = where(is_better, adversarial, best)
        if step == steps:
            break
        gradient = current.gradient
        best_gradient = where(is_better, gradient, best_gradient)

        restart = step_rule.update(current.objective > last.objective, best_objective, best, pixels)
        if restart is not None:  # checkpoint: stalled examples resume from their best point, without momentum
            adversarial = where(restart, best, adversarial)
            previous = where(restart, best, previous)
            gradient = where(restart, best_gradient, gradient)
            current = current._replace(objective=torch.where(restart, best_objective, current.objective))
    if early_stop:
        return where(fooled, fooling, best)
    return best


class _HalvingSteps:
    """L-inf and L2: halve the step of stalled examples, at checkpoints that get closer and closer."""

    momentum = True

    def __init__(self, threat_model: ThreatModel, pixels: torch.Tensor, steps: int, step_size: float, *_):
        self.threat_model = threat_model
        self.step_size = threat_model.radius(pixels) * step_size
        self.interval = max(int(0.22 * steps), 1)
        self.shortest_interval = max(int(0.06 * steps), 1)
        self.shortening = max(int(0.03 * steps), 1)
        self.steps_in_interval = 0
        self.increases = torch.zeros(len(pixels), device=pixels.device)
        self.was_halved = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
        self.best_at_checkpoint = torch.full_like(self.increases, -torch.inf)

    def move(self, gradient: torch.Tensor) -> torch.Tensor:
        return self.threat_model.step(gradient, self.step_size)

    def update(self, increased: torch.Tensor, best_objective: torch.Tensor, *_) -> torch.Tensor | None:
        """Count a step; at a checkpoint, return which examples restart from their best point."""
        self.increases += increased
        self.steps_in_interval += 1
        if self.steps_in_interval < self.interval:
            return None
        oscillates = self.increases <= MIN_INCREASE * self.steps_in_interval
        no_progress = ~self.was_halved & (best_objective <= self.best_at_checkpoint)
        stalled = oscillates | no_progress
        self.step_size = torch.where(per_example(stalled), self.step_size / 2, self.step_size)
        self.was_halved, self.best_at_checkpoint = stalled, best_objective
        self.increases = torch.zeros_like(self.increases)
        self.steps_in_interval = 0
        self.interval = max(self.interval - self.shortening, self.shortest_interval)
        return stalled


class _SparseSteps:
    """L1: move few coordinates at a time, fewer as the best perturbation becomes sparser."""

    momentum = False

    def __init__(
        self, threat_model: ThreatModel, pixels: torch.Tensor, steps: int, step_size: float, start: torch.Tensor
    ):
        self.threat_model = threat_model
        self.longest_step = threat_model.radius(pixels) * step_size
        self.step_size = self.longest_step
        self.interval = max(int(0.04 * steps), 1)
        self.steps_in_interval = 0
        self.support = self._changed(start, pixels)
        # The same as at a checkpoint, unless the start is dense or the clean image.
        self.sparsity = torch.where(self.support > 0, self.support / pixels[0].numel() / 1.5, 0.2).clamp_max(0.2)

    def move(self, gradient: torch.Tensor) -> torch.Tensor:
        return self.threat_model.step(gradient, self.step_size, self.sparsity)

    def update(
        self, increased: torch.Tensor, best_objective: torch.Tensor, best: torch.Tensor, pixels: torch.Tensor
    ) -> torch.Tensor | None:
        """Count a step; at a checkpoint, return which examples restart from their best point."""
        self.steps_in_interval += 1
        if self.steps_in_interval < self.interval:
            return None
        self.steps_in_interval = 0
        support = self._changed(best, pixels)
        became_sparser = support < 0.95 * self.support
        self.support = support
        self.sparsity = support / pixels[0].numel() / 1.5
        shorter = torch.maximum(self.step_size / 1.5, self.longest_step / 10)
        self.step_size = torch.where(per_example(became_sparser), self.longest_step, shorter)
        return became_sparser

    @staticmethod
    def _changed(images: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Number of coordinates that differ from the clean image's."""
        return (images != pixels).flatten(1).sum(dim=1).float()


class _Rules(NamedTuple):
    """What depends on the norm."""

    steps: Callable  # the class that chooses step sizes
    first_step: float  # its length relative to epsilon
    start: Callable = ThreatModel.random_start
    phases: tuple[tuple[int, float], ...] = ((1, 1.0),)  # (multiple of the target epsilon, share of the steps)


RULES = PerNorm(
    "apgd.RULES",
    {
        "linf": _Rules(_HalvingSteps, 2.0),
        "l2": _Rules(_HalvingSteps, 2.0),
        # Wider balls lead out of flat regions.
        "l1": _Rules(_SparseSteps, 1.0, _sparse_start, ((3, 0.3), (2, 0.3), (1, 0.4))),
    },
)
