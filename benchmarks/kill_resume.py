"""Does a run that is killed at any moment, also while it writes a checkpoint, end as if nothing had happened?

Runs `recipes/run_rft.py` small, kills it with SIGKILL at a random moment, starts the same command again, and compares
with a run that nobody disturbed: the bytes of the weights, the report, and every entry of `log_history`.

    python benchmarks/kill_resume.py --runs 20 --seed 0
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hf_rft.training.checkpoints import MARKER_NAME, last_complete_checkpoint


RECIPE = Path(__file__).parents[1] / "recipes" / "run_rft.py"
# The default recipe with fewer and smaller images, a checkpoint after every second step, and room for two of them.
FLAGS = {
    "max_train_samples": 96,
    "max_eval_samples": 16,
    "max_test_samples": 16,
    "image_size": 32,
    "num_train_epochs": 4,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 16,
    "eval_attack_steps": 2,
    "eval_attack_during_training": True,
    "load_best_model_at_end": True,
    "metric_for_best_model": "robust_accuracy",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 1,
    "disable_tqdm": True,
}
NAME = "model"  # of each run's folder; the report holds it
# What depends on the clock, not on the run; and what is about the last start only.
TIMING = ("runtime", "per_second", "train_loss")


def start(folder: Path) -> subprocess.Popen:
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    # One thread: sums then have the same order every time.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = folder.with_suffix(".log").open("a")
    return subprocess.Popen(
        [sys.executable, str(RECIPE), *flags, "--resume", "auto", "--output_dir", str(folder)],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(folder: Path) -> None:
    if (status := start(folder).wait()) != 0:
        raise SystemExit(f"{folder} ended with status {status}; see {folder.with_suffix('.log')}")


def kill_when(process: subprocess.Popen, is_time: Callable[[], bool]) -> bool:
    """Kill the process as soon as `is_time()`; False if it ended before."""
    while process.poll() is None:
        if is_time():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.001)
    return False


def after(seconds: float) -> Callable[[], bool]:
    moment = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= moment


def inside_write(folder: Path, number: int, delay: float) -> Callable[[], bool]:
    """`delay` seconds after the folder of the `number`-th checkpoint has appeared."""
    appeared: dict[Path, float] = {}

    def is_time() -> bool:
        for path in being_written(folder):
            appeared.setdefault(path, time.perf_counter())
        return len(appeared) == number and time.perf_counter() - max(appeared.values()) >= delay

    return is_time


def being_written(folder: Path) -> list[Path]:
    """Checkpoints that are there but not complete yet."""
    return [path for path in folder.glob("checkpoint-*") if not (path / MARKER_NAME).exists()]


def outcome(folder: Path) -> dict:
    """Everything that must not depend on having been killed."""
    state = json.loads((folder / "trainer_state.json").read_text())
    history = [
        {key: value for key, value in entry.items() if not key.endswith(TIMING)} for entry in state["log_history"]
    ]
    best = state["best_model_checkpoint"]
    report = json.loads((folder / "robustness.json").read_text())
    return {
        "weights": (folder / "model.safetensors").read_bytes(),
        "report": report,
        "log_history": history,
        "best": (state["best_metric"], state["best_global_step"], best and Path(best).name),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--inside_a_write", type=int, default=5, help="how many kills wait for a checkpoint write")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks/kill_resume"))
    args = parser.parse_args()
    shutil.rmtree(args.output_dir, ignore_errors=True)

    undisturbed = args.output_dir / "undisturbed" / NAME
    undisturbed.parent.mkdir(parents=True)
    begin = time.perf_counter()
    finish(undisturbed)
    duration = time.perf_counter() - begin
    expected = outcome(undisturbed)
    steps = [entry["step"] for entry in expected["log_history"] if "loss" in entry]
    assert steps == list(range(1, len(steps) + 1)), "the undisturbed run itself has gaps"
    print(f"undisturbed: {duration:.0f} s, {len(steps)} steps, best {expected['best']}", flush=True)

    rng, same, torn = random.Random(args.seed), 0, 0
    for run in range(1, args.runs + 1):
        folder = args.output_dir / f"run{run}" / NAME
        killed = False
        while not killed:
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            if run <= args.inside_a_write:
                is_time = inside_write(
                    folder, number=rng.randint(1, FLAGS["num_train_epochs"]), delay=rng.uniform(0, 0.1)
                )
            else:
                is_time = after(rng.uniform(0.2, 1.0) * duration)
            killed = kill_when(start(folder), is_time)
        half_written = [path.name for path in being_written(folder)]
        complete = last_complete_checkpoint(folder)
        torn += bool(half_written)
        finish(folder)
        found = outcome(folder)
        different = [name for name in expected if found[name] != expected[name]]
        same += not different
        print(
            f"run {run}: killed with {complete.name if complete else 'no checkpoint'} complete and "
            f"{half_written or 'none'} half written: {f'DIFFERENT {different}' if different else 'identical'}",
            flush=True,
        )
        if not different:
            shutil.rmtree(folder.parent)
    print(f"{same} of {args.runs} identical; {torn} killed inside a checkpoint write")
    raise SystemExit(same != args.runs)


if __name__ == "__main__":
    main()
