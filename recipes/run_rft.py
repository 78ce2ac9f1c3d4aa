"""Robustly fine-tune an image classifier, and report how robust it became.

    accelerate launch recipes/run_rft.py                       # bundled model and data, hinge schedule, no download
    accelerate launch recipes/run_rft.py --seed 1 --output_dir outputs/seed1
    accelerate launch recipes/run_rft.py --config recipes/fashion_mnist/efficientnet_lite0_constant.yaml
    accelerate launch recipes/run_rft.py --model_name_or_path google/vit-base-patch16-224-in21k \\
        --dataset_name ethz/food101 --epsilon 4/255 --learning_rate 5e-5 --num_train_epochs 50
    accelerate launch recipes/run_rft.py --train_dir my_images/train --validation_dir my_images/validation

Writes into `--output_dir`: the model and its processor, all_results.json, trainer_state.json, README.md (model card)
and robustness_curve.png. Without --config, --model_name_or_path, --dataset_name and --train_dir the bundled recipe
recipes/fashion_mnist/efficientnet_lite0_hinge.yaml applies, under all other flags.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from torchvision import transforms
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, set_seed

from hf_rft import RobustTrainer, RobustTrainingArguments, bundled
from hf_rft.augmentation import SeededAugmentation
from hf_rft.checks import check_labels
from hf_rft.cli import parse_with_config
from hf_rft.plots import plot_robustness_curve


DEFAULT_CONFIG = Path(__file__).parent / "fashion_mnist" / "efficientnet_lite0_hinge.yaml"


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


@dataclass
class RecipeTrainingArguments(RobustTrainingArguments):
    """Robust-training arguments, plus what only this script does."""

    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the new classification head. Default: learning_rate."}
    )
    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(), metadata={"help": "Pin the memory of batches, for a GPU."}
    )


def parse_arguments(
    arguments: list[str] | None = None,
) -> tuple[ModelArguments, DataTrainingArguments, RecipeTrainingArguments]:
    """Flags over `--config`; without one the bundled recipe, unless a flag names another model or data."""
    return parse_with_config(
        (ModelArguments, DataTrainingArguments, RecipeTrainingArguments),
        arguments,
        description=__doc__,
        default_config=lambda given: (
            None if given & {"model_name_or_path", "dataset_name", "train_dir"} else DEFAULT_CONFIG
        ),
        tied={"epsilon_schedule_type": "epsilon_schedule_kwargs"},
    )


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
    config = AutoConfig.from_pretrained(
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
    model, report = AutoModelForImageClassification.from_pretrained(
        name_or_path,
        config=config,
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


def set_head_learning_rate(optimizer: torch.optim.Optimizer, model, learning_rate: float) -> None:
    """Move the head's parameters to groups of their own, with another learning rate."""
    head = head_parameters(model)
    for group in list(optimizer.param_groups):
        parameters = group["params"]
        group["params"] = [parameter for parameter in parameters if parameter not in head]
        moved = [parameter for parameter in parameters if parameter in head]
        if moved:
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def print_table(args: RobustTrainingArguments, metrics: dict[str, float]) -> None:
    rows = [("clean accuracy", metrics["eval_accuracy"])]
    rows += [
        (f"accuracy at {args.norm} {epsilon}", metrics[f"eval_accuracy_at_{epsilon}"])
        for epsilon in args.epsilons_as_text[1:]
    ]
    rows += [(f"expected robustness up to {args.epsilons_as_text[-1]}", metrics["eval_expected_robustness"])]
    width = max(len(name) for name, _ in rows)
    attack = f"{args.eval_attack_steps}-step {args.eval_attack}"
    print(f"\n{attack}, {metrics['eval_samples']} test examples, seed {args.seed}")
    for name, value in rows:
        print(f"  {name:<{width}}  {100 * value:5.1f} %")


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args = parse_arguments(arguments)
    set_seed(training_args.seed)

    # --- Data, model and processor ---
    splits = load_splits(model_args, data_args, seed=training_args.seed)
    class_names = splits["train"].features[data_args.label_column_name].names
    for split, dataset in splits.items():
        check_labels(
            f"Split {split!r}", dataset.with_format("numpy")[data_args.label_column_name][:], len(class_names)
        )
    processor, model = load_model(model_args, class_names)

    # --- Transforms ---
    mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"
    augmentation = transforms.Compose(
        [
            transforms.RandomHorizontalFlip(data_args.horizontal_flip),
            transforms.RandomRotation(data_args.rotation),
            transforms.ColorJitter(*[data_args.color_jitter] * 3),
        ]
    )

    def prepare(example, transform=None):
        image = example[data_args.image_column_name].convert(mode)
        image = image if transform is None else transform(image)
        pixel_values = processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixel_values, "labels": example[data_args.label_column_name]}

    def prepare_batch(batch):
        examples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        prepared = [prepare(example) for example in examples]
        return {key: [example[key] for example in prepared] for key in prepared[0]}

    train_dataset = SeededAugmentation(
        splits["train"], lambda example: prepare(example, augmentation), seed=training_args.seed
    )

    # --- Train ---
    trainer = RobustTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=splits["validation"].with_transform(prepare_batch),
        data_collator=collate,
        processing_class=processor,
    )
    if training_args.head_learning_rate is not None:
        set_head_learning_rate(trainer.create_optimizer(), model, training_args.head_learning_rate)
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()

    # --- Evaluate on data that training never saw ---
    metrics = trainer.evaluate(splits["test"].with_transform(prepare_batch))
    metrics["eval_samples"] = len(splits["test"])
    settings = {
        **trainer.evaluation_settings(),
        "model": model_args.model_name_or_path,
        "model_revision": getattr(model.config, "_commit_hash", None),
        "dataset": data_args.dataset_name or data_args.test_dir or data_args.validation_dir or data_args.train_dir,
        "dataset_fingerprint": splits["test"]._fingerprint,
        "split": data_args.test_split,
    }
    trainer.save_metrics("eval", {**metrics, "eval_settings": settings})
    if trainer.is_world_process_zero():
        epsilons = training_args.epsilon_grid
        accuracies = [metrics[f"eval_accuracy_at_{epsilon}"] for epsilon in training_args.epsilons_as_text]
        path = Path(training_args.output_dir) / "robustness_curve.png"
        plot_robustness_curve({model_args.model_name_or_path: (epsilons, accuracies)}, training_args.norm, path)
        print_table(training_args, metrics)

    # --- Share ---
    base_model = model_args.model_name_or_path
    card = {
        "finetuned_from": None if base_model.startswith(bundled.PREFIX) else base_model,  # only if it is on the Hub
        "tasks": "image-classification",
        "dataset": (data_args.dataset_name or Path(data_args.train_dir).name).removeprefix(bundled.PREFIX),
        "tags": ["image-classification", "adversarial-robustness", "robust-fine-tuning"],
    }
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    return metrics


if __name__ == "__main__":
    main()
