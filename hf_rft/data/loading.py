"""Image datasets for the command line, by name or folder, with checked splits, columns and labels."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ..utils.values import COUNT, SHARE, Range, check_ranges, naming
from . import bundled


logger = logging.getLogger(__name__)


@dataclass
class DataTrainingArguments:
    """Images to train and evaluate on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, local dataset folder, or bundled: name. Default: the bundled data."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with one sub-folder of images per class, or one per split."},
    )
    validation_dir: str | None = field(default=None, metadata={"help": "Folder of images for choosing checkpoints."})
    test_dir: str | None = field(default=None, metadata={"help": "Folder of images for the final numbers."})
    image_column_name: str = field(default="image", metadata={"help": "Column that holds the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column that holds the labels."})
    test_split: str | None = field(
        default=None, metadata={"help": "Split for the final numbers. Default: test if there is one, else validation."}
    )
    train_val_split: float = field(
        default=0.1, metadata={"help": "Share of the training data kept for validation if the data has none."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random subset of this size."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Validate on a random subset of this size."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Test on a random subset of this size."})
    check_images: bool = field(
        default=True,
        metadata={"help": "Decode every image once before training, so that a damaged one cannot stop it later."},
    )
    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    color_jitter: float = field(
        default=0.25, metadata={"help": "Strength of brightness, contrast, saturation jitter."}
    )
    rotation: float = field(default=2.0, metadata={"help": "Largest random rotation, in degrees."})

    def __post_init__(self):
        if self.dataset_name is not None and self.train_dir is not None:
            raise ValueError("Give either --dataset_name or --train_dir, not both.")
        if self.dataset_name is None and self.train_dir is None:
            if self.validation_dir is not None or self.test_dir is not None:
                raise ValueError("--validation_dir and --test_dir need --train_dir.")
            self.dataset_name = bundled.DATASET
        if self.dataset_name is not None:
            bundled.check_name("--dataset_name", self.dataset_name)
        check_ranges(self, RANGES, is_flag=True)
        for flag in ("train_dir", "validation_dir", "test_dir"):
            check_folder(f"--{flag}", getattr(self, flag))


# In the units of `ColorJitter` and `RandomRotation`.
RANGES = {
    "train_val_split": Range(0, 0.99, is_open=True),
    "max_train_samples": COUNT,
    "max_eval_samples": COUNT,
    "max_test_samples": COUNT,
    "horizontal_flip": SHARE,
    "color_jitter": Range(0, 10),
    "rotation": Range(0, 180),
}


def check_folder(flag: str, folder: str | None) -> None:
    if folder is not None and not os.path.isdir(folder):
        raise ValueError(f"{flag} {folder!r} is not a folder; it should hold one folder of images per class.")


def load_splits(
    data_args: DataTrainingArguments, seed: int, *, cache_dir: str | None = None, token: str | None = None
) -> DatasetDict:
    """Splits `train`, `validation` (for choosing checkpoints) and `test` (for the final numbers), each a fixed subset.

    Sets `data_args.test_split` to the split used for the final numbers.

    Raises:
        ValueError: naming the flag, split or column at fault, and the remedy.
    """
    if data_args.train_dir is not None:
        flags = ("train_dir", "validation_dir", "test_dir")
        folders = {flag: folder for flag in flags if (folder := getattr(data_args, flag)) is not None}
        if "train" in (inside := split_folders("train_dir", data_args.train_dir)):
            folders["train_dir"] = inside.pop("train")
            folders = {**{f"{split}_dir": folder for split, folder in inside.items()}, **folders}
            used = ", ".join(sorted(folders.values()))
            logger.warning("--train_dir %r holds splits; used are %s.", data_args.train_dir, used)
        splits = load_image_folders(folders, cache_dir)
    else:
        path = bundled.resolve(data_args.dataset_name)
        with naming("--dataset_name", data_args.dataset_name, "give a Hub id, or a folder with a dataset"):
            splits = load_dataset(path, data_args.dataset_config_name, cache_dir=cache_dir, token=token)
    if "train" not in splits:
        raise ValueError(f"The dataset has no split 'train', it has {sorted(splits)}.")
    if data_args.test_split is None:
        data_args.test_split = "test" if "test" in splits else "validation"
    if data_args.test_split not in (*splits, "validation"):
        raise ValueError(
            f"--test_split {data_args.test_split!r} is not a split of the dataset, it has {sorted(splits)}."
        )
    used = [split for split in ("train", "validation", data_args.test_split) if split in splits]
    columns = [data_args.image_column_name, data_args.label_column_name]
    splits = DatasetDict({split: checked_columns(split, splits[split], *columns) for split in used})
    splits = encode_labels(splits, data_args.label_column_name)
    names = splits["train"].features[data_args.label_column_name].names
    if len(names) < 2:
        raise ValueError(
            f"--label_column_name {data_args.label_column_name!r} has the classes {names}; a classifier needs at "
            "least 2. A folder of images should hold one folder per class."
        )

    if "validation" not in splits:
        try:
            parts = splits["train"].train_test_split(**split_options(data_args, seed))
        except ValueError as error:
            raise ValueError(
                f"--train_val_split {data_args.train_val_split} cannot divide {len(splits['train'])} training images "
                f"({error}); choose another share, or give validation data."
            ) from error
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    splits["test"] = splits[data_args.test_split]
    limits = (data_args.max_train_samples, data_args.max_eval_samples, data_args.max_test_samples)
    named = zip(("train", "validation", "test"), limits, strict=True)
    return DatasetDict({split: subset(splits[split], limit, seed) for split, limit in named})


def split_options(data_args: DataTrainingArguments, seed: int) -> dict[str, float | int | str]:
    """How validation images are split off the training images, as `Dataset.train_test_split` takes it."""
    column = data_args.label_column_name
    return {"test_size": data_args.train_val_split, "seed": seed, "stratify_by_column": column}


def split_folders(flag: str, folder: str) -> dict[str, str]:
    """The sub-folders that hold splits, by split; empty if the sub-folders are classes.

    A class may be named like a split (`train`, beside `bus` and `car`), as long as it is the only such folder.

    Raises:
        ValueError: if some sub-folders look like splits and others like classes, or two are the same split.
    """
    split_of = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
    names = sorted(path.name for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith("."))
    found = [name for name in names if name.lower() in split_of]
    if not found or (len(found) == 1 and len(names) > 1):
        return {}
    splits = {split_of[name.lower()]: f"{folder.rstrip('/')}/{name}" for name in found}
    if len(splits) < len(names):
        raise ValueError(
            f"--{flag} {folder!r} holds the folders {names}: {found} look like splits, which must not be mixed. Give "
            "each split by its own flag (--train_dir, --validation_dir, --test_dir), or rename the class."
        )
    return splits


def display_name(name_or_folder: str) -> str:
    """What to call a dataset: a folder goes by its name, or its parent's if it is called like a split (`train`)."""
    if not os.path.isdir(name_or_folder):
        return name_or_folder.removeprefix(bundled.PREFIX)
    folder = Path(name_or_folder).resolve()
    words = {word for of_split in SPLIT_KEYWORDS.values() for word in of_split}
    return folder.parent.name if folder.name.lower() in words else folder.name


def load_image_folders(folders: Mapping[str, str], cache_dir: str | None = None) -> DatasetDict:
    """One split per folder of images; each sub-folder is a class.

    Args:
        folders (`Mapping[str, str]`):
            Folders by flag, such as `train_dir`; the first word of the flag is the split.

    Raises:
        ValueError: naming a folder that holds no images or cannot be read.
    """
    for flag, folder in folders.items():
        if len(splits := split_folders(flag, folder)) > 1:
            raise ValueError(
                f"--{flag} {folder!r} holds splits ({', '.join(splits)}), which would be mixed; give one of them, "
                f"such as {next(iter(splits.values()))}."
            )
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith("."))
        others = [path for path in paths if path.suffix.lower() not in _IMAGE_FOLDER_FILES]
        if len(others) == len(paths):
            first = f" ({others[0].name} first)" if others else ""
            raise ValueError(
                f"--{flag} {folder!r} holds {len(others)} files{first} but no image; it should hold one folder of "
                "images per class."
            )
        if others:
            logger.warning(
                "--%s %r: left out %d files, %s first: not images.", flag, folder, len(others), others[0].name
            )
    data_files = {flag.split("_")[0]: f"{folder}/**" for flag, folder in folders.items()}
    with naming(f"--{next(iter(folders))}", str(data_files), "give folders that hold one folder of images per class"):
        return load_dataset("imagefolder", data_files=data_files, cache_dir=cache_dir)


# Files that `datasets` reads in an image folder: images, archives of images, and tables of further columns.
_IMAGE_FOLDER_FILES = {*ImageFolder.EXTENSIONS, ".zip", ".tar", ".gz", ".tgz", ".csv", ".jsonl", ".parquet"}


def checked_columns(split: str, dataset: Dataset, image_column: str, label_column: str) -> Dataset:
    """A split with only these two columns.

    Raises:
        ValueError: if one is missing or has the wrong type, or the split is empty.
    """
    for flag, column in (("image_column_name", image_column), ("label_column_name", label_column)):
        if column not in (columns := dataset.column_names):
            raise ValueError(
                f"--{flag} {column!r} is not a column of the dataset; its columns are {columns} (split {split!r}). "
                "Image folders (--train_dir, --validation_dir, --test_dir, --image_dir) need one folder per class."
            )
    if len(dataset) == 0:
        raise ValueError(f"The split {split!r} is empty; robust fine-tuning needs at least one example.")
    image_type = dataset.features[image_column]
    if not isinstance(image_type, Image):
        raise ValueError(
            f"--image_column_name {image_column!r} holds {image_type}, not images; cast it with "
            "`cast_column(..., datasets.Image())` if it holds paths or bytes."
        )
    return dataset.select_columns([image_column, label_column])


def encode_labels(splits: DatasetDict, column: str) -> DatasetDict:
    """Encode labels as indices of the training split's classes, in all splits.

    Raises:
        ValueError: if a label is missing or has the wrong type, or the classes of a split differ.
    """
    for split, dataset in splits.items():
        feature = dataset.features[column]
        if not isinstance(feature, ClassLabel) and not str(getattr(feature, "dtype", "")).startswith(_LABEL_TYPES):
            raise ValueError(
                f"--label_column_name {column!r} holds {feature} in split {split!r}; a class is text or a whole "
                "number, one per image."
            )
        labels = dataset.select_columns([column]).with_format("arrow")[:][column]
        if labels.null_count:
            first = labels.is_null().to_pylist().index(True)
            raise ValueError(
                f"Split {split!r} has no label in {labels.null_count} of {len(labels)} examples, number {first} "
                "first; leave them out."
            )
    feature = splits["train"].features[column]
    if not isinstance(feature, ClassLabel):
        classes = sorted(splits["train"].unique(column))
        feature = ClassLabel(names=[str(name) for name in classes])
        for split, dataset in splits.items():
            if unknown := sorted(set(dataset.unique(column)) - set(classes), key=str):
                raise ValueError(f"Split {split!r} has labels {unknown} that the training split lacks: {classes}.")
        features = Features({**splits["train"].features, column: feature})
        splits = splits.map(lambda example: {column: feature.str2int(str(example[column]))}, features=features)
    for split, dataset in splits.items():
        names = getattr(dataset.features[column], "names", None)
        if names != feature.names:
            raise ValueError(
                f"Split {split!r} has the classes {names or dataset.features[column]}, the training split "
                f"{feature.names}; give all splits the same classes in the same order."
            )
    return splits


_LABEL_TYPES = ("string", "large_string", "int", "uint", "bool")


def subset(dataset: Dataset, limit: int | None, seed: int) -> Dataset:
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(limit))
