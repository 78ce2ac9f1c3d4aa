"""Run several recipes with several seeds and write one table and one figure.

    hf-rft compare fashion_mnist --seeds 0 1 2 --jobs 2
    hf-rft compare my_recipes/*.yaml --seeds 0 1 2 --num_train_epochs 2

Each run is a process of its own (`hf-rft train --config ...`); one that already finished, with the same configuration,
is not repeated. Other flags are those of `hf-rft train`. Writes comparison.md, comparison.json and comparison.png.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..evaluation.plots import plot_comparison
from ..training.onset import evaluations, find_onset
from ..utils.files import check_writable, replacing, write_text
from ..utils.values import SEED
from .exits import exit_with
from .parsing import Parser
from .recipes import find_recipes


PREFIX = "eval_accuracy_at_"


def run(config: Path, seed: int, output_dir: Path, extra: list[str], threads: int) -> Path:
    """Run one recipe unless its result is there; return its folder."""
    folder = output_dir / config.stem / f"seed{seed}"
    marker = folder / "comparison_input.json"
    inputs = {"config": config.read_text(), "seed": seed, "extra": extra}
    if marker.is_file() and json.loads(marker.read_text()) == inputs:
        print(f"{folder}: already finished")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "hf_rft", "train", "--config", str(config)]
    command += ["--seed", str(seed), "--output_dir", str(folder), *extra]
    print(" ".join(command), flush=True)
    log = folder / "log.txt"
    with log.open("w") as stream:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment).returncode
    if code != 0:
        errors = [line for line in log.read_text(errors="replace").splitlines() if "error: " in line]
        reason = f" ({errors[0]})" if errors else ""
        raise ChildProcessError(f"{config} with seed {seed} ended with status {code}{reason}; see {log}")
    marker.write_text(json.dumps(inputs))
    return folder


def read(folder: Path) -> dict:
    """Final numbers and training history of one run."""
    results = json.loads((folder / "all_results.json").read_text())
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    config = json.loads((folder / "config.json").read_text())
    num_classes = len(config.get("label_names") or config["id2label"])  # timm's name, transformers' name
    validation = evaluations(log)
    return {
        "accuracies": {key.removeprefix(PREFIX): value for key, value in results.items() if key.startswith(PREFIX)},
        "robust": results["eval_robust_accuracy"],
        "expected": results["eval_expected_robustness"],
        "norm": results["eval_settings"]["norm"],
        "seconds": results["train_runtime"],
        "validation": [(entry["epoch"], entry["eval_accuracy"]) for entry in validation],
        "epsilon": [(entry["epoch"], entry["epsilon"]) for entry in log if "epsilon" in entry],
        "onset": find_onset(log, num_classes),
    }


def spread(values: list[float], scale: float = 100) -> str:
    """Mean and standard deviation over seeds."""
    deviation = f" ± {scale * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.1f}{deviation}"


def markdown_table(runs: dict[str, list[dict]]) -> str:
    epsilons = list(next(iter(runs.values()))[0]["accuracies"])
    header = [
        "recipe",
        "clean",
        *(f"at {epsilon}" for epsilon in epsilons[1:]),
        "expected robustness",
        "onset",
        "minutes",
    ]
    rows = [header, ["---"] * len(header)]
    for name, of_seeds in runs.items():
        onsets = [str(one["onset"] or "never") for one in of_seeds]
        rows.append(
            [name]
            + [spread([one["accuracies"][epsilon] for one in of_seeds]) for epsilon in epsilons]
            + [spread([one["expected"] for one in of_seeds]), ", ".join(onsets)]
            + [spread([one["seconds"] for one in of_seeds], scale=1 / 60)]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("configs", nargs="+", help="Recipes, or folders of them: by name, or YAML files.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="Seeds of each recipe.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare"), help="Where runs and results go.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time.")
    args, extra = parser.parse_known_args(arguments)
    if secret := [word.partition("=")[0] for word in extra if re.match(r"--[\w-]*token(=|$)", word)]:
        exit_with(f"{secret[0]}: commands are printed and kept; log in with `hf auth login` or set HF_TOKEN instead.")
    if args.jobs < 1:
        exit_with(f"--jobs {args.jobs} must be at least 1.")
    for seed in args.seeds:
        if seed not in SEED:
            exit_with(f"--seeds {seed} must be {SEED}.")
    if len(set(args.seeds)) < len(args.seeds):
        exit_with(f"--seeds {args.seeds} holds one seed twice, whose runs would share a folder.")
    args.configs = [path for name in args.configs for path in find_recipes("configs:", name)]
    if len({config.stem for config in args.configs}) < len(args.configs):
        exit_with("configs: two configurations have the same file name, under which results are kept.")
    check_writable("--output_dir", args.output_dir)

    work = [(config, seed) for seed in args.seeds for config in args.configs]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)  # runs at the same time share the cores
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(run, config, seed, args.output_dir, extra, threads) for config, seed in work]
        folders = [future.result() for future in futures]
    runs: dict[str, list[dict]] = {config.stem: [] for config in args.configs}
    for (config, _), folder in zip(work, folders, strict=True):
        runs[config.stem].append(read(folder))

    measured = {(one["norm"], *one["accuracies"]) for of_seeds in runs.values() for one in of_seeds}
    if len(measured) > 1:
        exit_with(f"the runs were evaluated at different norms or epsilons and cannot be compared: {sorted(measured)}")
    table = markdown_table(runs)
    print(f"\nMean ± standard deviation over seeds {args.seeds}, in %; onset is an epoch for each seed\n\n{table}")
    write_text(args.output_dir / "comparison.md", table + "\n")
    write_text(args.output_dir / "comparison.json", json.dumps(runs, indent=2))
    with replacing(args.output_dir / "comparison.png") as scratch:
        plot_comparison(runs, scratch, norm=runs[args.configs[0].stem][0]["norm"])
