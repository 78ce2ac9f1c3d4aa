"""Does an evaluation that is killed ten times, or divided over two processes, end with the identical table?"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


RECIPE = Path(__file__).parents[1] / "recipes" / "evaluate_robustness.py"


def command(args, output_dir: Path, launcher: list[str]) -> list[str]:
    flags = {
        "--model_name_or_path": args.model,
        "--max_samples": args.max_samples,
        "--batch_size": args.batch_size,
        "--tier": args.tier,
        "--output_dir": output_dir,
    }
    words = [str(word) for flag in flags.items() for word in flag]
    return [*launcher, str(RECIPE), *words, "--channels_last", "--epsilons", "0", "2/255", "4/255", "6/255", "8/255"]


def run(args, output_dir: Path, launcher: list[str], kill_after: float | None = None) -> float:
    """Run the recipe, or kill it after some seconds; return how long it took."""
    start = time.perf_counter()
    # One thread everywhere: with another number sums round differently.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(args, output_dir, launcher),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(timeout=kill_after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return time.perf_counter() - start
    if process.returncode != 0:
        raise SystemExit(f"the evaluation ended with status {process.returncode}")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("outputs/efficientnet_lite0_hinge"))
    parser.add_argument("--max_samples", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--tier", default="fast")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="Of the moments of the kills.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks/restart"))
    args = parser.parse_args()
    shutil.rmtree(args.output_dir, ignore_errors=True)
    folders = {name: args.output_dir / name for name in ("undisturbed", "killed", "two_processes")}
    python = [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

    undisturbed = run(args, folders["undisturbed"], python)
    print(f"undisturbed: {undisturbed:.0f} s", flush=True)
    expected = json.loads((folders["undisturbed"] / "robustness.json").read_text())
    different = 0

    def compare(name: str) -> None:
        nonlocal different
        is_same = json.loads((folders[name] / "robustness.json").read_text()) == expected
        different += not is_same
        print(f"{name}: complete, {'identical' if is_same else 'DIFFERENT'}", flush=True)
        shutil.rmtree(folders[name])

    rng, kills = random.Random(args.seed), 0
    while kills < args.kills:
        moment = rng.uniform(0.2, 1.0) * undisturbed
        run(args, folders["killed"], python, kill_after=moment)
        if (folders["killed"] / "robustness.json").exists():  # it was faster: begin again
            compare("killed")
            continue
        kills += 1
        batches = len(list((folders["killed"] / "cache").glob("*.safetensors")))
        print(f"kill {kills} after {moment:.0f} s: {batches} batches on disk", flush=True)
    run(args, folders["killed"], python)
    compare("killed")
    print(f"two processes: {run(args, folders['two_processes'], torchrun):.0f} s", flush=True)
    compare("two_processes")
    raise SystemExit(different)


if __name__ == "__main__":
    main()
