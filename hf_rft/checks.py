"""Checks of what a user hands over, before anything is computed from it."""

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from transformers import Trainer

from .attacks.base import takes
from .augmentation import SeededAugmentation
from .losses import LOSSES, RobustLoss
from .training_args import RobustTrainingArguments


LABEL_COLUMNS = ("labels", "label")


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
            f"{type(trainer.model).__name__} with num_labels={num_labels} and problem_type={problem_type!r}."
        )
    if trainer.compute_loss_func is not None:
        raise ValueError("`compute_loss_func` would replace the robust loss; pass `robust_loss` instead.")
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{trainer.args.n_gpu} GPUs in one process (DataParallel) are not supported; start one process a GPU "
            "with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one."
        )


def check_loss(robust_loss: RobustLoss, args: RobustTrainingArguments, attack: Callable | None) -> None:
    """Refuse a weight that the loss does not have, and a user's attack that cannot serve the loss."""
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


def check_batch(inputs: dict[str, Any], num_labels: int) -> None:
    """Refuse a batch without images or labels, with further tensors, or with labels the model has no class for."""
    missing = [key for key in ("pixel_values", "labels") if key not in inputs]
    if missing:
        raise ValueError(
            f"A batch has no {missing}, its keys are {sorted(inputs)}; let the dataset and `data_collator` return "
            "`pixel_values` and `labels` (and keep `remove_unused_columns=False` for a transform made on the fly)."
        )
    others = [
        key
        for key, value in inputs.items()
        if isinstance(value, torch.Tensor) and key not in ("pixel_values", "labels")
    ]
    if others:
        raise ValueError(
            f"A batch holds further tensors {others}; only `pixel_values` can be attacked. Leave them out."
        )
    labels = inputs["labels"]
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"`labels` must hold one class index per image, got {labels.dtype} of shape {tuple(labels.shape)}; "
            "regression and several labels per image are not supported."
        )
    check_labels("A batch", labels, num_labels)


def check_labels(where: str, labels: Any, num_labels: int) -> None:
    """Refuse labels outside 0 ... `num_labels - 1`; `where` begins the message."""
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0:
        raise ValueError(
            f"{where} holds labels down to {lowest}; negative ones mark unlabelled examples, leave them out."
        )
    if highest >= num_labels:
        raise ValueError(
            f"{where} holds labels from {lowest} to {highest}, but the model has {num_labels} classes (0 to "
            f"{num_labels - 1}); load it with `num_labels={highest + 1}` and `ignore_mismatched_sizes=True`, or "
            "correct the labels."
        )


class NonFiniteError(ArithmeticError):
    """A loss or gradient is infinite or not a number; the weights are those of the last optimizer step."""


def check_finite(what: str, values: torch.Tensor, when: str, world_size: int = 1) -> None:
    """Refuse NaN and infinity; where `world_size` processes have values of their own, on all of them or none.

    Args:
        what (`str`):
            What `values` are, for the message.
        values (`torch.Tensor`):
            Of this process; any shape.
        when (`str`):
            Step and micro-batch.

    Raises:
        NonFiniteError: on every process if any of them found one.
    """
    bad = (~values.isfinite()).flatten()
    found = bad.any().to(torch.int32)
    if world_size > 1:
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    if not found:
        return
    positions = bad.nonzero().flatten().tolist()
    where = "on another process"
    if positions:
        values = values.detach().flatten()[bad]
        where = f"{values[0].item()}" + (f" for examples {positions} of the batch" if len(bad) > 1 else "")
    raise NonFiniteError(
        f"The {what} is not finite {when}: {where}. No optimizer step was taken from it and no checkpoint written. Go "
        "on from the last checkpoint with `resume_from_checkpoint=True`, after looking at the images, with a lower "
        "`learning_rate`, a `max_grad_norm`, or `bf16` in place of `fp16`."
    )
