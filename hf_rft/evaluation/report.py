"""The result of an evaluation: where each example breaks, and all the numbers derived from that."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..attacks.base import Passes
from ..threat_model import NORM_NAMES, format_epsilon, parse_epsilon
from ..utils.files import write_text
from ..utils.values import SHARE
from .margins import margin_correlation, margin_threshold
from .schema import from_values, to_values
from .tables import class_rows, to_pandas, to_text


if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


# A class with fewer examples is not called the worst.
LEAST_OF_A_CLASS = 5


class AdversarialExamples(NamedTuple):
    """A few of the broken examples, for viewing."""

    positions: list[int]  # in the dataset
    pixels: torch.Tensor  # (count, channels, height, width), in [0, 1]
    adversarial: torch.Tensor  # same shape: the nearest adversarial examples found
    logits: torch.Tensor  # (count, classes), for the clean images
    adversarial_logits: torch.Tensor  # (count, classes), for the adversarial images
    names: Mapping[int, str] = {}  # of the classes, as far as the model knows them

    def __repr__(self) -> str:
        return f"AdversarialExamples(positions={self.positions}, images of shape {tuple(self.pixels.shape[1:])})"


@dataclass(frozen=True)
class ExternalEvaluation:
    """The robust accuracy that somebody else found, or an attack made for this model.

    Args:
        epsilon (`str`, number or `Fraction`):
            In the report's norm.
        robust_accuracy (`float`):
            From 0 to 1.
        attack (`str`), source (`str`):
            In words; an address, or where it was published.

    Raises:
        ValueError: for another value.
    """

    epsilon: Fraction
    robust_accuracy: float
    attack: str
    source: str

    def __post_init__(self):
        object.__setattr__(self, "epsilon", parse_epsilon(self.epsilon))
        if self.robust_accuracy not in SHARE:
            raise ValueError(f"`robust_accuracy={self.robust_accuracy!r}` must be {SHARE}.")
        if not (isinstance(self.attack, str) and isinstance(self.source, str)):
            raise ValueError(f"`attack={self.attack!r}` and `source={self.source!r}` must be text.")


class Profile(NamedTuple):
    """What a model withstands besides the threat model it was evaluated for; see profile.py."""

    norms: "dict[str, RobustnessReport]"  # by norm, at comparable radii, on the same examples
    corruptions: dict[str, list[int]]  # by kind: number of examples classified correctly at severity 1, 2, ...


@dataclass(eq=False)
class RobustnessReport:
    """How robust a classifier is: the result of [`evaluate_robustness`].

    Args:
        norm (`str`):
            A name in `NORMS`.
        epsilons (`list[Fraction]`):
            The grid: increasing, starting at 0.
        labels, clean_predictions, adversarial_predictions (`np.ndarray` of shape `(examples,)`):
            Classes; the adversarial prediction equals the label if no adversarial example was found.
        broken_at (`np.ndarray` of shape `(examples,)`):
            Index of the smallest epsilon that breaks the example, `len(epsilons)` if none does.
        distances (`np.ndarray` of shape `(examples,)`):
            Size of the smallest fooling perturbation found: 0 if the model errs on the clean image, inf if none found.
        flags (`dict[str, str]`, or None):
            Failed trust checks: name -> suspicion and remedy. Empty if all passed, None if none were made.
        passes ([`Passes`]):
            Forward and backward passes spent, summed over examples, including the checks.
        settings (`dict`):
            Everything the numbers depend on, as JSON values: model, data, tier, attacks, seed, versions.
        margins (`np.ndarray` of shape `(examples,)`, *optional*):
            Largest clean logit minus the second largest; None in reports of older versions.
        profile ([`Profile`], *optional*):
            What the model withstands besides this threat model.
        external (`list[ExternalEvaluation]`, *optional*):
            What cards and leaderboards state in place of the accuracies here, wherever it is lower.
        examples ([`AdversarialExamples`], *optional*):
            Not saved.
    """

    norm: str
    epsilons: list[Fraction]
    labels: np.ndarray
    clean_predictions: np.ndarray
    adversarial_predictions: np.ndarray
    broken_at: np.ndarray
    distances: np.ndarray
    flags: dict[str, str] | None
    passes: Passes
    settings: dict[str, Any]
    margins: np.ndarray | None = None
    profile: Profile | None = None
    external: list[ExternalEvaluation] = field(default_factory=list)
    examples: AdversarialExamples | None = field(default=None, repr=False)

    @classmethod
    def from_predictions(
        cls,
        predictions: np.ndarray,
        labels: np.ndarray,
        distances: np.ndarray,
        *,
        norm: str,
        epsilons: list[Fraction],
        passes: Passes,
        settings: dict[str, Any],
        margins: np.ndarray | None = None,
    ) -> "RobustnessReport":
        """A report without trust checks, from the class predicted for each example at each epsilon."""
        is_right = np.cumprod(predictions == labels[:, None], axis=1)
        return cls(
            norm=norm,
            epsilons=list(epsilons),
            labels=labels,
            clean_predictions=predictions[:, 0],
            adversarial_predictions=predictions[:, -1],
            broken_at=is_right.sum(axis=1),
            distances=distances.astype(float),
            flags=None,
            passes=passes,
            settings=settings,
            margins=margins,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        numbers = ("clean_accuracy", "robust_accuracy", "expected_robustness")
        shares = ", ".join(f"{name.replace('_', ' ')} {100 * getattr(self, name):.1f} %" for name in numbers)
        flags = f", flags {', '.join(self.flags)}" if self.flags else ""
        return (
            f"RobustnessReport({len(self)} examples, {self.norm} up to {format_epsilon(self.epsilons[-1])}, "
            f"tier {self.settings.get('tier')}: {shares}{flags})"
        )

    # --- Numbers ---

    def summary(self, weight: Callable[[float], float] | None = None) -> dict[str, Any]:
        """The result of the `evaluate` module `expected_robustness` for these examples.

        Args:
            weight (`Callable[[float], float]`, *optional*):
                Density of epsilon, not necessarily normalised, to weight some strengths more than others in the mean.
                Uniform by default.
        """
        # Defined once, in that module. Imported late: `evaluate` is slow to import and needed only here.
        from ..metrics.expected_robustness.expected_robustness import robustness_summary

        grid = [float(epsilon) for epsilon in self.epsilons]
        return robustness_summary(self._is_right.astype(int), np.ones(len(self), dtype=int), grid, weight=weight)

    @property
    def predictions(self) -> np.ndarray:
        """Class predicted for each example at each epsilon, shape `(examples, epsilons)`."""
        predictions = np.where(self._is_right, self.labels[:, None], self.adversarial_predictions[:, None])
        predictions[:, 0] = self.clean_predictions
        return predictions

    @property
    def _is_right(self) -> np.ndarray:
        """Whether each example withstands each epsilon, shape `(examples, epsilons)`."""
        return self.broken_at[:, None] > np.arange(len(self.epsilons))

    @functools.cached_property
    def _summary(self) -> dict[str, Any]:
        return self.summary()

    @property
    def accuracies(self) -> list[float]:
        """Accuracy at each epsilon; never increases."""
        return self._summary["accuracies"]

    @property
    def clean_accuracy(self) -> float:
        return self._summary["clean_accuracy"]

    @property
    def robust_accuracy(self) -> float:
        """Accuracy at the largest epsilon."""
        return self._summary["robust_accuracy"]

    @property
    def expected_robustness(self) -> float:
        """Mean accuracy over epsilon from 0 to the largest, by the trapezoidal rule, as in the paper."""
        return self._summary["expected_robustness"]

    @property
    def bracket(self) -> tuple[float, float]:
        """Lower and upper bound on the mean of any curve through these accuracies."""
        return self._summary["lower_bound"], self._summary["upper_bound"]

    @property
    def confidence_interval(self) -> tuple[float, float]:
        """95 % interval of the expected robustness over examples (Clopper-Pearson on the mean)."""
        low, high = self._summary["confidence_interval"]
        return low, high

    @property
    def expected_robustness_from_distances(self) -> float:
        """The per-example form: the mean of min(distance, E) / E. It needs no grid, but trusts the distances found."""
        from ..metrics.expected_robustness.expected_robustness import mean_breaking_share

        return mean_breaking_share(self.distances, float(self.epsilons[-1]))

    @property
    def accuracy_intervals(self) -> list[tuple[float, float]]:
        """95 % interval of the accuracy at each epsilon over examples (Clopper-Pearson)."""
        from ..metrics.expected_robustness.expected_robustness import confidence_interval

        return [confidence_interval(accuracy, len(self)) for accuracy in self.accuracies]

    @property
    def per_example(self) -> list[Fraction | None]:
        """The smallest epsilon of the grid that breaks each example: 0 if misclassified clean, None if none does."""
        return [self.epsilons[index] if index < len(self.epsilons) else None for index in self.broken_at]

    def up_to(self, epsilon: Fraction) -> "RobustnessReport":
        """The report that this grid, cut off at `epsilon`, would have given.

        Raises:
            ValueError: if `epsilon` is not in the grid, or is 0.
        """
        grid = [format_epsilon(known) for known in self.epsilons]
        if epsilon not in self.epsilons[1:]:
            raise ValueError(
                f"The model was not evaluated at epsilon {format_epsilon(epsilon)}, only at {', '.join(grid)}."
            )
        count = self.epsilons.index(epsilon) + 1
        is_beyond = self.broken_at >= count
        return replace(
            self,
            epsilons=self.epsilons[:count],
            broken_at=np.minimum(self.broken_at, count),
            adversarial_predictions=np.where(is_beyond, self.labels, self.adversarial_predictions),
            distances=np.where(is_beyond, np.inf, self.distances),
            settings={**self.settings, "epsilons": grid[:count]},
            profile=None,  # its radii belong to the whole grid
            external=[found for found in self.external if found.epsilon <= epsilon],
            examples=None,
        )

    @property
    def claimed_accuracies(self) -> list[float]:
        """The accuracy at each epsilon, or what an external evaluation at this or a smaller epsilon found, if less."""
        return [
            min([ours, *(found.robust_accuracy for found in self.external if found.epsilon <= epsilon)])
            for epsilon, ours in zip(self.epsilons, self.accuracies, strict=True)
        ]

    @property
    def claimed_expected_robustness(self) -> float:
        """The mean over epsilon of the `claimed_accuracies`."""
        from ..metrics.expected_robustness.expected_robustness import expected_robustness

        return float(expected_robustness([float(epsilon) for epsilon in self.epsilons], self.claimed_accuracies))

    @property
    def worst_class(self) -> dict[str, Any] | None:
        """The row of `to_pandas("class")` with the lowest robust accuracy, of classes with at least five examples."""
        rows = [row for row in class_rows(self) if row["count"] >= LEAST_OF_A_CLASS]
        # Of classes with the same accuracy, the one that is known best.
        return min(rows, key=lambda row: (row["robust_accuracy"], row["high"])) if len(rows) > 1 else None

    # --- Beyond the threat model ---

    @property
    def union_accuracy(self) -> float | None:
        """Share of the examples that withstand the largest epsilon of every norm of the profile, this one included."""
        if self.profile is None:
            return None
        reports = [self, *self.profile.norms.values()]
        return float(np.all([report._is_right[:, -1] for report in reports], axis=0).mean())

    @property
    def corruption_accuracy(self) -> float | None:
        """Mean accuracy over kinds and severities of common corruptions."""
        return None if self.profile is None else float(np.mean([*self.profile.corruptions.values()]) / len(self))

    @property
    def corruption_drop(self) -> float | None:
        """Share of the clean accuracy that corruptions cost, on average."""
        if self.corruption_accuracy is None or self.clean_accuracy == 0:
            return None
        return 1 - self.corruption_accuracy / self.clean_accuracy

    @property
    def profile_flags(self) -> dict[str, str]:
        """The failed trust checks of the profile's norms."""
        norms = self.profile.norms if self.profile else {}
        failed = [(norm, flag) for norm, other in norms.items() for flag in (other.flags or {}).items()]
        return {f"{name} ({NORM_NAMES[norm]})": message for norm, (name, message) in failed}

    # --- Which predictions are brittle? ---

    @property
    def margin_correlation(self) -> float:
        """How well the clean margin ranks the examples by distance: Kendall's rank correlation, from -1 to 1.

        Over the examples that are classified correctly; those that no attack broke count as equally far away. NaN if
        the report holds no margins, or all distances or margins are the same.
        """
        return margin_correlation(self.margins, self.distances)

    def margin_threshold(self, recall: float = 0.9) -> float:
        """The clean margin below which lie this share of the correct but brittle predictions, for [`brittle`].

        Brittle means: broken by an attack within the largest epsilon.

        Raises:
            ValueError: if the report holds no margins or no brittle prediction, or `recall` is not a share.
        """
        is_brittle = (self.broken_at > 0) & (self.broken_at < len(self.epsilons))
        return margin_threshold(self.margins, is_brittle, recall)

    # --- Files and tables ---

    def to_pandas(self, per: str = "example") -> "pandas.DataFrame":
        """The results as a table.

        Args:
            per (`str`, *optional*, defaults to `"example"`):
                `"example"`: one row per example, in the order of the dataset, with `label`, `correct_clean`,
                `broken_at` (the smallest epsilon that breaks it, inf if none does), `distance` and `margin` (see the
                class) and the predicted class `prediction_at_<epsilon>` for each epsilon. `"class"`: one row per
                class, with its `name` (its number if none is known), `count`, `clean_accuracy`, `robust_accuracy` (at
                the largest epsilon) and bounds `low` and `high` of all classes at once (95 %, Bonferroni).
                `"epsilon"`: one row per epsilon, with `epsilon` as a number and as `written`, `accuracy`, the bounds
                `low` and `high` of its 95 % interval, and `num_robust`, the number of examples that withstand it.

        Raises:
            ValueError: for another `per`.
        """
        return to_pandas(self, per)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images, as JSON values; epsilons as exact text."""
        return to_values(self)

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "RobustnessReport":
        """Read a file written by `save`. Numbers are recomputed from the examples, not taken from the file.

        Raises:
            ValueError: if the file is not a complete report, or has another schema version.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not a robustness report ({type(error).__name__}: {error}).") from error
        return from_values(values, str(path))

    def plot(self, path: str | Path | None = None, title: str | None = None) -> "Figure":
        """Plot accuracy over epsilon, with intervals; also to `path`, whose suffix sets the format."""
        from .plots import plot_report

        return plot_report(self, path, title)

    def plot_profile(self, path: str | Path | None = None, title: str | None = None) -> "Figure":
        """Plot the profile: the curve of each norm, and a heat map of corruptions; also to `path`."""
        from .plots import plot_profile

        return plot_profile(self, path, title)

    def gallery(self, path: str | Path | None = None, names: Mapping[int, str] | None = None) -> "Figure":
        """Plot clean images, perturbations and adversarial images, a few of each; also to `path`.

        `names` are those of the classes, by number; they default to `id2label` of the model that was evaluated.

        Raises:
            ValueError: if the report holds no images: no attack succeeded, or it was read from a file.
        """
        from .plots import plot_adversarial_examples

        if self.examples is None:
            raise ValueError(
                "The report holds no adversarial examples: no attack succeeded, or the report was read from a file. "
                "Call `gallery` on what `evaluate_robustness` returned."
            )
        return plot_adversarial_examples(self.examples, self.labels.tolist(), names or self.examples.names, path)

    def table(self) -> str:
        """The curve, expected robustness and flags as text for printing."""
        return to_text(self)
