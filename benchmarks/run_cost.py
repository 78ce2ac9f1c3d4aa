"""What does a whole training run cost with epsilon constant, with the two-hinge schedule, and with fewer attack steps
while epsilon is small?

    OMP_NUM_THREADS=1 python benchmarks/run_cost.py --seeds 0 1 2

Runs the recipes of the main job with `--attack_steps 7`, for each seed one after the other. Training time is that of
`Trainer` (`train_runtime`) without a single evaluation, the alarms' probes included; the whole run is the time from
the command to its end, with imports, data, the final evaluation and the card. *Counted* are the passes forward and
backward of all steps: the ratio if nothing else took time.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from instruments import median_and_range

from hf_rft import get_epsilon_schedule
from hf_rft.cli import compare, recipes
from hf_rft.schedules import scaled_steps


RECIPE = str(recipes.FOLDER / "fashion_mnist" / "efficientnet_lite0_{}.yaml")
# Recipe, and flags that are added to it.
ARMS: dict[str, tuple[str, list[str]]] = {
    "constant": ("constant", []),
    "hinge": ("hinge", []),
    "hinge_fewer_steps": ("hinge", ["--attack_steps_schedule", "epsilon"]),
}
HINGES = {"start": 0.25, "end": 0.75}  # of the recipe


SCHEDULES = {"constant": get_epsilon_schedule("constant"), "hinge": get_epsilon_schedule("hinge", **HINGES)}


def attack_at(arm: str, progress: float, attack_steps: int) -> tuple[float, int]:
    """Multiplier of epsilon and attack steps; there is no attack where the first is 0."""
    recipe, takes_fewer = ARMS[arm]
    multiplier = SCHEDULES[recipe](progress)
    return multiplier, scaled_steps(attack_steps, multiplier) if takes_fewer else attack_steps


def counted_passes(arm: str, attack_steps: int, total: int = 10_000) -> float:
    """Passes forward and backward of an average training step."""
    attacks = [attack_at(arm, step / total, attack_steps) for step in range(total)]
    return 1 + sum(steps for multiplier, steps in attacks if multiplier > 0) / total


def run(arm: str, seed: int, args: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    """One run, unless the result of the same one is there."""
    recipe, flags = ARMS[arm]
    config, folder = Path(RECIPE.format(recipe)), args.output_dir / arm
    flags = ["--attack_steps", str(args.attack_steps), "--eval_strategy", "no", *flags, *extra]
    inputs = {"config": config.read_text(), "flags": flags, "threads": args.threads}
    result = folder / f"seed{seed}.json"
    if result.is_file() and (known := json.loads(result.read_text()))["inputs"] == inputs:
        return known
    shutil.rmtree(folder / config.stem / f"seed{seed}", ignore_errors=True)  # of a run whose time nobody knows
    start = time.perf_counter()
    finished = compare.run(config, seed, folder, flags, args.threads)
    whole = time.perf_counter() - start
    found = compare.read(finished)
    found = {name: found[name] for name in ("seconds", "accuracies", "robust", "expected")}
    record = {"inputs": inputs, "whole_seconds": whole, **found}
    result.write_text(json.dumps(record, indent=1))
    return record


def table(runs: dict[str, list[dict[str, Any]]], attack_steps: int) -> str:
    """One row an arm; ratios are to the run of the same seed with constant epsilon, differences to the hinge."""
    header = ["epsilon", "training s", "to constant", "counted", "whole run s", "to constant"]
    header += ["clean %", "robust %", "expected robustness %", "its difference to hinge, points"]
    rows = [header, ["---"] * len(header)]
    constant, hinge = runs["constant"], runs["hinge"]
    for arm, of_seeds in runs.items():
        training, whole = (
            [one[clock] / reference[clock] for one, reference in zip(of_seeds, constant, strict=True)]
            for clock in ("seconds", "whole_seconds")
        )
        points = [100 * (one["expected"] - other["expected"]) for one, other in zip(of_seeds, hinge, strict=True)]
        accuracies = [
            compare.spread(values)
            for values in (
                [one["accuracies"]["0"] for one in of_seeds],
                [one["robust"] for one in of_seeds],
                [one["expected"] for one in of_seeds],
            )
        ]
        rows.append(
            [arm, median_and_range([one["seconds"] for one in of_seeds], 0), median_and_range(training)]
            + [f"{counted_passes(arm, attack_steps) / counted_passes('constant', attack_steps):.3f}"]
            + [median_and_range([one["whole_seconds"] for one in of_seeds], 0), median_and_range(whole), *accuracies]
            + [", ".join(f"{point:+.1f}" for point in points)]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def parse_args(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--attack_steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 1)))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks/run_cost"))
    return parser.parse_known_args(arguments)  # other flags are those of `hf-rft train`


def main(arguments: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    args, extra = parse_args(arguments)
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in args.seeds:
        for arm in ARMS:
            runs[arm].append(run(arm, seed, args, extra))
    print(f"\nPGD-{args.attack_steps}, seeds {args.seeds}, {args.threads} thread(s)\n")
    print(table(runs, args.attack_steps))
    return runs


if __name__ == "__main__":
    main()
