"""Robust accuracy: share of examples that are right under attack, and right without it where that is known."""

import datasets
import evaluate
import numpy as np
from datasets.features.features import cast_to_python_objects
from scipy.stats import binomtest


_DESCRIPTION = """
Robust accuracy is the share of examples that an attack with one perturbation budget does not fool. With the clean
predictions, an example counts only if it is right on the clean image and under attack.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `int`): predicted label of each adversarial example.
    references (`list` of `int`): true labels.
    clean_predictions (`list` of `int`, *optional*): predicted label of each clean example.
    num_classes (`int`, *optional*): refuse labels of `num_classes` and above. By default any label >= 0 is accepted.

Returns:
    robust_accuracy (`float`): share of examples that are right under attack, in [0, 1]; with `clean_predictions`, only
        those that are right on the clean image, too.
    confidence_interval (`list` of 2 `float`): 95 % interval of robust_accuracy over examples (Clopper-Pearson).
    clean_accuracy (`float`): share of examples that are right on the clean image. Only with `clean_predictions`.
    attack_success_rate (`float`): share of the examples right on the clean image that the attack fooled; 0 if there
        are none. Only with `clean_predictions`.

Examples:

    >>> metric = evaluate.load("metrics/robust_accuracy")
    >>> results = metric.compute(predictions=[0, 0, 1, 1], references=[0, 1, 1, 1], clean_predictions=[0, 1, 1, 0])
    >>> results["robust_accuracy"], results["clean_accuracy"]
    (0.5, 0.75)
"""

_CITATION = """
@inproceedings{madry2018towards,
    title={Towards Deep Learning Models Resistant to Adversarial Attacks},
    author={Madry, Aleksander and Makelov, Aleksandar and Schmidt, Ludwig and Tsipras, Dimitris and Vladu, Adrian},
    booktitle={International Conference on Learning Representations},
    year={2018},
}
"""

# What labels look like with 0 and 1 axes, in words for error messages.
_SHAPES = ("one class index", "a list of class indices, one per example")


def robust_accuracy_summary(predictions, references, clean_predictions=None, *, num_classes=None) -> dict:
    """All values of the metric; arguments and keys as in `_KWARGS_DESCRIPTION`.

    Raises:
        ValueError: naming the argument that is missing, empty, of the wrong shape, type or range.
    """
    _check_num_classes(num_classes)
    columns = _as_examples(predictions, references, clean_predictions, num_classes)
    robust = columns["predictions"] == columns["references"]
    on_clean = {}
    if clean_predictions is not None:
        clean = columns["clean_predictions"] == columns["references"]
        on_clean["clean_accuracy"] = float(clean.mean())
        on_clean["attack_success_rate"] = float((clean & ~robust).sum() / max(clean.sum(), 1))
        robust &= clean
    # scipy's default is the exact interval at 95 %, as in the metric expected robustness.
    low, high = binomtest(int(robust.sum()), robust.size).proportion_ci()
    return {"robust_accuracy": float(robust.mean()), "confidence_interval": [float(low), float(high)], **on_clean}


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


def _as_examples(predictions, references, clean_predictions, num_classes: int | None = None) -> dict[str, np.ndarray]:
    """The columns that were given, each checked and of shape `(examples,)`."""
    given = {"references": references, "predictions": predictions}
    if clean_predictions is not None:
        given["clean_predictions"] = clean_predictions
    columns = {name: _as_labels(name, values, 1, num_classes) for name, values in given.items()}
    count = len(columns["references"])
    for name, labels in columns.items():
        if len(labels) != count:
            raise ValueError(f"`{name}` holds {len(labels)} examples, `references` {count}; give one label each.")
    return columns


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RobustAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {name: datasets.Value("int64") for name in ("predictions", "references", "clean_predictions")}
            ),
            reference_urls=["https://huggingface.co/papers/1706.06083"],
        )

    def add(self, *, prediction=None, reference=None, clean_prediction=None):
        """Adds one example: its predicted label under attack, its true label and its label on the clean image."""
        super().add(
            prediction=int(_as_labels("prediction", prediction, 0)),
            reference=int(_as_labels("reference", reference, 0)),
            clean_predictions=(
                None if clean_prediction is None else int(_as_labels("clean_prediction", clean_prediction, 0))
            ),
        )

    def add_batch(self, *, predictions=None, references=None, clean_predictions=None):
        """Adds a batch of examples: predicted labels under attack, true labels and labels on the clean images."""
        columns = _as_examples(predictions, references, clean_predictions)
        # `evaluate` has no optional columns: None stands for clean predictions that were not given.
        super().add_batch(**{"clean_predictions": [None] * len(columns["references"]), **columns})

    def compute(self, *, predictions=None, references=None, clean_predictions=None, num_classes=None):
        """Computes the metric from these examples and all that were added before."""
        # Checked first: when `_compute` raises, `evaluate` has already dropped the examples that were added.
        _check_num_classes(num_classes)
        if predictions is None and references is None and clean_predictions is None and len(self) == 0:
            raise ValueError("`predictions` and `references` are missing; pass them here or to `add_batch` before.")
        return super().compute(
            predictions=predictions,
            references=references,
            clean_predictions=clean_predictions,
            num_classes=num_classes,
        )

    def _compute(self, predictions, references, clean_predictions, num_classes=None):
        missing = sum(label is None for label in clean_predictions)
        if 0 < missing < len(clean_predictions):
            raise ValueError(
                f"`clean_predictions` was not given for {missing} of {len(clean_predictions)} examples; give it for "
                "all of them or for none."
            )
        return robust_accuracy_summary(
            predictions, references, None if missing else clean_predictions, num_classes=num_classes
        )
