import datasets
import pytest
from conftest import make_model
from PIL import Image
from transformers import ConvNextImageProcessor, ViTImageProcessor

from hf_rft.data.loading import DataTrainingArguments, encode_labels, load_image_folders, load_splits
from hf_rft.hub.pretrained import ModelArguments, load_model


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
    with pytest.raises(ValueError, match=r"Split 'test' has labels \['dog'\] that the training split lacks"):
        encode_labels(datasets.DatasetDict(splits), "label")


# --- Folders ---


def write_images(root, folders):
    """One grey image for each path, whose brightness counts up."""
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(root / folder / f"{number}.png")
    return root


def brightness(dataset):
    return sorted(image.getpixel((0, 0)) for image in dataset["image"])


def load(root, **options):
    arguments = DataTrainingArguments(train_dir=str(root), **options)
    splits = load_splits(arguments, 0, cache_dir=str(root.parent / "cache"))
    return splits, arguments


@pytest.mark.parametrize("validation", ["val", "Valid", "validation"])
def test_validation_images_in_the_folder_given_for_training_stay_out_of_it(tmp_path, validation):
    folders = ["train/cat", "train/dog", f"{validation}/cat", f"{validation}/dog"]
    splits, arguments = load(write_images(tmp_path / "data", folders))
    assert {split: brightness(part) for split, part in splits.items()} == {
        "train": [0, 1],
        "validation": [2, 3],
        "test": [2, 3],
    }
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert arguments.test_split == "validation"


def test_a_flag_of_its_own_counts_more_than_a_split_found_inside(tmp_path):
    root = write_images(tmp_path / "data", [f"{split}/{name}" for split in ("train", "val", "test") for name in "ab"])
    other = write_images(tmp_path / "other", ["skipped/x", "skipped/y", "v/a", "v/b"]) / "v"
    splits, arguments = load(root, validation_dir=str(other))
    assert {split: brightness(part) for split, part in splits.items()} == {
        "train": [0, 1],
        "validation": [2, 3],
        "test": [4, 5],
    }
    assert arguments.test_split == "test"


def test_a_class_may_be_called_like_a_split(tmp_path):
    splits, _ = load(write_images(tmp_path / "data", ["bus", "car", "train"] * 4), train_val_split=0.25)
    assert splits["train"].features["label"].names == ["bus", "car", "train"]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            ["train/a", "train/b", "val/a", "extra/a"],
            r"\['extra', 'train', 'val'\]: \['train', 'val'\] look like",
        ),
        (["train/a", "train/b", "val/a", "valid/a"], "look like splits, which must not be mixed"),
        (
            ["val/a", "val/b", "test/a"],
            r"--train_dir '.*' holds splits \(test, validation\), which would be mixed",
        ),
    ],
)
def test_folders_that_may_be_splits_are_not_pooled(tmp_path, folders, message):
    with pytest.raises(ValueError, match=message):
        load(write_images(tmp_path / "data", folders))


def test_an_evaluation_does_not_pool_splits(tmp_path):
    root = write_images(tmp_path / "data", ["train/a", "train/b", "test/a", "test/b"])
    with pytest.raises(ValueError, match=r"--image_dir '.*' holds splits \(test, train\).*give one.*data/test"):
        load_image_folders({"image_dir": str(root)})
