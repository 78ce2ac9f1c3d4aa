import hashlib
import re
from pathlib import Path

import datasets
import pytest

from hf_rft.data import bundled
from hf_rft.data.loading import DataTrainingArguments, load_splits


NAME = "bundled:emoji"
FOLDER = Path(bundled.resolve(NAME))
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
SPLITS = ("train", "validation", "test", "test_vendor")


@pytest.fixture(scope="module")
def emoji():
    return datasets.load_dataset(str(FOLDER))


def rows_of_card(pattern: str) -> list[tuple[str, ...]]:
    return re.findall(pattern, CARD, flags=re.MULTILINE)


def test_no_emoji_and_no_base_is_in_two_splits(emoji):
    for column in ("base", "emoji"):
        train, validation, test, vendor = (set(emoji[split][column]) for split in SPLITS)
        assert not train & validation and not (train | validation) & (test | vendor)
    assert set(emoji["test_vendor"]["base"]) <= set(emoji["test"]["base"])


def test_variants_of_an_emoji_have_one_base(emoji):
    variants = re.compile("-?(1F3F[B-F]|200D|2640|2642|27A1)(?=-|$)")
    bases = {}
    for split in SPLITS:
        for codes, base, label in emoji[split].select_columns(["emoji", "base", "label"]).to_pandas().to_numpy():
            bases.setdefault((variants.sub("", codes), label), set()).add(base)
    assert {plain: found for plain, found in bases.items() if len(found) > 1} == {}


def test_held_out_vendor_is_in_no_other_split(emoji):
    assert [set(emoji[split]["vendor"]) for split in SPLITS] == [{"google", "twitter"}] * 3 + [{"fluent"}]


def test_every_class_is_in_every_split(emoji):
    for split in SPLITS:
        assert set(emoji[split]["label"]) == set(range(81))


def test_images_have_one_size_and_mode_and_no_image_is_in_two_splits(emoji):
    files = {}
    for split in SPLITS:
        assert {(image.format, image.size, image.mode) for image in emoji[split]["image"]} == {
            ("PNG", (64, 64), "RGB")
        }
        raw = emoji[split].cast_column("image", datasets.Image(decode=False))["image"]
        files[split] = {image["bytes"] for image in raw}
    assert not files["train"] & (files["validation"] | files["test"] | files["test_vendor"])
    assert not files["validation"] & files["test"]


def test_card_tells_counts_and_classes(emoji):
    names = emoji["train"].features["label"].names
    per_class = {
        name: tuple(map(int, counts))
        for name, *counts in rows_of_card(r"^\| (.+?) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$")
    }
    assert list(per_class) == names == sorted(names)
    for split, counts in zip(SPLITS, zip(*per_class.values(), strict=True), strict=True):
        labels = emoji[split]["label"][:]
        assert counts == tuple(labels.count(label) for label in range(len(names)))
    totals = rows_of_card(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \|")
    assert totals == [
        (split, str(len(emoji[split])), *(str(len(set(emoji[split][column]))) for column in ("emoji", "base")))
        for split in SPLITS
    ]


def test_card_tells_hashes_and_the_files_are_small():
    hashes = dict(rows_of_card(r"^\| `(data/.+)` \| `([0-9a-f]{64})` \|$"))
    files = sorted((FOLDER / "data").iterdir())
    assert {f"data/{path.name}" for path in files} == set(hashes)
    for path in files:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == hashes[f"data/{path.name}"]
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 12e6


def test_card_and_recipe_name_the_same_packages():
    recipe = Path(__file__).parents[2].joinpath("recipes", "make_emoji.py").read_text(encoding="utf-8")
    packages = rows_of_card(r"^\| `([\w@/-]+)` \| ([\d.]+) \| \w+ \| .+ \| `([0-9a-f]{64})` \|$")
    assert [f'"{name}@{version}": "{digest}"' in recipe for name, version, digest in packages] == [True] * 3


def test_licences_lie_beside_the_images():
    notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
    for line in (
        "Apache License, Version 2.0",
        "https://creativecommons.org/licenses/by/4.0/",
        "Copyright (c) Microsoft Corporation",
        "Copyright (c) 2013 Cal Henderson",
        "The above copyright notice and this permission notice shall be included",
    ):
        assert line in notice
    assert "Apache License" in (FOLDER / "LICENSE-Apache-2.0").read_text(encoding="utf-8")
    assert "SIL OPEN FONT LICENSE" in (FOLDER / "LICENSE-OFL-1.1").read_text(encoding="utf-8")


def test_group_is_the_first_part_of_the_class(emoji):
    for rows in emoji.values():
        classes, groups = (rows.features[column].int2str(rows[column][:]) for column in ("label", "group"))
        assert groups == [name.split("-")[0] for name in classes]


@pytest.mark.parametrize("label", ["label", "group"])
@pytest.mark.parametrize(("test_split", "count"), [(None, 566), ("test_vendor", 280)])
def test_splits_of_the_command_line(test_split, count, label):
    arguments = DataTrainingArguments(dataset_name=NAME, test_split=test_split, label_column_name=label)
    splits = load_splits(arguments, seed=0)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 2224, "validation": 310, "test": count}
    assert splits["test"].column_names == ["image", label]
