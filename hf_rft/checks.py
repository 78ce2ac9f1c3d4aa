"""Checks of user data, before anything is computed from it."""

from typing import Any

import datasets
import numpy as np
import torch


LABEL_COLUMNS = ("labels", "label")


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
    if isinstance(dataset, dict) and not isinstance(dataset, datasets.DatasetDict):
        for key, part in dataset.items():
            check_dataset(f"{name}[{key!r}]", part, num_labels)
        return
    if dataset is None or not hasattr(dataset, "__len__"):
        return
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty; robust fine-tuning needs at least one example.")
    dataset = getattr(dataset, "dataset", dataset)  # the one inside `SeededAugmentation`
    if isinstance(dataset, datasets.Dataset):
        for column in LABEL_COLUMNS:
            if column in dataset.column_names:
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
    check_labels("A batch", inputs["labels"], num_labels)


def check_labels(where: str, labels: Any, num_labels: int) -> None:
    """Refuse labels outside 0 ... `num_labels - 1`; `where` begins the message."""
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_labels:
        raise ValueError(
            f"{where} holds labels from {lowest} to {highest}, but the model has {num_labels} classes (0 to "
            f"{num_labels - 1}); load it with `num_labels={highest + 1}` and `ignore_mismatched_sizes=True`, or "
            "correct the labels."
        )
