"""Expected robustness: mean accuracy over all perturbation strengths up to the largest one evaluated."""

from fractions import Fraction

import datasets
import evaluate
import numpy as np
from datasets.features.features import cast_to_python_objects
from scipy.integrate import quad
from scipy.stats import beta


_DESCRIPTION = """
Expected robustness is the accuracy under attack averaged over perturbation strengths epsilon from 0 to the largest
one: the area under the accuracy-versus-epsilon curve, divided by the largest epsilon (trapezoidal rule).
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `list` of `int`): for each example, one predicted label per epsilon.
    references (`list` of `int`): true labels.
    epsilons (`list` of `float` or `str`): perturbation strengths, strictly increasing, the first 0. Text such as
        "8/255" or "0.03" is read as the number it spells.
    weight (`Callable[[float], float]`, *optional*): how much each epsilon counts: a density >= 0, which need not be
        normalised. By default all epsilons count the same.
    num_classes (`int`, *optional*): refuse labels of `num_classes` and above. By default any label >= 0 is accepted.

Returns:
    expected_robustness (`float`): mean of the accuracy curve, linear between the epsilons, in [0, 1].
    clean_accuracy (`float`): accuracy at epsilon 0.
    robust_accuracy (`float`): accuracy at the largest epsilon.
    accuracies (`list` of `float`): accuracy at each epsilon. An example counts only if it is right there and at every
        smaller epsilon.
    lower_bound, upper_bound (`float`): what any curve that falls between the grid points can average to.
    confidence_interval (`list` of 2 `float`): 95 % interval of expected_robustness over examples (Clopper-Pearson).

Examples:

    >>> metric = evaluate.load("metrics/expected_robustness")
    >>> results = metric.compute(
    ...     predictions=[[0, 0, 0], [1, 1, 0], [1, 0, 0], [2, 2, 2]], references=[0, 1, 1, 0], epsilons=[0, 0.01, 0.02]
    ... )
    >>> results["expected_robustness"], results["accuracies"]
    (0.5, [0.75, 0.5, 0.25])
"""

_CITATION = """
@inproceedings{ngnawe2026robust,
    title={Robust Fine-Tuning from Non-Robust Pretrained Models: Mitigating Suboptimal Transfer With
           Epsilon-Scheduling},
    author={Ngnaw\\'e, Jonas and Heuillet, Maxime and Sahoo, Sabyasachi and Pequignot, Yann and Ahmad, Ola and
            Durand, Audrey and Precioso, Fr\\'ed\\'eric and Gagn\\'e, Christian},
    booktitle={International Conference on Learning Representations},
    year={2026},
}
"""

# What labels look like with 0, 1 and 2 axes, in words for error messages.
_SHAPES = ("one class index", "a list of class indices", "one list of class indices per example, one per epsilon")


def expected_robustness(epsilons, accuracies, weight=None):
    """Mean of the accuracy curve over epsilon in [0, largest epsilon]; linear between the grid points.

    Without a weight this is the area by the trapezoidal rule, divided by the largest epsilon; with one it is the
    integral of weight times curve, divided by that of the weight. For epsilon 0 alone it is the accuracy there.

    Args:
        epsilons: perturbation strengths, shape `(points,)`, strictly increasing from 0.
        accuracies: shape `(..., points)`. With one row per example (1 where it is still right) the result is that
            example's share; with percentages it is a percentage.
        weight: density >= 0 of epsilon, not necessarily normalised. None: uniform.

    Returns:
        Shape `(...)`, a scalar for one curve.

    Raises:
        ValueError: naming `epsilons`, `accuracies` or `weight`.
    """
    masses, left, right = _intervals(epsilons, accuracies, weight)
    lower, upper = _mean(masses, right), _mean(masses, left)
    if weight is None:
        return (lower + upper) / 2
    late = _integrate(weight, _as_grid(epsilons), times_progress=True)
    # Where the curve is linear, the step function of the left ends is too high by progress times the interval's drop.
    return upper - (late * (left - right)).sum(axis=-1) / masses.sum()


