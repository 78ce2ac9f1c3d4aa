"""The evaluation protocol shared by `evaluate_robustness` and the trainer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..attacks.base import Forward, Passes
from ..models.classifier import CountedForward, PixelClassifier
from ..models.pixel_space import PixelNormalization
from ..threat_model import format_epsilon
from .cache import hash_levels
from .provenance import describe_dataset, describe_normalization, versions
from .search import BreakingPoints, find_breaking_points


if TYPE_CHECKING:
    from .tiers import Tier


class AttackedBatch(NamedTuple):
    """What a report states about a batch of a trainer, besides its predictions."""

    passes: Passes = Passes(0, 0)
    hashes: dict[int, str] | None = None  # of the examples, by position
    image_shape: Sequence[int] | None = None


@dataclass(frozen=True)
class Evaluator:
    """An evaluation protocol, and its application to one batch.

    Args:
        norm (`str`):
            A name in `NORMS`.
        epsilons (`list[Fraction]`):
            The grid: increasing, starting at 0.
        tier ([`Tier`]):
            The attacks.
        seed (`int`):
            Determines the attacks' random starts, together with an example's position in the dataset.
        autocast_dtype (`torch.dtype`, *optional*):
            Precision in which adversarial examples are crafted; None for the model's own.
    """

    norm: str
    epsilons: list[Fraction]
    tier: "Tier"
    seed: int
    autocast_dtype: torch.dtype | None = None

    def __repr__(self) -> str:
        grid = ", ".join(map(format_epsilon, self.epsilons))
        return f"Evaluator({self.norm} at {grid}; {self.tier}; seed {self.seed})"

    def attack(
        self,
        forward: Forward,
        pixels: torch.Tensor,
        labels: torch.Tensor,
        positions: Sequence[int],
        clean_predictions: torch.Tensor,
        *,
        crafting: Forward | None = None,
        batch_size: int | None = None,
        on_progress: Callable[[str, int], None] = lambda stage, decided: None,
    ) -> tuple[BreakingPoints, Passes]:
        """Where each example of a batch breaks, and the passes spent on the batch, including that of the clean images.

        Args:
            forward (`Callable`):
                Maps pixels to logits; only images that fool this function count.
            crafting (`Callable`, *optional*):
                Like `forward`, in another precision; the attacks run on it. Defaults to `forward`.
            pixels, labels, positions, clean_predictions, batch_size, on_progress:
                See [`find_breaking_points`].
        """
        exact = CountedForward(forward)
        crafted = exact if crafting is None else CountedForward(crafting)
        found = find_breaking_points(
            crafted,
            pixels,
            labels,
            norm=self.norm,
            epsilons=self.epsilons,
            tier=self.tier,
            seed=self.seed,
            positions=positions,
            verify=exact,
            clean_predictions=clean_predictions,
            batch_size=batch_size,
            on_progress=on_progress,
        )
        spent = [counter.passes for counter in {exact, crafted}]
        forward_passes, backward_passes = map(sum, zip(*spent, strict=True))
        return found, Passes(forward_passes + len(pixels), backward_passes)

    def attack_inputs(
        self, classifier: PixelClassifier, inputs: dict[str, Any], logits: torch.Tensor, positions: range
    ) -> tuple[BreakingPoints, AttackedBatch]:
        """[`attack`] on the first `len(positions)` examples of a trainer's batch.

        Args:
            inputs (`dict`):
                `pixel_values`, `labels`, and any further inputs, which are passed to the model unchanged.
            logits (`torch.Tensor` of shape `(len(positions), classes)`):
                Logits of the clean images.
        """
        count, inputs = len(positions), dict(inputs)
        pixels = classifier.normalization.to_pixels(inputs.pop("pixel_values"))[:count]
        labels = inputs.pop("labels")[:count]
        with classifier.under_attack():
            clean_predictions = logits.argmax(dim=1)
            found, passes = self.attack(partial(classifier, **inputs), pixels, labels, positions, clean_predictions)
        hashes = dict(zip(positions, hash_levels(pixels, labels), strict=True))
        return found, AttackedBatch(passes, hashes, list(pixels.shape[1:]))

    def settings(
        self,
        *,
        model: dict[str, Any],
        dataset: Any,
        normalization: PixelNormalization,
        batch_size: int,
        sha256: str | None = None,
        image_shape: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Everything the results depend on, as JSON values.

        Args:
            model (`dict`):
                The result of [`describe_model`].
            batch_size (`int`):
                Total batch size of all processes.
            sha256 (`str`, *optional*):
                Hash of the examples, if known.
            image_shape (`Sequence[int]`, *optional*):
                Channels, height and width, if known.
        """
        return {
            "model": model,
            "dataset": {**describe_dataset(dataset), "image_shape": image_shape, "sha256": sha256},
            "processor": describe_normalization(normalization),
            **self.describe(),
            "batch_size": batch_size,
        }

    def describe(self) -> dict[str, Any]:
        """What the results depend on besides model and data, as JSON values."""
        return {
            "norm": self.norm,
            "epsilons": [format_epsilon(epsilon) for epsilon in self.epsilons],
            **self.tier.describe(),
            "seed": self.seed,
            "versions": versions(),
        }


def robust_metrics(
    predictions: np.ndarray, labels: np.ndarray, epsilons: Sequence[Fraction], epsilon: Fraction
) -> dict[str, float]:
    """Accuracy, robust accuracy, expected robustness and the accuracy at each epsilon.

    Args:
        predictions (`np.ndarray` of shape `(examples, len(epsilons))`):
            Predicted label of each example at each epsilon.
        labels (`np.ndarray` of shape `(examples,)`):
            True labels.
        epsilons (`Sequence[Fraction]`):
            Increasing, starting at 0. If 0 is the only one, nothing was attacked and only the accuracy is returned.
        epsilon (`Fraction`):
            The epsilon of the grid where robust accuracy is measured.
    """
    # Defined once, in the `evaluate` module. Imported late: `evaluate` is slow to import and needed only here.
    from ..metrics.expected_robustness.expected_robustness import expected_robustness, still_correct

    accuracies = still_correct(predictions, labels).mean(axis=0).tolist()
    if len(epsilons) == 1:
        return {"accuracy": accuracies[0]}
    at_epsilon = dict(zip(epsilons, accuracies, strict=True))
    return {
        "accuracy": accuracies[0],
        "robust_accuracy": at_epsilon[epsilon],
        "expected_robustness": float(expected_robustness([float(epsilon) for epsilon in epsilons], accuracies)),
        **{f"accuracy_at_{format_epsilon(epsilon)}": accuracy for epsilon, accuracy in at_epsilon.items()},
    }
