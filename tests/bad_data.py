"""Folders of images, datasets and models that something is wrong with, one each, made once for all tests."""

import io
import shutil
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import torch
from conftest import CONFIGS, SIZE
from PIL import Image
from transformers import AutoModelForImageClassification, BertConfig, ViTImageProcessor


NAMES = ["cat", "dog"]


def png(value: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), (value % 256, 80, 120)).save(stream, "PNG")
    return stream.getvalue()


def jpeg() -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that would be 40 000 000 000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def tiff_of_floats() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((20, 20), 0.5, dtype=np.float32)).save(stream, "TIFF")
    return stream.getvalue()


def make_image_folders(root: Path) -> None:
    """`root/<name>`, each with one folder per class unless the name says otherwise."""
    for name in NAMES:
        (root / "good" / name).mkdir(parents=True)
        for number in range(6):
            (root / "good" / name / f"{number}.png").write_bytes(png(40 * number))
    for broken, content in (
        ("corrupt/cat/bad.png", b"this is no image"),
        ("truncated/cat/bad.jpg", jpeg()[:900]),
        ("half_png/dog/bad.png", png()[:50]),
        ("bomb/cat/bad.png", bomb()),
        ("floats/dog/bad.tif", tiff_of_floats()),
        ("with_text/cat/notes.txt", b"not an image"),
    ):
        folder = root / Path(broken).parts[0]
        shutil.copytree(root / "good", folder)
        (root / broken).write_bytes(content)
    (root / "empty").mkdir()
    (root / "only_text" / "cat").mkdir(parents=True)
    (root / "only_text" / "cat" / "notes.txt").write_text("nothing to see")
    (root / "flat").mkdir()
    for number in range(4):
        (root / "flat" / f"{number}.png").write_bytes(png(number))
    shutil.copytree(root / "good" / "cat", root / "one_class" / "cat")
    shutil.copytree(root / "good", root / "other_names")
    (root / "other_names" / "cat").rename(root / "other_names" / "bird")
    (root / "a_file").write_text("I am a file")


def make_datasets(root: Path) -> None:
    """`root/<name>`: parquet files with the columns `image` and `label`."""
    images = [{"bytes": png(10 * number), "path": None} for number in range(8)]
    classes = datasets.ClassLabel(names=NAMES)
    labels = [0, 1] * 4

    def save(name, *, split="train", image=images, label=labels, feature=classes, pictures=None):
        features = {"image": pictures or datasets.Image(), "label": feature}
        columns = {"image": image, "label": label}
        dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        (root / name / "data").mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(root / name / "data" / f"{split}-00000-of-00001.parquet")

    text, number = datasets.Value("string"), datasets.Value("int64")
    save("good")
    save("strings", label=["dog", "cat"] * 4, feature=text)
    save("three", label=[0, 1, 2, 0] * 2, feature=datasets.ClassLabel(names=["a", "b", "c"]))
    save("absent", feature=datasets.ClassLabel(names=[*NAMES, "unicorn", "griffin"]))
    save("reversed", feature=datasets.ClassLabel(names=NAMES[::-1]))
    save("floats", label=[0.5, 1.5] * 4, feature=datasets.Value("float64"))
    save("lists", label=[[0, 1]] * 8, feature=datasets.Sequence(number))
    save("no_label", label=[0, None] * 4)
    save("no_text", label=["cat", None, "dog", "cat"] * 2, feature=text)
    save("negative", label=[0, 1, -1, 0] * 2)
    save("one", label=[0] * 8, feature=datasets.ClassLabel(names=["cat"]))
    save("no_image", image=[*images[:5], None, *images[6:]])
    save("damaged", image=[*images[:3], {"bytes": b"junk", "path": None}, *images[4:]])
    save("paths", image=["a.png"] * 8, pictures=text)
    save("no_train", split="test")
    save("other_test")
    save("other_test", split="test", feature=datasets.ClassLabel(names=["bird", "fish"]))
    save("unknown_test", label=["cat", "dog"] * 4, feature=text)
    save("unknown_test", split="test", label=["cat", "eel"] * 4, feature=text)
    save("tiny", image=images[:2], label=[0, 1])
    save("nothing", image=[], label=[])
    save("cut")
    parquet = root / "cut" / "data" / "train-00000-of-00001.parquet"
    parquet.write_bytes(parquet.read_bytes()[:-200])
    (root / "no_data").mkdir()


def make_models(root: Path) -> None:
    """`root/<name>`: tiny models with their processors."""
    size = {"height": SIZE, "width": SIZE}
    processor = ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)

    def save(name, class_names=NAMES):
        config = CONFIGS["vit"]()
        config.num_labels = len(class_names)
        config.id2label, config.label2id = dict(enumerate(class_names)), {n: i for i, n in enumerate(class_names)}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForImageClassification.from_config(config)
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
        return model

    save("good")
    save("reversed", NAMES[::-1])
    save("others", ["bird", "fish"])
    save("headless").base_model.save_pretrained(root / "headless")
    for name, file, content in (
        ("cut", "model.safetensors", None),
        ("no_weights", "model.safetensors", b""),
        ("bad_config", "config.json", b'{"model_type": "vit", '),
        ("unknown_type", "config.json", b'{"model_type": "no_such_model"}'),
        ("bad_processor", "preprocessor_config.json", b"[]"),
    ):
        save(name)
        path = root / name / file
        if content is None:
            path.write_bytes(path.read_bytes()[:-1000])
        elif content:
            path.write_bytes(content)
        else:
            path.unlink()
    (root / "no_processor").mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(root / "good" / file, root / "no_processor")
    BertConfig(num_labels=2).save_pretrained(root / "text_model")
    processor.save_pretrained(root / "text_model")
    (root / "nothing").mkdir()