def bracket(epsilons, accuracies, weight=None) -> tuple[float, float]:
    """Smallest and largest mean of a non-increasing curve through these points: its two step functions."""
    masses, left, right = _intervals(epsilons, accuracies, weight)
    return float(_mean(masses, right)), float(_mean(masses, left))


def confidence_interval(mean: float, examples: int, level: float = 0.95) -> tuple[float, float]:
    """Interval (95 %) for the true mean of a quantity in [0, 1], from its mean over independent examples.

    The exact binomial interval (Clopper-Pearson), with `examples * mean` successes, which need not be whole. With
    mean p, nothing in [0, 1] varies more than a coin that shows 1 with probability p, so the interval is too wide if
    anything for examples that are neither 0 nor 1.
    """
    successes, failures = mean * examples, examples - mean * examples
    tail = (1 - level) / 2
    low = beta.ppf(tail, successes, failures + 1) if successes > 0 else 0.0
    high = beta.ppf(1 - tail, successes + 1, failures) if failures > 0 else 1.0
    return float(low), float(high)


def interval_masses(epsilons, weight=None) -> np.ndarray:
    """How much each interval between neighbouring epsilons counts, shape `(points - 1,)`; not normalised.

    The integral of `weight` over the interval; without a weight, the interval's width. The quadrature is adaptive:
    accurate for a weight with jumps or an integrable pole, but blind to a peak far narrower than the interval.

    Raises:
        ValueError: if `epsilons` is not a grid; if `weight` is negative or not finite where it is evaluated, cannot
            be integrated, or is 0 throughout.
    """
    epsilons = _as_grid(epsilons)
    if weight is None:
        return np.diff(epsilons)
    if not callable(weight):
        raise ValueError(f"`weight={weight!r}` must be a function of epsilon, for example `lambda epsilon: epsilon`.")

    masses = _integrate(weight, epsilons)
    if len(masses) > 0 and not 0 < masses.sum() < np.inf:
        raise ValueError(
            f"`weight` integrates to {masses.sum():g} over [0, {epsilons[-1]:g}]; its integral must be positive and "
            "finite."
        )
    return masses


def mean_breaking_share(distances, largest) -> float:
    """Expected robustness from each example's smallest perturbation that fools the model: mean of min(d, E) / E.

    An example is right below its distance and wrong from there on, so it is right on the share min(d, E) / E of
    [0, E]. The distances that an attack finds are upper bounds, and so is the result.

    Args:
        distances: shape `(examples,)`, each in [0, inf]; inf if no perturbation is known that fools the model.
        largest: the largest epsilon E, finite and > 0, in the unit of the distances.

    Raises:
        ValueError: naming `distances` or `largest`.
    """
    values = _as_numbers("distances", distances)
    if values.ndim != 1 or values.size == 0 or not np.all(values >= 0):
        raise ValueError(f"`distances={distances}` must be a list of at least one number in [0, inf].")
    bound = _as_numbers("largest", largest)
    if bound.ndim != 0 or not 0 < bound < np.inf:
        raise ValueError(f"`largest={largest}` must be one finite number > 0, for example 8 / 255.")
    return float((np.minimum(values, bound) / bound).mean())


def still_correct(predictions, references) -> np.ndarray:
    """Whether each example is right at each epsilon and at all smaller ones; shape `(examples, epsilons)`."""
    correct = np.asarray(predictions) == np.asarray(references)[:, None]
    return np.logical_and.accumulate(correct, axis=1)


