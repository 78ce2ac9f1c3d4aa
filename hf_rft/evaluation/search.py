"""Where each example of a batch breaks, on a grid of epsilons.

An example fooled at one epsilon is fooled at every larger one, since its adversarial example also lies in the larger
balls. The expensive attacks are those that fail, because they run to their last step, and each example needs only one
such failure, just below the epsilon that breaks it. So the search starts at the largest epsilon. Once an example is
broken, its adversarial example is pulled as far as possible towards the clean image, a short minimum-norm search looks
for a nearer one, and the attacks continue just below. Each example has its own epsilon, so all of them share full
batches, and drops out once decided.

A failed attack shows only that this attack failed at this epsilon. It does not show that the example is robust there,
nor, strictly, at smaller epsilons: if a model hides its gradient far from the clean image, an attack that starts there
sees nothing, although it would succeed in a smaller ball. So an example that withstands everything at the largest
epsilon is given to the minimum-norm search, which starts at the clean image and moves outwards; whatever it finds is
pursued as above. Each example is searched once. Otherwise, a failure of all attacks is assumed to hold at every
smaller epsilon. Tiers without the search (`guess_steps=0`: custom lists, and the trainer's cheap evaluation) rely on
this assumption alone, so their accuracy at one epsilon may depend on larger ones in the grid.
"""

import inspect
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..attacks import fmn
from ..attacks.base import Forward, attack_name, per_example, where
from ..threat_model import ThreatModel
from ..utils.noise import EVALUATION_ATTACK, example_generators


if TYPE_CHECKING:
    from .tiers import Tier


# Halvings of the segment between the clean image and an adversarial example.
SHRINKING_STEPS = 6
# Relative tolerance for rounding when a distance is compared with an epsilon.
ROUNDING = 1e-5


class BreakingPoints(NamedTuple):
    """The examples of a batch, and the nearest adversarial example found for each."""

    labels: torch.Tensor  # (batch,)
    clean_predictions: torch.Tensor  # (batch,)
    broken_at: torch.Tensor  # (batch,): index of the smallest epsilon that breaks it, len(epsilons) if none does
    distances: torch.Tensor  # (batch,): size of the smallest fooling perturbation found, inf if none was
    adversarial_predictions: torch.Tensor  # (batch,): the label if none was found
    adversarial: torch.Tensor  # (batch, channels, height, width): the clean image if none was found

    def predictions(self, count: int) -> torch.Tensor:
        """Class predicted at each of the `count` epsilons, shape `(batch, count)`."""
        is_broken = self.broken_at.unsqueeze(1) <= torch.arange(count, device=self.broken_at.device)
        return torch.where(is_broken, self.adversarial_predictions.unsqueeze(1), self.labels.unsqueeze(1))


def find_breaking_points(
    forward: Forward,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    *,
    norm: str,
    epsilons: Sequence[Fraction],
    tier: "Tier",
    seed: int,
    positions: Sequence[int],
    verify: Forward | None = None,
    clean_predictions: torch.Tensor | None = None,
    batch_size: int | None = None,
    on_progress: Callable[[str, int], None] = lambda stage, decided: None,
) -> BreakingPoints:
    """For every example, find the smallest epsilon of the grid at which an attack of the tier succeeds.

    Args:
        forward (`Callable`):
            Maps pixels to logits.
        pixels (`torch.Tensor` of shape `(batch, channels, height, width)`):
            Clean images, pixels in [0, 1].
        labels (`torch.Tensor` of shape `(batch,)`):
            True classes.
        norm (`str`):
            A name in `NORMS`.
        epsilons (`Sequence[Fraction]`):
            Increasing, starting at 0.
        tier ([`Tier`]):
            The attacks.
        seed, positions:
            An example's noise depends on the seed and its position in the dataset.
        verify (`Callable`, *optional*):
            Like `forward`, in full precision: only images that fool this function count. If an attack on `forward`
            finds an image that does not fool `verify`, `verify` itself is attacked.
        clean_predictions (`torch.Tensor` of shape `(batch,)`, *optional*):
            Predicted classes of the clean images, if known.
        batch_size (`int`, *optional*):
            Attack at most so many images at a time. With several times as many images, the batches stay full to the
            end; by default, all images are one batch, of which ever fewer are left.
        on_progress (`Callable`, *optional*):
            Called with the name of each attack as it starts, and the number of examples decided so far.
    """
    verify = verify or forward
    if clean_predictions is None:
        clean_predictions = _predict(verify, pixels)
    search = _Search(forward, verify, pixels, labels, norm, epsilons, tier, seed, positions, clean_predictions)
    while len(undecided := search.undecided()) > 0:
        # Run the earliest attack that is due for a whole batch, or else for any example: what it breaks returns to
        # the first attack at a smaller epsilon, and the long attacks get the largest possible batches.
        counts = search.withstood[undecided].bincount()
        full = (counts >= (batch_size or len(labels))).nonzero().flatten()
        stage = int(full[0] if len(full) > 0 else counts.nonzero()[0])
        on_progress(attack_name(search.runs[stage].attack), len(labels) - len(undecided))
        search.attack(undecided[search.withstood[undecided] == stage][:batch_size], stage)
    on_progress("", len(labels))
    return search.found


