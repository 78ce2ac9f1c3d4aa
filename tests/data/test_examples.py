import gc
import tempfile
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import SIZE, Images
from PIL import Image
from transformers import TimmWrapperConfig, ViTConfig, ViTImageProcessor

from hf_rft.data.examples import Examples, num_image_channels


ARRAY = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)
PICTURE = Image.fromarray(ARRAY)


@pytest.mark.parametrize("image_column", ["image", "img"])
@pytest.mark.parametrize("label_column", ["label", "labels"])
def test_usual_names_of_columns_are_found(processor, image_column, label_column):
    examples = Examples([{image_column: PICTURE, label_column: 3}], processor)
    assert (examples.image_column, examples.label_column, len(examples)) == (image_column, label_column, 1)
    pixel_values, labels = examples.batch([0])
    assert pixel_values.shape == (1, 3, SIZE, SIZE) and labels.tolist() == [3]
    torch.testing.assert_close(pixel_values, processor(PICTURE, return_tensors="pt")["pixel_values"])


def test_columns_of_other_names_are_taken_where_they_are_given(processor):
    dataset = [{"image": None, "labels": 0, "picture": PICTURE, "kind": 2}]
    examples = Examples(dataset, processor, image_column="picture", label_column="kind")
    pixel_values, labels = examples.batch([0])
    assert pixel_values.shape == (1, 3, SIZE, SIZE) and labels.tolist() == [2]


def test_pixel_values_are_taken_as_they_are_and_go_first(processor):
    images = Images(3)
    dataset = [{**images[index], "image": PICTURE} for index in range(3)]
    pixel_values, labels = Examples(dataset, processor).batch([2, 0])
    assert torch.equal(pixel_values, torch.stack([images[2]["pixel_values"], images[0]["pixel_values"]]))
    assert labels.tolist() == [images[2]["labels"], images[0]["labels"]]
    from_picture, _ = Examples(dataset, processor, image_column="image").batch([2, 0])
    assert torch.equal(from_picture[0], from_picture[1]) and not torch.equal(from_picture, pixel_values)


@pytest.mark.parametrize("form", [list, np.asarray, torch.as_tensor])
def test_stored_pixel_values_may_be_lists_or_arrays(processor, form):
    image = Images(1)[0]["pixel_values"]
    stored = image.tolist() if form is list else form(image)
    pixel_values, labels = Examples([{"pixel_values": stored, "labels": torch.tensor(1)}], processor).batch([0])
    torch.testing.assert_close(pixel_values, image.unsqueeze(0))
    assert labels.tolist() == [1]


def test_images_become_what_the_model_takes():
    grey_processor = ViTImageProcessor(size={"height": 6, "width": 5}, image_mean=[0.5], image_std=[0.5])
    grey = Examples([{"image": PICTURE, "label": 0}], grey_processor, num_channels=1).batch([0])[0]
    assert grey.shape == (1, 1, 6, 5)
    torch.testing.assert_close(grey[0, 0], torch.from_numpy(np.array(PICTURE.convert("L"))) / 255 * 2 - 1)

    processor = ViTImageProcessor(size={"height": 6, "width": 5}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for mode in ("L", "RGBA", "P"):
        colour = Examples([{"image": PICTURE.convert(mode), "label": 0}], processor).batch([0])[0]
        expected = np.array(PICTURE.convert(mode).convert("RGB")).transpose(2, 0, 1)
        torch.testing.assert_close(colour[0], torch.from_numpy(expected) / 255 * 2 - 1, msg=mode)
    from_array = Examples([{"image": ARRAY, "label": 0}], processor).batch([0])[0]
    torch.testing.assert_close(from_array[0], torch.from_numpy(ARRAY.transpose(2, 0, 1)) / 255 * 2 - 1)


def test_images_of_different_sizes_make_one_batch(processor):
    dataset = [{"image": PICTURE.resize(size), "label": 0} for size in ((5, 6), (40, 20), (9, 9))]
    assert Examples(dataset, processor).batch(range(3))[0].shape == (3, 3, SIZE, SIZE)


def streamed(**columns):
    return datasets.Dataset.from_dict(columns).to_iterable_dataset()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_a_stream_is_read_once_and_to_the_bit(processor, tmp_path, file_format):
    pictures = []
    for number in range(3):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 7, 3)).astype(np.uint8)).save(
            tmp_path / f"{number}", file_format
        )
        pictures.append(Image.open(tmp_path / f"{number}"))
    read = []

    def generate():
        for number, picture in enumerate(pictures):
            read.append(number)
            yield {"image": picture, "label": number}

    stream = datasets.IterableDataset.from_generator(generate)
    examples = Examples(stream, ViTImageProcessor(size={"height": 9, "width": 7}))
    expected = Examples(
        [{"image": picture, "label": number} for number, picture in enumerate(pictures)], examples.processor
    )
    for _ in range(2):
        pixel_values, labels = examples.batch([2, 0])
        assert torch.equal(pixel_values, expected.batch([2, 0])[0]) and labels.tolist() == [2, 0]
    assert len(examples) == 3 and read == [0, 1, 2]


