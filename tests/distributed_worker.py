"""One process of `test_distributed.py`: two robust SGD steps, an evaluation, and the result in a file."""

import json
import os
import sys

import torch
from conftest import SIZE, Images, make_model, without_dropout
from transformers import ViTImageProcessor

from hf_rft import RobustTrainer, RobustTrainingArguments


def main(folder: str, robust_loss: str, family: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    trainer = RobustTrainer(
        model=without_dropout(make_model(family)),
        args=RobustTrainingArguments(
            output_dir=folder,
            robust_loss=robust_loss,
            epsilon="8/255",
            attack="pgd",
            attack_steps=2,
            eval_attack_steps=2,
            epsilon_schedule_type="constant",
            max_steps=2,
            per_device_train_batch_size=16 // processes,
            per_device_eval_batch_size=8 // processes,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=Images(32),
        eval_dataset=Images(13, seed=1),
        processing_class=ViTImageProcessor(size={"height": SIZE, "width": SIZE}),
    )
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), f"{folder}/weights-{processes}.pt")
        metrics = {name: value for name, value in metrics.items() if "accuracy" in name or "robustness" in name}
        with open(f"{folder}/result-{processes}.json", "w") as file:
            json.dump({"world_size": trainer.args.world_size, "metrics": metrics}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
