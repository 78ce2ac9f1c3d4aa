"""One process of `test_all_processes_stop_at_the_same_step`; what happened goes into a file."""

import json
import math
import os
import signal
import sys
from pathlib import Path

import torch
from conftest import SIZE, Images, make_model
from transformers import TrainerCallback, ViTImageProcessor

from hf_rft import RobustTrainer, RobustTrainingArguments
from hf_rft.training.distributed import NonFiniteError, leave_process_group
from hf_rft.training.interruption import TrainingPreempted


def make_trainer(output_dir: Path, **options) -> RobustTrainer:
    args = RobustTrainingArguments(
        output_dir=str(output_dir),
        attack="pgd",
        attack_steps=1,
        epsilon_schedule_type="constant",
        max_steps=4,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    return RobustTrainer(
        model=make_model("vit"), args=args, train_dataset=Images(32), processing_class=processor, **options
    )


class TerminateSecondProcess(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def main(folder: Path) -> None:
    whole = make_trainer(folder / "whole")
    whole.train()
    rank = whole.args.process_index
    found: dict = {"world_size": whole.args.world_size}

    try:
        make_trainer(folder / "run", callbacks=[TerminateSecondProcess()]).train()
    except TrainingPreempted as reason:
        found["preempted"] = str(reason)
    resumed = make_trainer(folder / "run")
    resumed.train(resume_from_checkpoint=True)
    expected = whole.model.state_dict()
    found["resumed_is_exact"] = all(
        torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items()
    )

    calls = []

    def loss(clean_logits, adversarial_logits, labels, **_):
        calls.append(1)
        values = torch.nn.functional.cross_entropy(adversarial_logits, labels, reduction="none")
        return values * math.nan if rank == 1 and len(calls) == 2 else values

    try:
        make_trainer(folder / "bad", robust_loss=loss).train()
    except NonFiniteError as error:
        found["not_finite"] = str(error)
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_process_group()
