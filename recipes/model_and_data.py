"""Which pretrained model and which images: arguments of the recipes, and what they stand for."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from transformers import AutoImageProcessor

from hf_rft import bundled
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


@dataclass
class DataTrainingArguments:
    """Which images to train and evaluate on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, local dataset folder, or bundled: name. Default: the bundled data."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder of images, one sub-folder a class."})
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
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"--train_val_split {self.train_val_split} must lie between 0 and 1.")
        if not 0 <= self.horizontal_flip <= 1:
            raise ValueError(f"--horizontal_flip {self.horizontal_flip} is no probability; give a number in [0, 1].")
        for name in ("color_jitter", "rotation"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must be 0 (off) or more.")
        for name in ("max_train_samples", "max_eval_samples", "max_test_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1.")


def load_splits(model_args: ModelArguments, data_args: DataTrainingArguments, seed: int) -> DatasetDict:
    """Splits `train`, `validation` (for choosing checkpoints) and `test` (for the final numbers), in fixed subsets.

    Sets `data_args.test_split` to the split that the final numbers are from.
    """
    if data_args.train_dir is not None:
        folders = {"train": data_args.train_dir, "validation": data_args.validation_dir, "test": data_args.test_dir}
        data_files = {split: f"{folder}/**" for split, folder in folders.items() if folder is not None}
        for folder in filter(None, folders.values()):
            if not Path(folder).is_dir():
                raise FileNotFoundError(f"{folder} is not a folder; it should hold one folder of images a class.")
        splits = load_dataset("imagefolder", data_files=data_files, cache_dir=model_args.cache_dir)
    else:
        splits = load_dataset(
            bundled.resolve(data_args.dataset_name),
            data_args.dataset_config_name,
            cache_dir=model_args.cache_dir,
            token=model_args.token,
        )
    if "train" not in splits:
        raise ValueError(f"The dataset has no split 'train', it has {sorted(splits)}.")
    for flag, column in (
        ("image_column_name", data_args.image_column_name),
        ("label_column_name", data_args.label_column_name),
    ):
        columns = splits["train"].column_names
        if column not in columns:
            raise ValueError(f"--{flag} {column!r} is not a column of the dataset; its columns are {columns}.")
    if len(splits["train"]) == 0:
        raise ValueError("The training split is empty; robust fine-tuning needs at least one example.")
    image_type = splits["train"].features[data_args.image_column_name]
    if not isinstance(image_type, Image):
        raise ValueError(
            f"--image_column_name {data_args.image_column_name!r} holds {image_type}, not images; cast it with "
            "`cast_column(..., datasets.Image())` if it holds paths or bytes."
        )
    splits = encode_labels(splits, data_args.label_column_name)

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
    if data_args.test_split is None:
        data_args.test_split = "test" if "test" in splits else "validation"
    if data_args.test_split not in splits:
        raise ValueError(
            f"--test_split {data_args.test_split!r} is not a split of the dataset, it has {sorted(splits)}."
        )
    splits["test"] = splits[data_args.test_split]
    limits = {
        "train": data_args.max_train_samples,
        "validation": data_args.max_eval_samples,
        "test": data_args.max_test_samples,
    }
    return DatasetDict({split: subset(splits[split], limit, seed) for split, limit in limits.items()})


def encode_labels(splits: DatasetDict, column: str) -> DatasetDict:
    """Labels as indices of the training split's classes, the same in all splits."""
    feature = splits["train"].features[column]
    if not isinstance(feature, ClassLabel):
        classes = sorted(splits["train"].unique(column))
        feature = ClassLabel(names=[str(name) for name in classes])
        for split, dataset in splits.items():
            unknown = sorted(set(dataset.unique(column)) - set(classes))
            if unknown:
                raise ValueError(f"Split {split!r} has labels {unknown} that the training split has not: {classes}.")
        features = Features({**splits["train"].features, column: feature})
        splits = splits.map(lambda example: {column: feature.str2int(str(example[column]))}, features=features)
    for split, dataset in splits.items():
        if dataset.features[column].names != feature.names:
            raise ValueError(
                f"Split {split!r} has the classes {dataset.features[column].names}, the training split "
                f"{feature.names}; give all splits the same classes in the same order."
            )
    return splits


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
    model, report = load_classifier(
        name_or_path,
        config,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        output_loading_info=True,
        **hub_options,
    )
    head_tensors = head_parameters(model)
    head = {name for name, parameter in model.named_parameters() if parameter in head_tensors}
    lost = sorted({str(key[0]) for key in report["mismatched_keys"]} - head)
    if lost:
        raise ValueError(
            f"The pretrained weights {lost} do not fit {name_or_path} with --image_size {size}, and fine-tuning must "
            "not start from random ones; leave --image_size out, or use a model that takes any size."
        )
    if model_args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return processor, model


def head_parameters(model) -> set[torch.nn.Parameter]:
    """The parameters of the classification head."""
    if hasattr(model, "timm_model"):
        return set(model.timm_model.get_classifier().parameters())
    return set(model.parameters()) - set(model.base_model.parameters())
