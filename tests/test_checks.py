import datasets
import pytest
import torch

from hf_rft.augmentation import SeededAugmentation
from hf_rft.checks import check_batch, check_dataset, check_labels


def rows(*labels, column="label"):
    return datasets.Dataset.from_dict({column: list(labels)})


def test_good_datasets_pass():
    check_dataset("train_dataset", None, 3)
    check_dataset("train_dataset", rows(0, 1, 2), 3)
    check_dataset("train_dataset", rows(0, 1, 2).with_transform(lambda batch: {"other": batch["label"]}), 3)
    check_dataset("train_dataset", (item for item in []), 3)  # no length to look at


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (rows(), "`train_dataset` is empty"),
        (rows(0, 3), r"`train_dataset` holds labels from 0 to 3, but the model has 3 classes \(0 to 2\)"),
        (rows(-1, 2, column="labels"), "labels down to -1; negative ones mark unlabelled examples, leave them out"),
        (rows(0, 7).with_transform(lambda batch: batch), "load it with `num_labels=8`"),
        (SeededAugmentation(rows(0, 3), lambda example: example, seed=0), "labels from 0 to 3"),
        ({"a": rows(0), "b": rows(5)}, r"`train_dataset\['b'\]` holds labels from 5 to 5"),
    ],
)
def test_bad_datasets_are_refused(dataset, message):
    with pytest.raises(ValueError, match=message):
        check_dataset("train_dataset", dataset, 3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"labels": torch.tensor([0])}, r"has no \['pixel_values'\], its keys are \['labels'\]"),
        ({"pixel_values": torch.zeros(1, 3, 2, 2)}, r"has no \['labels'\]"),
        (
            {"pixel_values": torch.zeros(1, 3, 2, 2), "labels": torch.tensor([0]), "mask": torch.zeros(1)},
            r"further tensors \['mask'\]; only `pixel_values` can be attacked",
        ),
        ({"pixel_values": torch.zeros(1, 3, 2, 2), "labels": torch.tensor([3])}, "A batch holds labels from 3 to 3"),
    ],
)
def test_bad_batches_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        check_batch(inputs, 3)


@pytest.mark.parametrize("labels", [torch.zeros(1, 3), torch.zeros(1), torch.zeros(1, 1, dtype=torch.long)])
def test_other_kinds_of_labels_are_refused(labels):
    with pytest.raises(ValueError, match="one class index per image, got torch.*regression and several labels"):
        check_batch({"pixel_values": torch.zeros(1, 3, 2, 2), "labels": labels}, 3)


def test_labels_that_a_transform_makes_are_left_to_it():
    check_dataset("train_dataset", rows("cat", "dog").with_transform(lambda batch: batch), 2)


def test_check_labels_accepts_the_whole_range():
    check_labels("Here", torch.tensor([0, 1, 2]), 3)
