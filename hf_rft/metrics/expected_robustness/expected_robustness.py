"""Expected robustness: mean accuracy over all perturbation strengths up to the largest one evaluated."""

import datasets
import evaluate
import numpy as np
from scipy.stats import bootstrap


_DESCRIPTION = """
Expected robustness is the accuracy under attack averaged over perturbation strengths epsilon from 0 to the largest
one: the area under the accuracy-versus-epsilon curve, divided by the largest epsilon (trapezoidal rule).
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `list` of `int`): for each example, one predicted label per epsilon.
    references (`list` of `int`): true labels.
    epsilons (`list` of `float`): perturbation strengths, strictly increasing, the first 0.

Returns:
    expected_robustness (`float`): trapezoidal mean of the accuracies, in [0, 1].
    clean_accuracy (`float`): accuracy at epsilon 0.
    robust_accuracy (`float`): accuracy at the largest epsilon.
    accuracies (`list` of `float`): accuracy at each epsilon. An example counts only if it is right there and at every
        smaller epsilon.
    lower_bound, upper_bound (`float`): what any curve that falls between the grid points can average to.
    confidence_interval (`list` of 2 `float`): 95 % bootstrap interval of expected_robustness over examples.

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


def expected_robustness(epsilons, accuracies):
    """Area under the accuracy curve over the largest epsilon, by the trapezoidal rule.

    The last axis of `accuracies` runs over `epsilons`; with one row per example (1 where it is still right) the result
    is that example's share.
    """
    epsilons = np.asarray(epsilons, dtype=float)
    if len(epsilons) == 1:
        return np.asarray(accuracies, dtype=float)[..., 0]
    return np.trapezoid(np.asarray(accuracies, dtype=float), epsilons, axis=-1) / epsilons[-1]


def bracket(epsilons, accuracies) -> tuple[float, float]:
    """Smallest and largest mean of a non-increasing curve through these points: its two step functions."""
    epsilons, accuracies = np.asarray(epsilons, dtype=float), np.asarray(accuracies, dtype=float)
    if len(epsilons) == 1:
        return float(accuracies[0]), float(accuracies[0])
    widths = np.diff(epsilons) / epsilons[-1]
    return float(widths @ accuracies[1:]), float(widths @ accuracies[:-1])


def still_correct(predictions, references) -> np.ndarray:
    """Whether each example is right at each epsilon and at all smaller ones; shape `(examples, epsilons)`."""
    correct = np.asarray(predictions) == np.asarray(references)[:, None]
    return np.logical_and.accumulate(correct, axis=1)


def _check(predictions, references, epsilons) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The inputs as arrays, or an error that names the one at fault."""
    if len(references) == 0:
        raise ValueError("`references` is empty; expected robustness needs at least one example.")
    lengths = {np.size(row) for row in predictions}
    if len(predictions) != len(references) or len(lengths) > 1 or any(np.ndim(row) != 1 for row in predictions):
        raise ValueError(
            "`predictions` must hold one list of predicted labels per example, one label per epsilon; got "
            f"{len(predictions)} entries of lengths {sorted(lengths)} for {len(references)} references."
        )
    try:
        epsilons = np.asarray(epsilons, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`epsilons={epsilons}` must be numbers, for example 8 / 255.") from error
    if epsilons.ndim != 1 or lengths != {epsilons.size}:
        raise ValueError(f"`epsilons` has {epsilons.size} values, but every example has {lengths.pop()} predictions.")
    if epsilons.size == 0 or not np.all(np.isfinite(epsilons)) or epsilons[0] != 0 or np.any(np.diff(epsilons) <= 0):
        raise ValueError(f"`epsilons={epsilons.tolist()}` must start with 0 and increase strictly.")
    return np.asarray(predictions), np.asarray(references), epsilons


def robustness_summary(predictions, references, epsilons, *, seed: int = 0) -> dict:
    """All values of the metric, from predictions of shape `(examples, epsilons)`."""
    predictions, references, epsilons = _check(predictions, references, epsilons)
    correct = still_correct(predictions, references)
    accuracies = correct.mean(axis=0)
    lower_bound, upper_bound = bracket(epsilons, accuracies)
    shares = expected_robustness(epsilons, correct)
    mean = float(shares.mean())
    interval = (mean, mean)
    if len(shares) > 1 and np.ptp(shares) > 0:
        interval = bootstrap(
            (shares,), np.mean, method="percentile", n_resamples=2000, batch=100, rng=seed
        ).confidence_interval
    return {
        "expected_robustness": mean,
        "clean_accuracy": float(accuracies[0]),
        "robust_accuracy": float(accuracies[-1]),
        "accuracies": accuracies.tolist(),
        "lower_bound": lower_bound,
        "upper_bound": upper_bound,
        "confidence_interval": [float(bound) for bound in interval],
    }


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

    def _compute(self, predictions, references, epsilons):
        return robustness_summary(predictions, references, epsilons)
