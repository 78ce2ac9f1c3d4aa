"""One process of `test_distributed.py`: every case of training and evaluation, and what came out of them in a file."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from conftest import SIZE, Images, make_model, without_dropout
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTImageProcessor

from hf_rft import RobustTrainer, RobustTrainingArguments


PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
PROCESSOR = ViTImageProcessor(size={"height": SIZE, "width": SIZE})

# Name, loss, family, training examples, global batch, micro-batches a step, further arguments.
TRAINING_CASES = [
    ("at vit", "at", "vit", 27, 16, 1, {}),  # the last batch: 8 and 3 examples
    ("trades vit", "trades", "vit", 27, 8, 3, {}),  # the last step has one micro-batch: 3 and none
    ("mart vit", "mart", "vit", 20, 16, 1, {}),  # the last batch: 4 and none
    ("at timm", "at", "timm", 21, 8, 2, {}),  # the last step: 4 and 4, then 4 and 1
    ("trades timm", "trades", "timm", 20, 16, 1, {}),
    ("mart timm", "mart", "timm", 23, 8, 1, {}),
    ("unused parameters", "at", "dinov2", 13, 8, 1, {"gradient_checkpointing": True}),
    ("dropped last batch", "at", "vit", 27, 16, 1, {"dataloader_drop_last": True}),
    ("split batches", "at", "vit", 27, 16, 1, {"accelerator_config": {"split_batches": True}}),
    ("dispatched batches", "at", "vit", 27, 16, 1, {"accelerator_config": {"dispatch_batches": True}}),
    ("iterable dataset", "at", "vit", 27, 16, 1, {"max_steps": 4}),
]
# Examples and global batch: with two processes the last batch holds 4 and 1, 4 and none, 8 and 5, 4 and 4.
EVALUATION_CASES = [(13, 8), (10, 8), (13, 16), (16, 8)]


class Stream(torch.utils.data.IterableDataset):
    """Images that come one after the other, nobody knows how many."""

    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return (self.images[index] for index in range(len(self.images)))


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        # DDP leaves None or zeros for a parameter without gradient.
        none = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.steps.append({**none, **found})


def arguments(folder: str, batch_size: int, options: dict) -> dict:
    is_split = options.get("accelerator_config", {}).get("split_batches", False)
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch_size if is_split else batch_size // PROCESSES,
        "optim": "sgd",
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 2,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }


def robust_trainer(family: str, dataset, options: dict, **trainer_options) -> RobustTrainer:
    attack = {"epsilon": "8/255", "attack": "pgd", "attack_steps": 2, "epsilon_schedule_type": "constant"}
    return RobustTrainer(
        without_dropout(make_model(family)),
        RobustTrainingArguments(**{**attack, "eval_attack_steps": 3, **options}),
        train_dataset=dataset,
        processing_class=PROCESSOR,
        **trainer_options,
    )


def train(folder, loss, family, count, batch_size, accumulation, options) -> tuple[list, dict]:
    gradients, images = Gradients(), Images(count)
    trainer = robust_trainer(
        family,
        Stream(images) if "max_steps" in options else images,
        {
            **arguments(folder, batch_size, options),
            "robust_loss": loss,
            "gradient_accumulation_steps": accumulation,
            "per_device_eval_batch_size": 8 // PROCESSES,
        },
        eval_dataset=Images(13, seed=1),
        callbacks=[gradients],
    )
    trainer.train()
    metrics = trainer.evaluate() if "accelerator_config" not in options else {}
    metrics = {name: value for name, value in metrics.items() if "runtime" not in name and "second" not in name}
    is_searched = getattr(trainer.accelerator.ddp_handler, "find_unused_parameters", None)
    return gradients.steps, {"metrics": metrics, "looks for unused parameters": is_searched}


def evaluate(folder: str, count: int, batch_size: int) -> dict:
    """The whole report of a model whose predictions are the labels, apart from a few."""
    trainer = robust_trainer(
        "resnet", None, {**arguments(folder, 8, {}), "per_device_eval_batch_size": batch_size // PROCESSES}
    )
    images = Images(count)
    with torch.no_grad():
        images.labels = trainer.model.eval()((images.pixels - 0.5) / 0.5).logits.argmax(dim=1)
    images.labels[::5] = (images.labels[::5] + 1) % 4
    metrics = trainer.evaluate(images)
    metrics = {name: value for name, value in metrics.items() if "accuracy" in name or "robustness" in name}
    return {"metrics": metrics, "report": trainer.robustness_report.to_dict()}


def collectives(folder: str, attack_steps: int | None, options: dict) -> dict[str, int]:
    """How often each exchange between processes, named with its sizes, happens in three steps of training."""
    arguments_ = {**arguments(folder, 8, options), "max_steps": 3, "ddp_bucket_cap_mb": 0.002}
    if attack_steps is None:
        arguments_ |= {"ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False}
        trainer = Trainer(make_model("vit"), TrainingArguments(**arguments_), train_dataset=Images(48))
    else:
        arguments_ |= {"robust_loss": "trades", "attack_steps": attack_steps}
        trainer = robust_trainer("vit", Images(48), arguments_)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        trainer.train()
    return dict(Counter(f"{e.name} {e.input_shapes}" for e in profiler.events() if e.name.startswith("gloo:")))


def main(folder: str) -> None:
    torch.set_num_threads(1)
    result = {"training": {}, "evaluation": [evaluate(folder, *case) for case in EVALUATION_CASES]}
    for name, *case in TRAINING_CASES:
        gradients, result["training"][name] = train(folder, *case)
        for step, tensors in enumerate(gradients):
            save_file(tensors, Path(folder) / f"{name}-{step}-{PROCESSES}-{os.environ.get('RANK', 0)}.safetensors")
        result["training"][name]["steps"] = len(gradients)
    if PROCESSES > 1:
        accumulated = {"gradient_accumulation_steps": 2}
        result["exchanges"] = {str(steps): collectives(folder, steps, {}) for steps in (None, 1, 5)}
        result["exchanges, accumulated"] = {str(steps): collectives(folder, steps, accumulated) for steps in (None, 5)}
    result["world_size"] = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    name = f"result-{PROCESSES}-{os.environ.get('RANK', 0)}.json"
    (Path(folder) / name).write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
