"""How much longer does `import hf_rft` take than `from transformers import Trainer`?

    python benchmarks/import_time.py --rounds 11

All take turns, each in a new process; a ratio divides two times of one round. What they have in common includes torch.
"""

import argparse
import statistics
import subprocess
import sys
import time

from instruments import median_and_range


STATEMENTS = ("from transformers import Trainer", "import hf_rft", "from hf_rft import RobustTrainer")


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True)
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args(arguments)
    for statement in STATEMENTS:  # byte code is written, files are read
        seconds(statement)
    times: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    for _ in range(args.rounds):
        for statement in STATEMENTS:
            times[statement].append(seconds(statement))
    print("| statement | seconds | to the first (range) |\n| --- | --- | --- |")
    for statement, of_rounds in times.items():
        ratios = [one / first for one, first in zip(of_rounds, times[STATEMENTS[0]], strict=True)]
        print(f"| `{statement}` | {statistics.median(of_rounds):.2f} | {median_and_range(ratios)} |")
    return times


if __name__ == "__main__":
    main()
