"""Checks of what a user hands over, before anything is computed from it."""

import inspect
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
from transformers import Trainer
from transformers.utils import logging

from ..attacks.base import takes
from ..data.augmentation import SeededAugmentation
from ..data.labels import LABEL_COLUMNS, check_class_order
from ..losses import LOSSES, RobustLoss
from ..models.classifier import check_labels
from .distributed import check_parallelism


logger = logging.get_logger(__name__)


def check_setup(trainer: Trainer) -> None:
    """Refuse a model, processor or parallelism with which robust training would be wrong.

    Raises:
        ValueError: naming the argument, what was found, and the remedy.
    """
    if trainer.processing_class is None:
        raise ValueError(
            "`processing_class` is None; pass the model's image processor, "
            "`AutoImageProcessor.from_pretrained(...)`: perturbations are measured in its pixels."
        )
    config = getattr(trainer.model, "config", None)
    num_labels, problem_type = getattr(config, "num_labels", None), getattr(config, "problem_type", None)
    if num_labels is None or num_labels < 2 or problem_type not in (None, "single_label_classification"):
        raise ValueError(
            "`model` must be an image classifier with a `config` of at least 2 classes, one of which is right; got "
            f"{type(trainer.model).__name__} with num_labels={num_labels} and problem_type={problem_type!r}. Load a "
            "timm model by `AutoModelForImageClassification`, and wrap a module of your own: "
            "`hf_rft.ModuleForImageClassification(module, class_names=[...])`."
        )
    for name in ("train_dataset", "eval_dataset"):
        dataset = getattr(trainer, name)
        for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
            part = part.dataset if isinstance(part, SeededAugmentation) else part
            if isinstance(part, datasets.Dataset):
                for column in LABEL_COLUMNS:
                    class_names = getattr(part.features.get(column), "names", None)
                    check_class_order(f"`{name}`", class_names, config)
    if trainer.compute_loss_func is not None:
        raise ValueError("`compute_loss_func` would replace the robust loss; pass `robust_loss` instead.")
    check_parallelism(trainer)
    for name in ("train_dataset", "eval_dataset"):
        check_dataset(name, getattr(trainer, name), num_labels)


def check_loss(robust_loss: RobustLoss, args: Any, attack: Callable | None) -> None:
    """Refuse a loss of another signature, a weight that it does not have, and an attack that cannot serve it."""
    for name, function in (("robust_loss", robust_loss.function), ("attack", attack)):
        if function is not None and not callable(function):
            raise ValueError(
                f"`{name}={function!r}` is no function; pass one, or name a built-in one with "
                f"`RobustTrainingArguments({name}=...)`."
            )
    _check_loss_signature(robust_loss.function)
    weight = args.robust_loss_weight
    if weight is not None and robust_loss in LOSSES.values() and robust_loss.weight is None:
        raise ValueError(
            f"`robust_loss_weight={weight}` has no meaning for `robust_loss={args.robust_loss!r}`; leave it out, or "
            "choose 'trades' or 'mart'."
        )
    if robust_loss.attack_objective == "kl" and attack is not None and not takes(attack, "objective"):
        raise ValueError(
            f"`attack={attack!r}` takes no `objective`, but this `robust_loss` chooses what its attack increases; add "
            "the argument `objective`, a function of logits and labels."
        )


def _check_loss_signature(function: Callable) -> None:
    """Refuse a loss that cannot be called as training will; one whose signature cannot be read is let through."""
    try:
        inspect.signature(function).bind(None, None, None, weight=None, label_smoothing=0.0)
    except TypeError as error:
        raise ValueError(
            f"`robust_loss={function!r}` must take `(clean_logits, adversarial_logits, labels, *, weight, "
            f"label_smoothing)`, which its signature {inspect.signature(function)} does not: {error}. Take what it "
            "does not use as well, or `**_`."
        ) from error
    except ValueError:  # some callables written in C have no signature
        pass


def check_dataset(name: str, dataset: Any, num_labels: int) -> None:
    """Refuse an empty dataset, and labels the model has no class for, where the dataset can tell.

    Args:
        name (`str`):
            The argument, for the message.
        dataset:
            Any dataset, a dictionary of them, or None.
        num_labels (`int`):
            Number of classes of the model.

    Raises:
        ValueError: naming the argument, what was found, and the remedy.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_dataset(f"{name}[{key!r}]", part, num_labels)
        return
    if dataset is None or not hasattr(dataset, "__len__"):
        return
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty; robust fine-tuning needs at least one example.")
    if isinstance(dataset, SeededAugmentation):
        dataset = dataset.dataset
    if isinstance(dataset, datasets.Dataset):
        for column in LABEL_COLUMNS:
            dtype = getattr(dataset.features.get(column), "dtype", "")
            if dtype.startswith(("int", "uint")):  # other columns are the transform's to turn into labels
                check_labels(f"`{name}`", np.asarray(dataset.with_format("numpy")[column][:]), num_labels)
