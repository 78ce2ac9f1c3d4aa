import datasets
import pytest
from conftest import make_model
from model_and_data import ModelArguments, encode_labels, load_model
from PIL import Image
from transformers import ConvNextImageProcessor, ViTImageProcessor


@pytest.mark.parametrize("family", ["vit", "resnet", "convnext"])
def test_transformers_models_and_their_image_size(tmp_path, family):
    """Models that take any size get the new one; others refuse rather than lose pretrained weights."""
    make_model(family).save_pretrained(tmp_path)
    name = {"vit": ViTImageProcessor, "resnet": ConvNextImageProcessor, "convnext": ConvNextImageProcessor}[family]
    name().save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), image_size=32)
    if family == "vit":
        with pytest.raises(ValueError, match="position_embeddings.*leave --image_size out"):
            load_model(arguments, ["a", "b"])
        arguments.image_size = None
    processor, model = load_model(arguments, ["a", "b"])
    assert model.config.id2label == {0: "a", 1: "b"}
    if family != "vit":
        pixel_values = processor(Image.new("RGB", (50, 40)), return_tensors="pt")["pixel_values"]
        assert pixel_values.shape == (1, 3, 32, 32)
        assert model(pixel_values).logits.shape == (1, 2)


@pytest.mark.parametrize(
    ("train", "test", "names"),
    [
        (["cat", "dog", "owl"], ["owl", "dog"], ["cat", "dog", "owl"]),
        ([3, 5, 10], [10, 5], ["3", "5", "10"]),
    ],
    ids=["strings", "integers"],
)
def test_raw_labels_mean_the_same_class_in_every_split(train, test, names):
    splits = datasets.DatasetDict(
        {split: datasets.Dataset.from_dict({"label": rows}) for split, rows in (("train", train), ("test", test))}
    )
    encoded = encode_labels(splits, "label")
    assert encoded["train"].features["label"].names == encoded["test"].features["label"].names == names
    assert encoded["train"]["label"][:] == [0, 1, 2]
    assert encoded["test"]["label"][:] == [2, 1]


def test_labels_unknown_to_training_are_refused():
    splits = {"train": ["cat"], "test": ["cat", "dog"]}
    splits = {name: datasets.Dataset.from_dict({"label": rows}) for name, rows in splits.items()}
    with pytest.raises(ValueError, match=r"Split 'test' has labels \['dog'\] that the training split has not"):
        encode_labels(datasets.DatasetDict(splits), "label")
