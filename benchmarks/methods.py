"""What does each option of training cost, relative to training without it?

```bash
python benchmarks/methods.py
```

Random weights and images: neither changes the cost of a step. In each round every trainer makes a few steps, in
another order each time; a ratio divides two times of the same round. Time is that of the processor, with one thread
(`OMP_NUM_THREADS=1`); memory is what the step allocates, at its peak, above what was there before.
"""

import argparse
import contextlib
import copy
import random
import statistics
import tempfile
from typing import Any

import instruments
import torch
from train_step import RandomImages, make_model
from transformers import TrainerCallback, ViTImageProcessor

from hf_rft import RobustTrainer, RobustTrainingArguments
from hf_rft.models.adapters import add_lora
from hf_rft.training.alarm_callback import AlarmCallback
from hf_rft.utils.markdown import markdown_table


DEFAULT = {"attack": "pgd", "attack_steps": 3}
METHODS: dict[str, dict[str, Any]] = {
    "default: PGD-3, AT": {},
    "`attack: nfgsm`": {"attack": "nfgsm", "attack_steps": 1},
    "`attack: fgsm`": {"attack": "fgsm", "attack_steps": 1},
    "`attack_steps: 7`": {"attack_steps": 7},
    "`robust_loss: trades`": {"robust_loss": "trades"},
    "`weight_averaging: ema`": {"weight_averaging": "ema"},
    "`awp_gamma: 0.01`": {"awp_gamma": 0.01, "awp_warmup_steps": 0},
    "`mixup_alpha: 0.2`": {"mixup_alpha": 0.2},
    "head only (`head_warmup_steps`)": {"head_warmup_steps": 10**6},
    "`layer_decay: 0.75`": {"layer_decay": 0.75},
    "`lora_r: 16`": {"lora_r": 16},
}
WARMUP = 2  # steps of each training that are not measured


class Clock(TrainerCallback):
    """Measures the steps of a training from the end of the one before, the last of them with its memory."""

    def __init__(self, steps: int):
        self.steps, self.readings, self._clock = steps, [], contextlib.ExitStack()

    def on_step_end(self, args, state, control, **kwargs):
        self._clock.close()
        if state.global_step < WARMUP or state.global_step == WARMUP + self.steps:
            return
        self.readings.append({})
        is_last = state.global_step == WARMUP + self.steps - 1
        instrument = instruments.peak_memory if is_last else instruments.seconds
        self._clock.enter_context(instrument(torch.device("cpu"), self.readings[-1]))


def one_training(args: argparse.Namespace, model: torch.nn.Module, options: dict[str, Any]) -> dict[str, float]:
    clock, model, options = Clock(args.steps + 1), copy.deepcopy(model), dict(options)
    if rank := options.pop("lora_r", None):
        model = add_lora(model, r=rank)
    with tempfile.TemporaryDirectory() as folder:
        trainer = RobustTrainer(
            model,
            RobustTrainingArguments(
                folder,
                **{**DEFAULT, **options},
                epsilon_schedule_type="constant",
                max_steps=WARMUP + args.steps + 1,
                per_device_train_batch_size=args.batch_size,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                seed=0,
            ),
            train_dataset=RandomImages(args.batch_size, args.image_size, WARMUP + args.steps + 1),
            processing_class=ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3),
            callbacks=[clock],
        )
        trainer.remove_callback(AlarmCallback)  # its probes are for every few dozen steps
        trainer.train()
    *timed, last = clock.readings
    return {"seconds": statistics.median(reading["cpu_seconds"] for reading in timed), "peak": last["peak_bytes"]}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each training")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    model = make_model(args.model, args.image_size).to(memory_format=torch.channels_last)
    names, rounds = list(METHODS), []
    for number in range(args.rounds):
        order = random.Random(number).sample(names, len(names))
        rounds.append({name: one_training(args, model, METHODS[name]) for name in order})
    rows = []
    for name in names:
        ratios = sorted(of_round[name]["seconds"] / of_round[names[0]]["seconds"] for of_round in rounds)
        peak = rounds[0][name]["peak"] / rounds[0][names[0]]["peak"]
        rows.append(
            {"name": name, "time": statistics.median(ratios), "least": ratios[0], "most": ratios[-1], "peak": peak}
        )
    header = ["training", "time of a step", "peak memory of a step"]
    cells = []
    for row in rows:
        time = f"{row['time']:.2f} ({row['least']:.2f} to {row['most']:.2f})"
        cells.append([row["name"], time, f"{row['peak']:.2f}"])
    print(markdown_table(header, cells))
    return rows


if __name__ == "__main__":
    main()