def test_what_a_stream_left_on_disk_goes_with_the_examples(processor, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    examples = Examples(streamed(image=[PICTURE] * 2, label=[0, 1]), processor)
    assert len(list(tmp_path.iterdir())) == 1
    del examples
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_stream_that_cannot_be_read(processor):
    def generate():
        yield {"image": PICTURE, "label": 0}
        raise OSError("the connection broke")

    with pytest.raises(ValueError, match="`dataset`, a stream, cannot be read: .*the connection broke"):
        Examples(datasets.IterableDataset.from_generator(generate), processor)


def test_transform_is_applied(processor):
    def transform(columns):
        columns["pixel_values"] = processor(columns["image"], return_tensors="pt")["pixel_values"]
        return columns

    dataset = datasets.Dataset.from_dict({"image": [PICTURE, PICTURE.rotate(90)], "label": [1, 0]})
    dataset = dataset.cast_column("image", datasets.Image())
    plain, transformed = Examples(dataset, processor), Examples(dataset.with_transform(transform), processor)
    assert (plain.image_column, transformed.image_column) == ("image", "pixel_values")
    for ours, theirs in zip(transformed.batch([0, 1]), plain.batch([0, 1]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (None, 3),
        (ViTConfig(), 3),
        (ViTConfig(num_channels=1), 1),
        (TimmWrapperConfig(architecture="test_resnet", pretrained_cfg={"input_size": [1, 8, 8]}), 1),
        (TimmWrapperConfig(architecture="test_resnet", pretrained_cfg={"mean": [0.5]}), 3),
        (SimpleNamespace(num_labels=4), 3),
        (SimpleNamespace(num_channels=4, pretrained_cfg={"input_size": [1, 8, 8]}), 4),
    ],
)
def test_number_of_channels(config, count):
    assert num_image_channels(config) == count


class Unindexable:
    def __len__(self):
        return 3


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (Unindexable(), {}, "`dataset` is Unindexable, which cannot be indexed"),
        ((example for example in []), {}, "`dataset` is generator, which cannot be indexed, but results are kept"),
        ([], {}, "`dataset` is empty; robustness needs at least one example"),
        ([[PICTURE, 1]], {}, "`dataset` returns list objects; an example must be a dictionary"),
        ([{"label": 1, "picture": 0}], {}, r"hold \['label', 'picture'\], none of \['image', 'img'\].*`image_column`"),
        ([{"image": 1, "kind": 0}], {}, r"hold \['image', 'kind'\], none of \['labels', 'label'\].*`label_column`"),
        ([{"image": 0, "label": 0}], {"image_column": "x"}, "`image_column='x'` is not in .*; they hold .'image', 'l"),
        ([{"image": 0, "label": 0}], {"label_column": "y"}, "`label_column='y'` is not in the dataset's examples"),
    ],
)
def test_bad_datasets_are_refused(dataset, options, message, processor):
    with pytest.raises(ValueError, match=message):
        Examples(dataset, processor, **options)


@pytest.mark.parametrize(
    ("label", "found"), [(0.5, r"torch.float32 of shape \(2,\)"), ([1, 0], r"torch.int64 of shape \(2, 2\)")]
)
def test_labels_that_are_no_class_index_are_refused(label, found, processor):
    dataset = [{"image": PICTURE, "target": label}] * 2
    with pytest.raises(ValueError, match=f"column 'target' must hold one class index per image, got {found}"):
        Examples(dataset, processor, label_column="target").batch([0, 1])


@pytest.mark.parametrize("label", ["cat", None], ids=["text", "missing"])
def test_labels_that_are_no_number_are_refused(label, processor):
    with pytest.raises(ValueError, match="column 'label' must hold one class index per image"):
        Examples([{"image": PICTURE, "label": label}], processor).batch([0])


def test_example_may_be_what_a_processor_returns(processor):
    example = processor(PICTURE, return_tensors="pt")
    example["pixel_values"], example["labels"] = example["pixel_values"][0], 1
    pixel_values, labels = Examples([example], processor).batch([0])
    assert pixel_values.shape == (1, 3, SIZE, SIZE) and labels.tolist() == [1]
