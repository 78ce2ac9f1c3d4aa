"""What does one robust training step cost, against the least there is to compute and against other people's loops?

```bash
python benchmarks/train_step.py --model tf_efficientnet_lite0 --image_size 64 --batch_size 16
python benchmarks/train_step.py --model vit_base_patch16_224 --batch_size 256 --device cuda --dtype bfloat16
```

The model has random weights, its images are random: neither changes the cost of a step. `RobustTrainer` runs its own
`train()`. Between two of its steps a callback stops the clock, lets each of the others make one step, and starts the
clock again. So a step of ours is all that the training loop does from one step's end to the next one's: the next batch
from memory, the attack, forward and backward pass, clipping, optimizer, schedulers, callbacks. What is left out: the
probe of the alarms, which runs every few dozen steps, and logs. A ratio divides two times of the same round.
"""

import argparse
import contextlib
import copy
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import instruments
import torch
import training_loops
from instruments import MEMORY_FORMATS, Reading, Roofs
from transformers import (
    AutoModelForImageClassification,
    TimmWrapperConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessor,
)

from hf_rft import PixelNormalization, RobustTrainer, RobustTrainingArguments
from hf_rft.threat_model import parse_epsilon
from hf_rft.training.alarm_callback import AlarmCallback


EPSILON = "4/255"
# No layer inside the models has as many outputs: passes are counted there.
NUM_LABELS = 10
OURS, PLAIN, IDEAL = "RobustTrainer", "Trainer, no attack", "ideal"


class Contender(NamedTuple):
    step: Callable[[], None]
    resident: Callable[[], int]  # bytes


class RandomImages(torch.utils.data.Dataset):
    """Batches of the same images, normalised with mean and std 0.5, `num_batches` times: one long epoch."""

    def __init__(self, batch_size: int, size: int, num_batches: int):
        generator = torch.Generator().manual_seed(0)
        self.pixel_values = 2 * torch.rand(batch_size, 3, size, size, generator=generator) - 1
        self.labels = torch.randint(NUM_LABELS, (batch_size,), generator=generator).tolist()
        self.num_batches = num_batches

    def __len__(self) -> int:
        return self.num_batches * len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = index % len(self.labels)
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


def is_transformer(name: str) -> bool:
    return name.startswith(("vit", "deit"))


def make_model(name: str, image_size: int) -> torch.nn.Module:
    """A timm model as transformers wraps it, with random weights."""
    torch.manual_seed(0)
    pretrained = {"input_size": [3, image_size, image_size], "mean": [0.5] * 3, "std": [0.5] * 3}
    config = TimmWrapperConfig(
        architecture=name,
        num_labels=NUM_LABELS,
        pretrained_cfg=pretrained,
        model_args={"img_size": image_size} if is_transformer(name) else {},
    )
    return AutoModelForImageClassification.from_config(config)


class RoundRobin(TrainerCallback):
    """Measures each step of the trainer it belongs to, and lets the others make theirs in between."""

    def __init__(self, instruments: list[Callable[..., Any]], others: dict[str, Contender], device: torch.device):
        self.instruments, self.others, self.device = instruments, others, device
        self.rounds: list[dict[str, Reading]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._start_clock()

    def on_step_end(self, args, state, control, **kwargs):
        self._clock.close()
        number = len(self.rounds) - 1
        instrument, readings = self.instruments[number], self.rounds[-1]
        names = list(self.others)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            with instrument(self.device, readings.setdefault(name, {})):
                self.others[name].step()
        if len(self.rounds) < len(self.instruments):
            self._start_clock()

    def _start_clock(self) -> None:
        instrument = self.instruments[len(self.rounds)]
        self.rounds.append({OURS: {}})
        self._clock = contextlib.ExitStack()
        self._clock.enter_context(instrument(self.device, self.rounds[-1][OURS]))


def arguments(args: argparse.Namespace, output_dir: str) -> dict[str, Any]:
    """Of all trainers: AdamW as it is by default, clipping at 1."""
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": args.batch_size,
        "bf16": args.dtype == "bfloat16",
        "use_cpu": args.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }


def plain_contender(model: torch.nn.Module, options: dict[str, Any], batch: training_loops.Batch) -> Contender:
    """A step of `Trainer`, with the same calls as in its own loop."""
    trainer = Trainer(model=model, args=TrainingArguments(**options))
    trainer.create_optimizer()
    wrapped, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1

    def step() -> None:
        trainer.training_step(wrapped, {"pixel_values": batch.pixel_values, "labels": batch.labels})
        trainer.accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        wrapped.zero_grad()

    return Contender(step, lambda: instruments.resident_bytes(model, optimizer))


