"""What does the 9-point curve 0 ... 8/255 cost, against one run of the public AutoAttack at each epsilon?

Both attack the same images with the same attacks (APGD on cross-entropy, then targeted APGD), through the same model
in the same memory format, in one process, batch after batch in turn. Finished batches are kept on disk: the same
command goes on where it was.
"""

import argparse
import json
import statistics
import time
from fractions import Fraction
from pathlib import Path

import subject
import torch

from hf_rft import ThreatModel
from hf_rft.evaluation.counting import CountedForward
from hf_rft.evaluation.reference import run_autoattack
from hf_rft.evaluation.search import find_breaking_points
from hf_rft.evaluation.tiers import TIERS


EPSILONS = [Fraction(level, 255) for level in range(9)]


def measure_ours(args, forward, pixels, labels, first: int) -> dict:
    counted, start = CountedForward(forward), time.perf_counter()
    found = find_breaking_points(
        counted,
        pixels,
        labels,
        norm="linf",
        epsilons=EPSILONS,
        tier=TIERS["standard"],
        seed=args.seed,
        positions=range(first, first + len(pixels)),
    )
    seconds = time.perf_counter() - start
    robust = [(found.broken_at > place).tolist() for place in range(len(EPSILONS))]
    return {"seconds": seconds, "passes": counted.passes, "robust": robust}


def measure_theirs(args, forward, pixels, labels, first: int) -> dict:
    robust, forwards, backwards, start = [], 0, 0, time.perf_counter()
    for epsilon in EPSILONS[1:]:
        result = run_autoattack(
            forward,
            pixels,
            labels,
            threat_model=ThreatModel("linf", epsilon),
            num_classes=10,
            attacks=("apgd-ce", "apgd-t"),
            seed=args.seed,
            batch_size=len(pixels),
        )
        robust.append(result.robust.tolist())
        forwards, backwards = forwards + result.passes.forward, backwards + result.passes.backward
    return {"seconds": time.perf_counter() - start, "passes": (forwards, backwards), "robust": robust}


def kept(path: Path, measure) -> dict:
    """A measurement, from disk if it was made before."""
    if not path.exists():
        path.write_text(json.dumps(measure()))
        print(f"{path.name} done", flush=True)
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject.add_arguments(parser, max_samples=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks/curve"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    measured = subject.load(args)
    pixels, labels = measured.pixels_and_labels()

    ours, theirs = [], []
    for first in range(0, len(pixels), args.batch_size):
        part = slice(first, first + args.batch_size)
        batch = (measured.forward, pixels[part], labels[part])
        name = f"{args.memory_format}_{args.seed}_{first}_{args.batch_size}.json"
        for measure, batches in ((measure_ours, ours), (measure_theirs, theirs)):
            path = args.output_dir / f"{measure.__name__}_{name}"
            batches.append(kept(path, lambda measure=measure, batch=batch, at=first: measure(args, *batch, at)))

    count = len(pixels)
    of_ours, of_theirs = (
        torch.cat([torch.tensor(batch["robust"]) for batch in batches], dim=1) for batches in (ours, theirs)
    )
    print(f"\n{count} images, {args.memory_format}, {torch.get_num_threads()} threads, seed {args.seed}")
    print("| | " + " | ".join(f"{level}/255" for level in range(9)) + " |")
    print("| --- " * 10 + "|")
    for name, accuracies in (("standard, %", of_ours), ("AutoAttack (two attacks), % |", of_theirs)):
        print(f"| {name} | " + " | ".join(f"{100 * row.float().mean():.1f}" for row in accuracies) + " |")
    print(f"the same for {100 * (of_ours[1:] == of_theirs).float().mean():.1f} % of images and epsilons\n")

    print("| | forward / image | backward / image | seconds |")
    print("| --- | --- | --- | --- |")
    totals = []
    for name, batches in (("standard", ours), ("AutoAttack, 8 runs", theirs)):
        forward, backward = (sum(batch["passes"][which] for batch in batches) / count for which in (0, 1))
        totals.append(forward + backward)
        print(f"| {name} | {forward:.0f} | {backward:.0f} | {sum(batch['seconds'] for batch in batches):.0f} |")
    times = [b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True)]
    print(f"\nforward and backward passes: {totals[1] / totals[0]:.2f} times fewer")
    print(f"time: {statistics.median(times):.2f} times less (median of {len(times)} batches, ", end="")
    print(f"{min(times):.2f} to {max(times):.2f})")
    withstood, standing = of_ours[1:].float().sum(dim=0).mean().item(), of_ours[1].float().mean().item()
    print(
        f"bound: an image withstands {withstood:.2f} of the 8 epsilons on average, {standing:.2f} of the images at "
        f"least one; one failed attack for each of those makes {withstood / standing:.2f} times fewer passes"
    )


if __name__ == "__main__":
    main()
