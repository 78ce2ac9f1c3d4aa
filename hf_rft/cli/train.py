"""Robustly fine-tune an image classifier, and report how robust it became.

    hf-rft train                                    # bundled model and data, hinge schedule, no download
    hf-rft train --seed 1 --output_dir outputs/seed1
    hf-rft train --config fashion_mnist/efficientnet_lite0_constant
    hf-rft train --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name ethz/food101 \\
        --epsilon 4/255 --learning_rate 5e-5 --num_train_epochs 50 --bf16
    hf-rft train --train_dir my_images/train --validation_dir my_images/validation
    hf-rft train --train_dir my_images              # the same, if these folders are all it holds
    hf-rft train --accelerate_config multi_gpu --num_processes 8 --dataset_name ethz/food101

Writes into --output_dir: the model and its processor, robustness.json (the evidence), README.md (model card) with
robustness_curve.png and epsilon_schedule.png, all_results.json and trainer_state.json. --push_to_hub publishes them.
Without --config, --model_name_or_path, --dataset_name and --train_dir the recipe
fashion_mnist/efficientnet_lite0_hinge applies, under all other flags.

Exit status: 0 done; 2 bad input; 3 stopped by an alarm (--abort_on_alarm) or a loss that is not finite; 75 preempted
(SIGTERM); 130 Ctrl-C. 75, 130 and an alarm write a checkpoint after the step in progress; the same command with
--resume auto goes on from there, also after a crash.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from PIL import Image
from torchvision import transforms
from transformers import set_seed

from ..data import bundled
from ..data.augmentation import SeededAugmentation
from ..data.examples import num_image_channels
from ..data.images import check_images, to_mode
from ..data.labels import names_of_missing_classes
from ..data.loading import DataTrainingArguments, display_name, load_splits, split_options
from ..evaluation.evaluate import evaluate_robustness
from ..evaluation.evaluator import robust_metrics
from ..evaluation.tiers import TIERS
from ..hub.pretrained import ModelArguments, in_order_of_model, load_model, load_model_and_processor
from ..hub.pushing import PushError
from ..models.classifier import check_labels
from ..training.arguments import TIED, RobustTrainingArguments
from ..training.checkpoints import all_checkpoints, check_resumable
from ..training.distributed import NonFiniteError
from ..training.interruption import (
    AlarmRaised,
    TrainingCancelled,
    TrainingInterrupted,
    TrainingPreempted,
    cancellation_requests,
)
from ..training.resuming import find_checkpoint
from ..training.trainer import RobustTrainer
from ..utils.files import check_writable
from .exits import INTERRUPTED, PREEMPTED, STOPPED
from .parsing import parse_with_config, published_command
from .recipes import find_file


EXIT_STATUS = {
    TrainingPreempted: PREEMPTED,
    TrainingCancelled: INTERRUPTED,
    AlarmRaised: STOPPED,
    NonFiniteError: STOPPED,
}

DEFAULT_RECIPE = "fashion_mnist/efficientnet_lite0_hinge"

# What --help shows; the rest is for --help_all.
SECTIONS = {
    "model": ["model_name_or_path", "image_size", "channels_last"],
    "data": [
        *("dataset_name", "train_dir", "validation_dir", "test_dir", "image_column_name", "label_column_name"),
        *("test_split", "train_val_split", "max_train_samples", "max_eval_samples", "max_test_samples"),
        *("horizontal_flip", "color_jitter", "rotation"),
    ],
    "threat model": ["norm", "epsilon"],
    "attack": ["attack", "attack_steps", "attack_steps_schedule", "freeze_batch_norm"],
    "epsilon schedule": ["epsilon_schedule_type", "epsilon_schedule_kwargs"],
    "loss": ["robust_loss", "robust_loss_weight"],
    "evaluation": [
        *("test_tier", "eval_attack", "eval_attack_steps", "eval_epsilons", "eval_strategy"),
        "eval_attack_during_training",
        *("load_best_model_at_end", "per_device_eval_batch_size"),
    ],
    "training": [
        *("config", "output_dir", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("learning_rate", "head_learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"),
        *("bf16", "seed", "save_strategy", "resume", "abort_on_alarm", "report_to"),
        "weight_averaging",
    ],
    "sharing": ["push_to_hub", "hub_model_id"],
    "several processes": ["accelerate_config", "num_processes"],
    "help": ["help", "help_all"],
}


def default_num_workers() -> int:
    """Enough that a GPU does not wait; on CPU, workers would take the cores from the model."""
    if not torch.cuda.is_available():
        return 0
    return min(4, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclass
class RecipeTrainingArguments(RobustTrainingArguments):
    """Robust-training arguments, plus what only this script does."""

    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(), metadata={"help": "Pin the memory of batches, for a GPU."}
    )
    dataloader_num_workers: int = field(
        default_factory=default_num_workers,
        metadata={
            "help": "Processes, for each process of training, that prepare its batches meanwhile. Default: up to 4 "
            "where there is a GPU, else 0."
        },
    )
    test_tier: str | None = field(
        default=None,
        metadata={
            "help": "How strong the attacks of the final numbers are. Default: those of eval_attack.",
            "choices": list(TIERS),
        },
    )
    resume: str = field(
        default="no",
        metadata={
            "help": "auto: go on from the last complete checkpoint in output_dir, or start anew if there is none.",
            "choices": ["no", "auto"],
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.resume == "auto" and self.resume_from_checkpoint is not None:
            raise ValueError("Give either --resume auto or --resume_from_checkpoint, not both.")


def check_start(args: RecipeTrainingArguments) -> None:
    """Refuse a checkpoint to resume from that is none, and to mix the checkpoints of two runs: a later `--resume auto`
    could go on from the wrong one.
    """
    if args.resume_from_checkpoint is not None:
        check_resumable(args.resume_from_checkpoint)
        return
    found = all_checkpoints(args.output_dir)
    if found and args.resume == "no":
        raise ValueError(
            f"--output_dir {args.output_dir} holds checkpoints of an earlier run ({found[-1].name}); add --resume "
            "auto to go on from there, name another folder, or delete them."
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
            None
            if given & {"help", "model_name_or_path", "dataset_name", "train_dir"}
            else find_file("--config", DEFAULT_RECIPE)
        ),
        tied=TIED,
        sections=SECTIONS,
        is_launched=True,
    )


def prepare(
    example: dict[str, Any],
    *,
    columns: tuple[str, str],
    mode: str,
    processor: Any,
    transform: Callable[[Image.Image], Image.Image] | None = None,
) -> dict[str, Any]:
    """One example as the model takes it; `columns` hold the image and the label. (Workers need it at module level.)"""
    image_column, label_column = columns
    image = to_mode(example[image_column], mode)
    image = image if transform is None else transform(image)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"][0]
    return {"pixel_values": pixel_values, "labels": example[label_column]}


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args = parse_arguments(arguments)
    set_seed(training_args.seed)
    check_writable("--output_dir", training_args.output_dir)
    check_start(training_args)

    # --- Data, model and processor ---
    splits = load_splits(data_args, training_args.seed, cache_dir=model_args.cache_dir, token=model_args.token)
    splits = in_order_of_model(model_args, splits, data_args.label_column_name)
    class_names = splits["train"].features[data_args.label_column_name].names
    for split, dataset in splits.items():
        labels = dataset.with_format("numpy")[data_args.label_column_name][:]
        check_labels(f"Split {split!r}", labels, len(class_names))
        if split == "train" and (absent := names_of_missing_classes(labels, class_names)):
            print(f"WARNING: no training example has the class {', '.join(absent)}.", file=sys.stderr)
        if data_args.check_images:
            share = range(training_args.process_index, len(dataset), training_args.world_size)
            check_images(f"Split {split!r}", dataset, data_args.image_column_name, share)
    processor, model = load_model(model_args, class_names)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    check_writable("--output_dir", training_args.output_dir, needed_bytes=weights)

    # --- Transforms ---
    columns = (data_args.image_column_name, data_args.label_column_name)
    mode = "L" if num_image_channels(model.config) == 1 else "RGB"
    prepared = partial(prepare, columns=columns, mode=mode, processor=processor)
    augmentation = transforms.Compose(
        [
            transforms.RandomHorizontalFlip(data_args.horizontal_flip),
            transforms.RandomRotation(data_args.rotation),
            transforms.ColorJitter(*[data_args.color_jitter] * 3),
        ]
    )

    train_dataset = SeededAugmentation(
        splits["train"], partial(prepared, transform=augmentation), seed=training_args.seed
    )

    # --- Train ---
    try:
        trainer = RobustTrainer(
            model=model,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=SeededAugmentation(splits["validation"], prepared, seed=training_args.seed),
            data_collator=collate,
            processing_class=processor,
        )
    except ValueError as error:  # also of `Trainer` itself, about arguments that only it knows to be wrong
        raise ValueError(f"The training arguments cannot be used: {error}") from error
    checkpoint = find_checkpoint(trainer) if training_args.resume == "auto" else training_args.resume_from_checkpoint
    try:
        with cancellation_requests(trainer.interruption):
            result = trainer.train(resume_from_checkpoint=checkpoint)
    except (TrainingInterrupted, NonFiniteError) as reason:
        print(f"\n{reason} The same command with --resume auto goes on from there.", file=sys.stderr)
        sys.exit(EXIT_STATUS[type(reason)])
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()

    # --- Evaluate ---
    if trainer.is_fsdp_enabled:  # every process evaluates by itself, and needs whole weights for that: those saved
        model, _ = load_model_and_processor("--output_dir", training_args.output_dir)
        model.to(training_args.device)
    model.eval()  # training leaves it in the other mode
    report = evaluate_robustness(
        model,
        splits["test"],
        processor,
        norm=training_args.norm,
        epsilons=training_args.epsilon_grid,
        tier=training_args.test_tier or trainer.evaluator.tier,
        batch_size=training_args.per_device_eval_batch_size,
        seed=training_args.seed,
        autocast_dtype=torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None,
        image_column=data_args.image_column_name,
        label_column=data_args.label_column_name,
        progress_bar=not training_args.disable_tqdm,
    )
    measured = report.settings["dataset"]
    measured["split"] = data_args.test_split
    measured["is_held_out"] = data_args.test_split not in ("train", "validation")
    if data_args.train_dir is not None:
        measured["name"] = display_name(data_args.train_dir)
    if data_args.test_split not in (splits["test"].info.splits or [data_args.test_split]):
        measured["split_off"] = split_options(data_args, training_args.seed)
    if len(report) == data_args.max_test_samples:
        measured["shuffle_seed"] = training_args.seed
    trainer.robustness_report = report
    found = robust_metrics(report.predictions, report.labels, report.epsilons, trainer.threat_model.epsilon)
    metrics = {**{f"eval_{name}": value for name, value in found.items()}, "eval_samples": len(report)}
    trainer.save_metrics("eval", {**metrics, "eval_settings": report.settings})
    if trainer.is_world_process_zero():
        print(f"\n{report.table()}\n\nWritten to {training_args.output_dir}")

    # --- Share ---
    trainer.command = published_command("hf-rft train", arguments)
    data = str(data_args.train_dir or data_args.dataset_name)
    is_on_hub = not data.startswith(bundled.PREFIX) and not os.path.isdir(data)
    card = {
        "finetuned_from": model_args.model_name_or_path,
        "dataset": display_name(data),
        "dataset_tags": data if is_on_hub else None,
    }
    if not training_args.push_to_hub:
        trainer.create_model_card(**card)
        return metrics
    try:
        trainer.push_to_hub(**card)
    except PushError as error:  # the model is trained and saved all the same
        print(f"\n{error}", file=sys.stderr)
    return metrics