def robustness_summary(predictions, references, epsilons, *, weight=None, num_classes=None) -> dict:
    """All values of the metric, as Python floats or lists of them; arguments and keys as in `_KWARGS_DESCRIPTION`.

    Raises:
        ValueError: naming the argument that is missing, empty, of the wrong shape, type or range.
    """
    epsilons = _as_grid(epsilons)
    _check_num_classes(num_classes)
    predictions, references = _as_examples(predictions, references, num_classes)
    if predictions.shape[1] != len(epsilons):
        raise ValueError(
            f"`epsilons` has {len(epsilons)} values, but every example has {predictions.shape[1]} predictions."
        )
    correct = still_correct(predictions, references)
    accuracies = correct.mean(axis=0)
    lower_bound, upper_bound = bracket(epsilons, accuracies, weight)
    mean = float(expected_robustness(epsilons, correct, weight).mean())
    return {
        "expected_robustness": mean,
        "clean_accuracy": float(accuracies[0]),
        "robust_accuracy": float(accuracies[-1]),
        "accuracies": accuracies.tolist(),
        "lower_bound": lower_bound,
        "upper_bound": upper_bound,
        "confidence_interval": list(confidence_interval(mean, len(correct))),
    }


def _intervals(epsilons, accuracies, weight) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mass of each interval between neighbouring epsilons, and the accuracies at its left and at its right end."""
    masses = interval_masses(epsilons, weight)
    accuracies = _as_numbers("accuracies", accuracies)
    if accuracies.ndim == 0 or accuracies.shape[-1] != len(masses) + 1 or not np.all(np.isfinite(accuracies)):
        raise ValueError(
            f"`accuracies` must hold one finite number per epsilon, {len(masses) + 1} along its last axis; got shape "
            f"{accuracies.shape}."
        )
    if len(masses) == 0:  # epsilon 0 alone: all the mass is there
        return np.ones(1), accuracies, accuracies
    return masses, accuracies[..., :-1], accuracies[..., 1:]


def _mean(masses, values) -> np.ndarray:
    # Divided last, by a sum over the same terms, so that an accuracy of 1 throughout gives exactly 1.
    return (masses * values).sum(axis=-1) / masses.sum()


def _integrate(weight, epsilons: np.ndarray, times_progress: bool = False) -> np.ndarray:
    """Integral of `weight` over each interval; with `times_progress`, of weight times the progress (0 to 1) in it."""
    integrals = np.empty(len(epsilons) - 1)
    for i, (start, end) in enumerate(zip(epsilons[:-1], epsilons[1:], strict=True)):

        def integrand(epsilon: float, start=start, width=end - start) -> float:
            return _density(weight, epsilon) * ((epsilon - start) / width if times_progress else 1)

        # The tolerance is relative to the mass alone, so that the unit of the weight cannot change the result.
        integrals[i], _, _, *problem = quad(integrand, start, end, epsabs=0, epsrel=1e-6, limit=1000, full_output=True)
        if problem:
            raise ValueError(f"`weight` cannot be integrated over [{start:g}, {end:g}]; pass a smoother density.")
    return integrals


def _density(weight, epsilon: float) -> float:
    value = weight(epsilon)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not 0 <= number < np.inf:
        raise ValueError(f"`weight` returned {value!r} at epsilon {epsilon:g}; it must be a finite number >= 0.")
    return number


def _as_numbers(name: str, values) -> np.ndarray:
    """`values` as an array of floats. Text is refused."""
    try:
        numbers = np.asarray(cast_to_python_objects(values))
        if numbers.dtype.kind not in "biufO":
            raise TypeError(f"dtype {numbers.dtype}")
        return numbers.astype(float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}={values}` must be numbers, for example 8 / 255.") from error


def _as_epsilon(value):
    """Text such as "8/255", "0.03" or "0.5/255" as a number; anything else unchanged."""
    if not isinstance(value, str):
        return value
    try:
        numerator, denominator = value.split("/") if "/" in value else (value, 1)
        return float(Fraction(numerator) / Fraction(denominator))
    except (ValueError, ArithmeticError) as error:
        raise ValueError(
            f"`epsilons` must be numbers or fractions such as 8 / 255 or '8/255'; got {value.strip()!r}."
        ) from error


def _as_grid(epsilons) -> np.ndarray:
    values = cast_to_python_objects(epsilons)
    values = values.tolist() if isinstance(values, np.ndarray) else values
    values = [_as_epsilon(value) for value in values] if isinstance(values, list | tuple) else _as_epsilon(values)
    grid = _as_numbers("epsilons", values)
    if grid.ndim != 1:
        raise ValueError(f"`epsilons={epsilons}` must be a list of numbers, one per column of `predictions`.")
    if grid.size == 0 or not np.all(np.isfinite(grid)) or grid[0] != 0 or np.any(np.diff(grid) <= 0):
        raise ValueError(
            f"`epsilons={grid.tolist()}` must start with 0 and increase strictly, all of them finite; the predictions "
            "at epsilon 0 are those for the clean images."
        )
    return grid


def _check_num_classes(num_classes) -> None:
    if num_classes is not None and not (isinstance(num_classes, int | np.integer) and num_classes >= 1):
        raise ValueError(f"`num_classes={num_classes!r}` must be an integer >= 1; leave it out to allow any label.")


def _as_labels(name: str, values, ndim: int, num_classes: int | None = None) -> np.ndarray:
    """Class indices as an integer array with `ndim` axes. (`evaluate` itself would turn 0.7 and True into 0 and 1.)"""
    if values is None:
        raise ValueError(f"`{name}` is missing; pass {_SHAPES[ndim]}.")
    try:
        # `evaluate` uses this, too: it takes tensors of any framework and device.
        labels = np.asarray(cast_to_python_objects(values))
    except ValueError as error:
        raise ValueError(f"`{name}` must be {_SHAPES[ndim]}; got rows of different lengths.") from error
    if labels.size == 0:
        raise ValueError(f"`{name}` is empty; pass {_SHAPES[ndim]}, for at least one example.")
    if labels.ndim != ndim:
        raise ValueError(f"`{name}` must be {_SHAPES[ndim]}; got an array of shape {labels.shape}.")
    if labels.dtype.kind not in "iu":
        raise ValueError(
            f"`{name}` must hold class indices of an integer type, got {labels.dtype}; pass labels such as "
            "`logits.argmax(-1)`, not probabilities or whether a prediction is right."
        )
    if labels.min() < 0:
        raise ValueError(f"`{name}` holds the label {labels.min()}; class indices are >= 0. Leave such examples out.")
    if num_classes is not None and labels.max() >= num_classes:
        raise ValueError(f"`{name}` holds the label {labels.max()}, which is not below `num_classes={num_classes}`.")
    return labels


def _as_examples(predictions, references, num_classes: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    references = _as_labels("references", references, 1, num_classes)
    predictions = _as_labels("predictions", predictions, 2, num_classes)
    if len(predictions) != len(references):
        raise ValueError(
            f"`predictions` holds {len(predictions)} examples, `references` {len(references)}; give one label each."
        )
    return predictions, references


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ExpectedRobustness(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://huggingface.co/papers/2509.23325"],
        )

    def add(self, *, prediction=None, reference=None):
        """Adds one example: one predicted label per epsilon, and the true label."""
        super().add(
            prediction=_as_labels("prediction", prediction, 1), reference=int(_as_labels("reference", reference, 0))
        )

    def add_batch(self, *, predictions=None, references=None):
        """Adds a batch of examples: for each, one predicted label per epsilon, and the true label."""
        predictions, references = _as_examples(predictions, references)
        super().add_batch(predictions=predictions, references=references)

    def compute(self, *, predictions=None, references=None, epsilons=None, weight=None, num_classes=None):
        """Computes the metric from these examples and all that were added before."""
        # Checked first: when `_compute` raises, `evaluate` has already dropped the examples that were added.
        interval_masses(epsilons, weight)
        _check_num_classes(num_classes)
        if predictions is None and references is None and len(self) == 0:
            raise ValueError("`predictions` and `references` are missing; pass them here or to `add_batch` before.")
        return super().compute(
            predictions=predictions, references=references, epsilons=epsilons, weight=weight, num_classes=num_classes
        )

    def _compute(self, predictions, references, epsilons, weight=None, num_classes=None):
        return robustness_summary(predictions, references, epsilons, weight=weight, num_classes=num_classes)
