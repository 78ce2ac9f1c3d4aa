"""How long an evaluation will take: said once, early enough to stop it."""

import inspect
import time
from collections.abc import Callable

import torch

from ..attacks import fmn
from ..attacks.base import Attack, Forward
from ..models.classifier import CountedForward
from .evaluator import Evaluator
from .tiers import Tier


# In seconds: shorter evaluations need no estimate, and attacks are timed for so long unless the batch ends before.
WORTH_SAYING, TRIAL = 60, 5


def passes_to_withstand(tier: Tier, norm: str, num_classes: int) -> int:
    """Forward and backward passes of an example that withstands all attacks of the tier.

    An attack that does not state its passes is assumed to spend one of each per step.
    """

    def of(attack: Attack, steps: int) -> int:
        passes = getattr(attack, "passes", None)
        if passes is None:
            return 2 * steps
        counts = {name: inspect.signature(passes).parameters.get(name) for name in ("targets", "candidates")}
        capped = {name: min(count.default, num_classes - 1) for name, count in counts.items() if count}
        return sum(passes(steps, norm, **capped))

    search = of(fmn, tier.guess_steps) if tier.guess_steps else 0
    return sum(run.restarts * of(run.attack, run.steps) for run in tier.attacks) + search


def describe_cost(seconds: float, images: int, epsilons: int, tier: str) -> str:
    """`Up to about 8 minutes left: 10 images x 9 epsilons, tier full`."""
    count, unit = (round(seconds / 60), "minute") if seconds < 6000 else (round(seconds / 3600), "hour")
    ending = "" if count == 1 else "s"
    return f"Up to about {count} {unit}{ending} left: {images} images x {epsilons} epsilons, tier {tier}"


class CostEstimate:
    """Times the first attacks and, if the evaluation will be long, says how long.

    Assumes that all passes through the model cost the same, and that every image that is classified correctly
    withstands all attacks. Images that break cost less, so this is roughly an upper bound.

    Args:
        evaluator ([`Evaluator`]):
            What is run on each image.
        say (`Callable[[str], None]`):
            Shows the estimate.
        clock (`Callable[[], float]`, *optional*):
            Returns seconds.
    """

    def __init__(
        self, evaluator: Evaluator, say: Callable[[str], None], clock: Callable[[], float] = time.perf_counter
    ):
        self.evaluator, self.say, self.clock = evaluator, say, clock
        self.is_made, self.num_classes = False, 0

    def left(self, *, images: int, num_right: int) -> None:
        """Before each batch: the images left, this batch included, and how many of them are classified correctly."""
        self.images, self.num_right = images, num_right

    def watched(self, forward: Forward) -> Forward:
        """`forward` for the next batch, timed until the estimate is made."""
        if self.is_made:
            return forward
        self.counted, self.started = CountedForward(forward), self.clock()

        def timed(pixels: torch.Tensor) -> torch.Tensor:
            if self.clock() - self.started >= TRIAL:
                self.make()
            logits = self.counted(pixels)
            self.num_classes = logits.shape[1]
            return logits

        return timed

    def make(self) -> None:
        """Make the estimate, unless it was made or nothing has been attacked; also called when a batch is done."""
        spent = sum(self.counted.passes)
        if self.is_made or spent == 0:
            return
        self.is_made = True
        whole = self.num_right * passes_to_withstand(self.evaluator.tier, self.evaluator.norm, self.num_classes)
        seconds = (self.clock() - self.started) * (whole / spent - 1)
        if seconds >= WORTH_SAYING:
            self.say(describe_cost(seconds, self.images, len(self.evaluator.epsilons), self.evaluator.tier.name))