class _Search:
    """What is known about each example so far, and the two moves that find out more."""

    def __init__(
        self,
        forward: Forward,
        verify: Forward,
        pixels: torch.Tensor,
        labels: torch.Tensor,
        norm: str,
        epsilons: Sequence[Fraction],
        tier: "Tier",
        seed: int,
        positions: Sequence[int],
        clean_predictions: torch.Tensor,
    ):
        self.forward, self.verify, self.pixels, self.labels = forward, verify, pixels, labels
        self.norm, self.guess_steps, self.seed, self.positions = norm, tier.guess_steps, seed, positions
        self.grid = torch.tensor([float(epsilon) for epsilon in epsilons], device=pixels.device, dtype=pixels.dtype)
        self.runs = [run for run in tier.attacks for _ in range(run.restarts)]
        # An example misclassified without perturbation breaks at epsilon 0.
        is_right = clean_predictions == labels
        self.broken_at = torch.where(is_right, len(self.grid), 0)
        self.distances = torch.where(is_right, torch.inf, 0.0).to(pixels)
        self.predictions, self.adversarial = clean_predictions.clone(), pixels.clone()
        self.found = BreakingPoints(
            labels, clean_predictions, self.broken_at, self.distances, self.predictions, self.adversarial
        )
        # Number of attacks that failed at the largest epsilon not known to break the example.
        self.withstood = torch.zeros_like(labels)

    def undecided(self) -> torch.Tensor:
        """Indices of the examples that still have attacks to face."""
        return ((self.broken_at > 1) & (self.withstood < len(self.runs))).nonzero().flatten()

    def attack(self, indices: torch.Tensor, stage: int) -> None:
        """Run one attack on each example, just below the epsilon that breaks it."""
        level = self.broken_at[indices] - 1
        is_first = self.distances[indices].isinf()
        found = self._run(self.forward, indices, stage)
        fooled = self._record(indices, found, level)
        if self.verify is not self.forward:
            claimed = _predict(self.forward, found) != self.labels[indices]
            doubtful = (claimed & ~fooled).nonzero().flatten()
            if len(doubtful) > 0:
                found = self._run(self.verify, indices[doubtful], stage)
                fooled[doubtful] = self._record(indices[doubtful], found, level[doubtful])
        self.withstood[indices] = torch.where(fooled, 0, stage + 1)
        is_last = stage + 1 == len(self.runs)
        self._guess(indices[is_first & (fooled | is_last)])

    def _run(self, forward: Forward, indices: torch.Tensor, stage: int) -> torch.Tensor:
        run = self.runs[stage]
        positions = [self.positions[index] for index in indices.tolist()]
        # Only if named explicitly: an attack with `**options` may pass them on to a function without it.
        stops = "early_stop" in inspect.signature(run.attack).parameters
        found = run.attack(
            forward,
            self.pixels[indices],
            self.labels[indices],
            threat_model=ThreatModel(self.norm, self.grid[self.broken_at[indices] - 1]),
            steps=run.steps,
            generator=example_generators(self.pixels.device, positions, EVALUATION_ATTACK, self.seed, stage),
            **({"early_stop": True} if stops else {}),
        )
        return found.to(self.pixels)

    def _guess(self, indices: torch.Tensor) -> None:
        """Search outwards from the clean images for adversarial examples nearer than any found so far."""
        if self.guess_steps == 0 or len(indices) == 0:
            return
        within = ThreatModel(self.norm, self.distances[indices].clamp_max(self.grid[-1]))
        pixels, labels = self.pixels[indices], self.labels[indices]
        found = fmn(self.forward, pixels, labels, threat_model=within, steps=self.guess_steps)
        fooled = self._record(indices, found, self.broken_at[indices].clamp_max(len(self.grid) - 1))
        self.withstood[indices[fooled]] = 0

    def _record(self, indices: torch.Tensor, found: torch.Tensor, within: torch.Tensor) -> torch.Tensor:
        """Keep the nearest fooling image of each example; return which of the images fool the model.

        `within` holds the index of an epsilon that each image respects, even if its rounded distance exceeds it.
        """
        predicted = _predict(self.verify, found)
        wrong = predicted != self.labels[indices]
        indices, found, predicted, within = indices[wrong], found[wrong], predicted[wrong], within[wrong]
        pixels, labels = self.pixels[indices], self.labels[indices]
        found, predicted = _shrunk(self.verify, pixels, labels, found, predicted)
        distance = ThreatModel(self.norm, 0).distance(found, pixels)
        nearer = distance < self.distances[indices]
        kept = indices[nearer]
        self.distances[kept], self.predictions[kept] = distance[nearer], predicted[nearer]
        self.adversarial[kept] = found[nearer]
        # Never 0, which only the clean predictions decide: in other precision, or by chance, a clean image may fool.
        reached = torch.searchsorted(self.grid * (1 + ROUNDING), self.distances[indices]).clamp_min(1)
        self.broken_at[indices] = reached.minimum(within)
        return wrong


@torch.no_grad()
def _predict(forward: Forward, pixels: torch.Tensor) -> torch.Tensor:
    if len(pixels) == 0:
        return torch.empty(0, dtype=torch.long, device=pixels.device)
    return forward(pixels).argmax(dim=1)


def _shrunk(
    forward: Forward, pixels: torch.Tensor, labels: torch.Tensor, found: torch.Tensor, predictions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pull adversarial examples straight towards the clean images as long as they fool; also return predictions."""
    low, high = torch.zeros(len(pixels)).to(pixels), torch.ones(len(pixels)).to(pixels)
    for _ in range(SHRINKING_STEPS if len(pixels) > 0 else 0):
        middle = (low + high) / 2
        tried = pixels + per_example(middle) * (found - pixels)
        predicted = _predict(forward, tried)
        wrong = predicted != labels
        low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
        predictions = torch.where(wrong, predicted, predictions)
    # Return the original if nothing nearer fools: adding the difference back could round.
    shrunk = pixels + per_example(high) * (found - pixels)
    return where(high < 1, shrunk, found), predictions