def loop_contender(
    loop: Callable[..., None],
    model: torch.nn.Module,
    options: dict[str, Any],
    batch: training_loops.Batch,
    settings: training_loops.Settings,
    autocast: Callable[[], Any],
) -> Contender:
    trainer = Trainer(model=model, args=TrainingArguments(**options))  # for the same optimizer, on the same device
    update = training_loops.Updater(model.train(), trainer.create_optimizer(), autocast)
    step = partial(loop, model, update, batch, settings)
    return Contender(step, lambda: instruments.resident_bytes(model, update.optimizer))


def measure(args: argparse.Namespace, roofs: Roofs) -> dict[str, Any]:
    """Readings of each round, and of each contender what does not change from round to round."""
    device = torch.device(args.device)
    work = partial(instruments.work, num_labels=NUM_LABELS)
    kinds = [instruments.nothing] * args.warmup + [instruments.peak_memory, work]
    kinds += [partial(instruments.roofline, roofs=roofs)]
    kinds += [instruments.seconds] * args.rounds + [instruments.profile] * args.profile
    model = make_model(args.model, args.image_size).to(memory_format=MEMORY_FORMATS[args.memory_format])
    dataset = RandomImages(args.batch_size, args.image_size, num_batches=len(kinds))
    processor = ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    pixel_values = dataset.pixel_values.to(device, memory_format=MEMORY_FORMATS[args.memory_format])
    normalization = PixelNormalization.from_processor(processor)
    batch = training_loops.Batch(pixel_values, torch.tensor(dataset.labels, device=device), normalization)
    settings = training_loops.Settings(float(parse_epsilon(EPSILON)), args.attack_steps)
    autocast = partial(torch.autocast, args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")

    with tempfile.TemporaryDirectory() as folder:
        options = arguments(args, folder)
        others = {PLAIN: plain_contender(copy.deepcopy(model), options, batch)}
        loops = training_loops.loops(args.attack, args.loss)
        for name, loop in loops.items():
            others[name] = loop_contender(loop, copy.deepcopy(model), options, batch, settings, autocast)
        (other,) = set(MEMORY_FORMATS) - {args.memory_format}
        if (args.attack, args.loss) == ("pgd", "at"):
            in_other = batch._replace(pixel_values=pixel_values.contiguous(memory_format=MEMORY_FORMATS[other]))
            others[f"{IDEAL}, {other}"] = loop_contender(
                loops[IDEAL],
                copy.deepcopy(model).to(memory_format=MEMORY_FORMATS[other]),
                options,
                in_other,
                settings,
                autocast,
            )
        round_robin = RoundRobin(kinds, others, device)
        robust = {
            "epsilon": EPSILON,
            "epsilon_schedule_type": "constant",
            "attack": args.attack,
            "attack_steps": args.attack_steps,
            "robust_loss": args.loss,
            "max_steps": len(kinds),
            "torch_compile": args.torch_compile,
            "torch_compile_mode": args.torch_compile_mode,
        }
        trainer = RobustTrainer(
            model=model,
            args=RobustTrainingArguments(**options, **robust),
            train_dataset=dataset,
            processing_class=processor,
        )
        trainer.remove_callback(AlarmCallback)
        trainer.add_callback(round_robin)
        trainer.train()
        resident = {name: other.resident() for name, other in others.items()}
        resident[OURS] = instruments.resident_bytes(model, trainer.optimizer)
    return {"rounds": round_robin.rounds[args.warmup :], "resident_bytes": resident}


def summary(args: argparse.Namespace, measured: dict[str, Any]) -> dict[str, Any]:
    """One row a contender; ratios are to the ideal of the same round."""
    memory, work, roofline, *timed = measured["rounds"]
    timed = timed[: args.rounds]
    rows = []
    for name in memory:
        times = [readings[name]["seconds"] for readings in timed]
        busy = [readings[name][instruments.clock(torch.device(args.device))] for readings in timed]
        ratios, cpu_ratios = (
            [readings[name][clock] / readings[IDEAL][clock] for readings in timed]
            for clock in ("seconds", "cpu_seconds")
        )
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        peak = measured["resident_bytes"][name] + memory[name]["peak_bytes"]
        plain_peak = measured["resident_bytes"][PLAIN] + memory[PLAIN]["peak_bytes"]
        rows.append(
            {
                "name": name,
                "seconds": statistics.median(times),
                "ratio": quartiles[1],
                "ratio_quartiles": [quartiles[0], quartiles[2]],
                "cpu_ratio": statistics.median(cpu_ratios),
                "forward": work[name]["forward"] / args.batch_size,
                "backward": work[name]["backward"] / args.batch_size,
                "flops": work[name]["flops"],
                "flops_per_second": work[name]["flops"] / statistics.median(busy),
                "roofline_seconds": roofline[name]["roofline_seconds"],
                "moving_seconds": roofline[name]["moving_seconds"],
                "of_roofline": roofline[name]["roofline_seconds"] / statistics.median(busy),
                "peak_bytes": peak,
                "step_bytes": memory[name]["peak_bytes"],
                "peak_to_plain": peak / plain_peak,
                "step_to_plain": memory[name]["peak_bytes"] / memory[PLAIN]["peak_bytes"],
            }
        )
    return {"rows": rows}


def table(result: dict[str, Any]) -> str:
    lines = [
        "| step of | seconds | to ideal (quartiles) | by CPU time | forward, backward | GFLOP "
        "| GFLOP/s (of matmul) | roofline s, of which moving (achieved) | peak MB (to plain) |",
        "| --- " * 9 + "|",
    ]
    for row in result["rows"]:
        low, high = row["ratio_quartiles"]
        of_matmul = row["flops_per_second"] / result["roofs"]["flops"]
        roofline = f"{row['roofline_seconds']:.3f}, {row['moving_seconds']:.3f} ({100 * row['of_roofline']:.0f} %)"
        if row["name"] == OURS and result["settings"]["torch_compile"] == "True":
            roofline = "–"  # of another program: counted operation by operation, compiled functions run as they are
        lines.append(
            f"| {row['name']} | {row['seconds']:.3f} | {row['ratio']:.3f} ({low:.3f}–{high:.3f}) "
            f"| {row['cpu_ratio']:.3f} | {row['forward']:g}, {row['backward']:g} | {row['flops'] / 1e9:.1f} "
            f"| {row['flops_per_second'] / 1e9:.0f} ({100 * of_matmul:.0f} %) | {roofline} "
            f"| {row['peak_bytes'] / 1e6:.0f} ({row['peak_to_plain']:.2f}) |"
        )
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="A timm architecture.")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--attack", choices=["pgd", "apgd"], default="pgd")
    parser.add_argument("--attack_steps", type=int, default=7)
    parser.add_argument("--loss", choices=["at", "trades"], default="at")
    parser.add_argument("--rounds", type=int, default=10, help="Timed steps of each contender.")
    parser.add_argument("--warmup", type=int, default=1, help="Steps of each contender before anything is measured.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast.")
    parser.add_argument(
        "--memory_format",
        choices=list(MEMORY_FORMATS),
        help="Of weights, and of all images but ours. Default: channels_last for networks of convolutions.",
    )
    parser.add_argument("--torch_compile", action="store_true", help="For `RobustTrainer`; the others stay eager.")
    parser.add_argument("--torch_compile_mode", help="For example reduce-overhead: CUDA graphs.")
    parser.add_argument(
        "--profile", action="store_true", help="Print what takes longest in a step of `RobustTrainer`."
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks/train_step"))
    args = parser.parse_args(argv)
    args.torch_compile = args.torch_compile or args.torch_compile_mode is not None
    if args.memory_format is None:
        args.memory_format = "contiguous" if is_transformer(args.model) else "channels_last"
    return args


def file_name(args: argparse.Namespace) -> str:
    keys = ("model", "image_size", "batch_size", "attack", "loss", "dtype", "memory_format", "device")
    compiled = ["compiled", *filter(None, [args.torch_compile_mode])] if args.torch_compile else []
    return "_".join([*(str(getattr(args, key)) for key in keys), *compiled]) + ".json"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if device.type not in ("cpu", "cuda"):
        raise SystemExit(f"--device {args.device} is not supported; choose cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: torch finds no GPU; choose cpu.")
    roofs = instruments.measure_roofs(device, dtype)
    measured = measure(args, roofs)
    settings = {name: str(value) for name, value in vars(args).items()}
    result = {"settings": settings, "machine": instruments.machine(device), "roofs": roofs._asdict()}
    result |= summary(args, measured) | measured
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / file_name(args)
    path.write_text(json.dumps(result, indent=1))
    print(
        f"\n{args.model}, {args.image_size} px, batch {args.batch_size}, {args.attack}-{args.attack_steps}, "
        f"{args.loss}, {args.dtype}, {args.rounds} rounds; matrix product {roofs.flops / 1e9:.0f} GFLOP/s, "
        f"copy {roofs.bandwidth / 1e9:.0f} GB/s"
    )
    print(f"{result['machine']}\n\n{table(result)}\n")
    ours = next(row for row in result["rows"] if row["name"] == OURS)
    print(
        f"{OURS}: {args.batch_size / ours['seconds']:.1f} images/s, {ours['flops_per_second'] / 1e12:.3f} TFLOP/s, "
        f"{100 * ours['flops_per_second'] / roofs.flops:.0f} % of the matrix product"
    )
    if args.profile:
        print(measured["rounds"][-1][OURS]["profile"])
    print(f"written to {path}")
    return result


if __name__ == "__main__":
    main()
