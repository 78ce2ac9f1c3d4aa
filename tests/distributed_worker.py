"""One process of `test_distributed.py`: every case of training and evaluation, and what came out of them in a file.

In float64, because the batches differ: the sign of an L-inf step would make a whole step out of a rounding error.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import SIZE, Images, make_adapted, make_model, without_dropout
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTImageProcessor

from hf_rft import RobustTrainer, RobustTrainingArguments
from hf_rft.training.alarm_callback import AlarmCallback
from hf_rft.training.distributed import leave_process_group


DTYPE = torch.float64
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
PROCESSOR = ViTImageProcessor(size={"height": SIZE, "width": SIZE})

# Starts at once, since 4 classes give more than `low`, and reaches half of epsilon or so.
ADAPTIVE = {
    "epsilon_schedule_type": "adaptive",
    "num_train_epochs": 5,
    "logging_strategy": "steps",
    "logging_steps": 1,
}
# Name, loss, family, training examples, global batch, micro-batches a step, further arguments.
TRAINING_CASES = [
    ("at vit", "at", "vit", 27, 16, 1, {}),  # the last batch: 8 and 3 examples
    ("trades vit", "trades", "vit", 27, 8, 3, {}),  # the last step has one micro-batch: 3 and none
    ("mart vit", "mart", "vit", 20, 16, 1, {}),  # the last batch: 4 and none
    ("at timm", "at", "timm", 21, 8, 2, {}),  # the last step: 4 and 4, then 4 and 1
    ("trades timm", "trades", "timm", 20, 16, 1, {}),
    ("mart timm", "mart", "timm", 23, 8, 1, {}),
    ("unused parameters", "at", "dinov2", 13, 8, 1, {"gradient_checkpointing": True}),
    ("dropped last batch", "at", "vit", 27, 16, 1, {"dataloader_drop_last": True, "num_train_epochs": 2}),
    ("split batches", "at", "vit", 27, 16, 1, {"accelerator_config": {"split_batches": True}}),
    ("dispatched batches", "at", "vit", 27, 16, 1, {"accelerator_config": {"dispatch_batches": True}}),
    ("iterable dataset", "at", "vit", 27, 16, 1, {"max_steps": 3}),
    ("adaptive epsilon", "at", "vit", 27, 16, 1, ADAPTIVE),
    ("perturbed weights", "trades", "vit", 27, 8, 3, {"awp_gamma": 0.01, "awp_warmup_steps": 0}),
    ("head first", "at", "vit", 27, 16, 1, {"head_warmup_steps": 1}),
    ("averaged weights", "at", "timm", 27, 16, 1, {"weight_averaging": "ema", "freeze_batch_norm": True}),
    ("adapters", "trades", "adapted vit", 27, 8, 3, {}),
]
# Cases that are trained with FSDP2 as well: the layers whose weights are gathered together.
FSDP_CASES = {"trades vit": "ViTLayer", "at timm": "BasicBlock"}
# Examples and global batch: with two processes the last batch holds 4 and 1, 4 and none, 8 and 5, 4 and 4.
EVALUATION_CASES = [(13, 8), (10, 8), (13, 16), (16, 8)]


class Stream(torch.utils.data.IterableDataset):
    """Images that come one after the other, nobody knows how many."""

    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return (self.images[index] for index in range(len(self.images)))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        # DDP leaves None or zeros for a parameter without gradient.
        none = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
        found = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
        self.steps.append({**none, **found})


class FullyShardedOnCPU(RobustTrainer):
    """accelerate divides weights over GPUs only; FSDP2 itself works with any processes."""

    def create_accelerator_and_postprocess(self):
        PartialState()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


def fully_sharded(layer: str) -> dict:
    config = {"version": 2, "transformer_layer_cls_to_wrap": [layer], "state_dict_type": "FULL_STATE_DICT"}
    return {"fsdp": True, "fsdp_config": config}


def arguments(folder: str, batch_size: int, options: dict) -> dict:
    is_split = options.get("accelerator_config", {}).get("split_batches", False)
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch_size if is_split else batch_size // PROCESSES,
        "optim": "sgd",
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }


def robust_trainer(
    family: str, dataset, options: dict, trainer_class: type[RobustTrainer] = RobustTrainer, **trainer_options
) -> RobustTrainer:
    attack = {"epsilon": "8/255", "attack": "pgd", "attack_steps": 2, "epsilon_schedule_type": "constant"}
    return trainer_class(
        without_dropout(make_adapted(family[8:]) if family.startswith("adapted ") else make_model(family)).to(DTYPE),
        RobustTrainingArguments(**{**attack, "eval_attack_steps": 3, **options}),
        train_dataset=dataset,
        processing_class=PROCESSOR,
        **trainer_options,
    )


def train(folder, loss, family, count, batch_size, accumulation, options, **trainer_options) -> tuple[list, dict]:
    gradients, images = Gradients(), Images(count, dtype=DTYPE)
    trainer = robust_trainer(
        family,
        Stream(images) if "max_steps" in options else images,
        {
            **arguments(folder, batch_size, options),
            "robust_loss": loss,
            "gradient_accumulation_steps": accumulation,
            "per_device_eval_batch_size": 8 // PROCESSES,
        },
        eval_dataset=Images(13, seed=1, dtype=DTYPE),
        callbacks=[gradients],
        **trainer_options,
    )
    trainer.train()
    metrics = trainer.evaluate() if "accelerator_config" not in options else {}
    metrics = {name: value for name, value in metrics.items() if "runtime" not in name and "second" not in name}
    is_searched = getattr(trainer.accelerator.ddp_handler, "find_unused_parameters", None)
    return gradients.steps, {"metrics": metrics, "looks for unused parameters": is_searched}


def evaluate(folder: str, count: int, batch_size: int, options: dict, *trainer_class) -> dict:
    """The whole report of a model whose predictions are the labels, apart from a few."""
    options = {**arguments(folder, 8, options), "per_device_eval_batch_size": batch_size // PROCESSES}
    options |= {"max_steps": 1, "learning_rate": 0.0}
    trainer = robust_trainer("timm", Images(8, dtype=DTYPE), options, *trainer_class)
    images = Images(count, dtype=DTYPE)
    with torch.no_grad():
        images.labels = trainer.model.eval()((images.pixels - 0.5) / 0.5).logits.argmax(dim=1)
    images.labels[::5] = (images.labels[::5] + 1) % 4
    if "fsdp" in options:
        with pytest.raises(ValueError, match="With FSDP2 only a trained model can be evaluated"):
            trainer.evaluate(images)
        trainer.train()  # without learning anything
    metrics = trainer.evaluate(images)
    metrics = {name: value for name, value in metrics.items() if "accuracy" in name or "robustness" in name}
    return {"metrics": metrics, "report": trainer.robustness_report.to_dict()}


def collectives(folder: str, attack_steps: int | None, options: dict, *trainer_class) -> dict[str, int]:
    """How often each exchange between processes, named with its sizes, happens in three steps of training."""
    images = Images(48, dtype=DTYPE)
    arguments_ = {**arguments(folder, 8, options), "max_steps": 3, "ddp_bucket_cap_mb": 0.002}
    if attack_steps is None:
        arguments_ |= {"ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False}
        trainer = Trainer(make_model("vit").to(DTYPE), TrainingArguments(**arguments_), train_dataset=images)
    else:
        arguments_ |= {"robust_loss": "trades", "attack_steps": attack_steps}
        trainer = robust_trainer("vit", images, arguments_, *trainer_class)
        trainer.remove_callback(AlarmCallback)  # which looks at the model now and then, not in every step
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        trainer.train()
    return dict(Counter(f"{e.name} {e.input_shapes}" for e in profiler.events() if e.name.startswith("gloo:")))


def main(folder: str) -> None:
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", 0)
    result = {"training": {}, "evaluation": [evaluate(folder, *case, {}) for case in EVALUATION_CASES]}

    def keep(name, gradients, outcome):
        for step, tensors in enumerate(gradients):
            save_file(tensors, Path(folder) / f"{name}-{step}-{PROCESSES}-{rank}.safetensors")
        result["training"][name] = {**outcome, "steps": len(gradients)}

    for name, *case in TRAINING_CASES:
        keep(name, *train(folder, *case))
    if PROCESSES > 1:
        accumulated, by_layer = {"gradient_accumulation_steps": 2}, fully_sharded("ViTLayer")
        result["exchanges"] = {str(steps): collectives(folder, steps, {}) for steps in (None, 1, 5)}
        result["exchanges, accumulated"] = {str(steps): collectives(folder, steps, accumulated) for steps in (None, 5)}

        for name, *case, options in TRAINING_CASES:
            if name in FSDP_CASES:
                options = options | fully_sharded(FSDP_CASES[name])
                keep(f"{name}, fsdp", *train(folder, *case, options, trainer_class=FullyShardedOnCPU))
        result["exchanges, fsdp"] = [collectives(folder, steps, by_layer, FullyShardedOnCPU) for steps in (1, 5)]
        options = fully_sharded("BasicBlock")
        result["evaluation, fsdp"] = [
            evaluate(folder, *case, options, FullyShardedOnCPU) for case in EVALUATION_CASES[:2]
        ]
    result["world_size"] = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    (Path(folder) / f"result-{PROCESSES}-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
    leave_process_group()
