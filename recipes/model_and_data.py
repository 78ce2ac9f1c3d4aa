"""Which pretrained model and which images: arguments of the recipes, and what they stand for."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from transformers import AutoImageProcessor

from hf_rft import bundled
from hf_rft.files import check_writable
from hf_rft.loading import naming
from hf_rft.ranges import COUNT, SHARE, Range, check_ranges
from hf_rft.untrusted import load_classifier, load_config


@dataclass
class ModelArguments:
    """Which pretrained model to fine-tune."""

    model_name_or_path: str = field(
        default=bundled.MODEL, metadata={"help": "Hub id (transformers or timm), local folder, or bundled: name."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    token: str | None = field(default=None, metadata={"help": "Hub token, for private or gated repositories."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    ignore_mismatched_sizes: bool = field(
        default=True, metadata={"help": "Replace the classification head if the number of classes differs."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the square images, in pixels. Default: the processor's own."}
    )
    channels_last: bool = field(
        default=False, metadata={"help": "Memory format of the weights; convolutional networks often run faster."}
    )

    def __post_init__(self):
        check_ranges(self, {"image_size": IMAGE_SIZE}, is_flag=True)
        if not self.model_name_or_path:
            raise ValueError("--model_name_or_path is empty; give a Hub id, a local folder, or a bundled: name.")
        if self.cache_dir is not None:
            check_writable("--cache_dir", self.cache_dir)


# Larger ones fill the memory before anything is known about the model.
IMAGE_SIZE = Range(1, 4096, is_whole=True)


@dataclass
class DataTrainingArguments:
    """Which images to train and evaluate on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, local dataset folder, or bundled: name. Default: the bundled data."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of images, one sub-folder a class; or of splits (train, val, test) that hold these."
        },
    )
    validation_dir: str | None = field(default=None, metadata={"help": "Likewise, for choosing checkpoints."})
    test_dir: str | None = field(default=None, metadata={"help": "Likewise, for the final numbers."})
    image_column_name: str = field(default="image", metadata={"help": "Column that holds the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column that holds the labels."})
    test_split: str | None = field(
        default=None, metadata={"help": "Split for the final numbers. Default: test if there is one, else validation."}
    )
    train_val_split: float = field(
        default=0.1, metadata={"help": "Share of the training data kept for validation if the data has none."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random subset of this size."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Likewise for validation during training."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Likewise for the final evaluation."})
    check_images: bool = field(
        default=True,
        metadata={"help": "Decode every image once before training, so that a damaged one does not end it later."},
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
        check_ranges(self, RANGES, is_flag=True)
        for flag in ("train_dir", "validation_dir", "test_dir"):
            check_folder(f"--{flag}", getattr(self, flag))


# What `ColorJitter` and `RandomRotation` take, in their units.
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
    """
    Raises:
        ValueError: if a folder of images is none.
    """
    if folder is None:
        return
    if not os.path.isdir(folder):
        raise ValueError(f"{flag} {folder!r} is not a folder; it should hold one folder of images a class.")


def load_splits(model_args: ModelArguments, data_args: DataTrainingArguments, seed: int) -> DatasetDict:
    """Splits `train`, `validation` (for choosing checkpoints) and `test` (for the final numbers), in fixed subsets.

    Sets `data_args.test_split` to the split that the final numbers are from.

    Raises:
        ValueError: naming flag, split or column that does not fit, and the remedy.
    """
    if data_args.train_dir is not None:
        given = {flag: getattr(data_args, flag) for flag in ("train_dir", "validation_dir", "test_dir")}
        folders = {flag: folder for flag, folder in given.items() if folder is not None}
        if "train" in (inside := split_folders("train_dir", data_args.train_dir)):
            folders["train_dir"] = inside.pop("train")
            folders = {**{f"{split}_dir": folder for split, folder in inside.items()}, **folders}
            print(f"--train_dir {data_args.train_dir!r} holds splits; used are {', '.join(sorted(folders.values()))}.")
        splits = load_image_folders(folders, model_args.cache_dir)
    else:
        path = bundled.resolve(data_args.dataset_name)
        with naming("--dataset_name", data_args.dataset_name, "give a Hub id, or a folder with a dataset"):
            splits = load_dataset(
                path, data_args.dataset_config_name, cache_dir=model_args.cache_dir, token=model_args.token
            )
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
            "least 2. A folder of images should hold one folder a class."
        )

    if "validation" not in splits:
        try:
            parts = splits["train"].train_test_split(
                test_size=data_args.train_val_split, seed=seed, stratify_by_column=data_args.label_column_name
            )
        except ValueError as error:
            raise ValueError(
                f"--train_val_split {data_args.train_val_split} cannot divide {len(splits['train'])} training images "
                f"({error}); choose another share, or give validation data."
            ) from error
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    splits["test"] = splits[data_args.test_split]
    limits = {
        "train": data_args.max_train_samples,
        "validation": data_args.max_eval_samples,
        "test": data_args.max_test_samples,
    }
    return DatasetDict({split: subset(splits[split], limit, seed) for split, limit in limits.items()})


def split_folders(flag: str, folder: str) -> dict[str, str]:
    """The folders inside that hold splits, by split; empty if the folders inside are classes.

    A class may have the name of a split (`train`, beside `bus` and `car`): then there is but one such folder.

    Raises:
        ValueError: if some folders inside seem to be splits and others classes, or two are the same split.
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


def load_image_folders(folders: Mapping[str, str], cache_dir: str | None = None) -> DatasetDict:
    """A split for each folder of images, one sub-folder a class.

    Args:
        folders (`Mapping[str, str]`):
            By the flag that names each, such as `train_dir`; the flag's first word is the split.

    Raises:
        ValueError: naming the folder that holds no images, or cannot be read.
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
                "images a class."
            )
        if others:
            print(f"--{flag} {folder!r}: left out {len(others)} files, {others[0].name} first: not images.")
    data_files = {flag.split("_")[0]: f"{folder}/**" for flag, folder in folders.items()}
    with naming(f"--{next(iter(folders))}", str(data_files), "give folders that hold one folder of images a class"):
        return load_dataset("imagefolder", data_files=data_files, cache_dir=cache_dir)


# Besides images, what `datasets` reads in a folder of images: archives of images, and columns for them.
_IMAGE_FOLDER_FILES = {*ImageFolder.EXTENSIONS, ".zip", ".tar", ".gz", ".tgz", ".csv", ".jsonl", ".parquet"}


def checked_columns(split: str, dataset: Dataset, image_column: str, label_column: str) -> Dataset:
    """The two columns of a split alone.

    Raises:
        ValueError: if one is missing, or does not hold what it should, or the split is empty.
    """
    for flag, column in (("image_column_name", image_column), ("label_column_name", label_column)):
        columns = dataset.column_names
        if column not in columns:
            raise ValueError(
                f"--{flag} {column!r} is not a column of the dataset; its columns are {columns} (split {split!r}). "
                "A folder of images (--train_dir, --validation_dir, --test_dir, --image_dir) needs one folder a class."
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
    """Labels as indices of the training split's classes, the same in all splits.

    Raises:
        ValueError: if a label is missing or of another type, or a split has other classes.
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
            unknown = sorted(set(dataset.unique(column)) - set(classes), key=str)
            if unknown:
                raise ValueError(f"Split {split!r} has labels {unknown} that the training split has not: {classes}.")
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


def load_model(model_args: ModelArguments, class_names: list[str]):
    """The pretrained model with a head for these classes, and its image processor."""
    name_or_path = bundled.resolve(model_args.model_name_or_path)
    hub_options = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }
    with naming("--model_name_or_path", model_args.model_name_or_path, "give a Hub id or a folder of a classifier"):
        config = load_config(
            name_or_path,
            num_labels=len(class_names),
            id2label=dict(enumerate(class_names)),
            label2id={name: index for index, name in enumerate(class_names)},
            **hub_options,
        )
        processor = AutoImageProcessor.from_pretrained(name_or_path, **hub_options)
    size = model_args.image_size
    if hasattr(config, "pretrained_cfg"):  # timm: the configuration holds class names and processor values as well
        config.label_names = class_names
        if size is not None:
            config.pretrained_cfg["input_size"] = [3, size, size]
            processor = type(processor)(pretrained_cfg=config.pretrained_cfg, architecture=config.architecture)
    elif size is not None:
        if "shortest_edge" in processor.to_dict()["size"]:
            processor.size = {"shortest_edge": size}
        else:
            processor.size = {"height": size, "width": size}
        if getattr(processor, "crop_size", None) is not None:
            processor.crop_size = {"height": size, "width": size}
        if hasattr(config, "image_size"):
            config.image_size = size
    with naming("--model_name_or_path", model_args.model_name_or_path, "give a folder or repository with its weights"):
        model, report = load_classifier(
            name_or_path,
            config,
            ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
            output_loading_info=True,
            **hub_options,
        )
    head_tensors = head_parameters(model)
    head = {name for name, parameter in model.named_parameters() if parameter in head_tensors}
    parameters = {name for name, _ in model.named_parameters()}
    lost = sorted({str(key[0]) for key in report["mismatched_keys"]} - head)
    if lost:
        raise ValueError(
            f"The pretrained weights {lost} do not fit {name_or_path} with --image_size {size}, and fine-tuning must "
            "not start from random ones; leave --image_size out, or use a model that takes any size."
        )
    missing = sorted(({str(key) for key in report["missing_keys"]} & parameters) - head)
    if missing:
        raise ValueError(
            f"--model_name_or_path {model_args.model_name_or_path!r} holds no weights {missing[:5]}, and fine-tuning "
            "must not start from random ones; give a pretrained model."
        )
    if model_args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return processor, model


def in_order_of_model(model_args: ModelArguments, splits: DatasetDict, column: str) -> DatasetDict:
    """The splits with their classes in the model's order, if it has the very same ones (it was fine-tuned on them).

    Its head would otherwise begin with each class standing for another one.
    """
    with naming("--model_name_or_path", model_args.model_name_or_path, "give a Hub id or a folder of a classifier"):
        config = load_config(
            bundled.resolve(model_args.model_name_or_path),
            cache_dir=model_args.cache_dir,
            revision=model_args.model_revision,
            token=model_args.token,
            trust_remote_code=model_args.trust_remote_code,
        )
    names = [str(name) for _, name in sorted((config.id2label or {}).items())]
    ours = splits["train"].features[column].names
    if names == ours or sorted(names) != sorted(ours):
        return splits
    number_of = [names.index(name) for name in ours]
    feature = ClassLabel(names=names)
    relabelled = {
        split: dataset.cast_column(column, Value("int64"))
        .map(lambda example: {column: number_of[example[column]]})
        .cast_column(column, feature)
        for split, dataset in splits.items()
    }
    return DatasetDict(relabelled)


def head_parameters(model) -> set[torch.nn.Parameter]:
    """The parameters of the classification head."""
    if hasattr(model, "timm_model"):
        return set(model.timm_model.get_classifier().parameters())
    return set(model.parameters()) - set(model.base_model.parameters())
