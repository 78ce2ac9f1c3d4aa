"""What does the 9-point curve 0 ... 8/255 cost, against one run of the public AutoAttack at each epsilon?

Both attack the same images with the same attacks (`--tier fast`: APGD on cross-entropy; `--tier standard`: then
targeted APGD), through the same model in the same memory format, in one process, batch after batch in turn. Finished
batches are kept on disk: the same command goes on where it was.

`--growth` measures this project's side alone, for more and fewer epsilons, examples and classes; `--grouping` what it
saves to attack several batches together.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import instruments
import subject
import torch

from hf_rft import ThreatModel
from hf_rft.evaluation.estimate import passes_to_withstand
from hf_rft.evaluation.reference import run_autoattack
from hf_rft.evaluation.search import find_breaking_points
from hf_rft.evaluation.tiers import TIERS
from hf_rft.models.classifier import CountedForward


LARGEST_EPSILON = Fraction(8, 255)
REFERENCES = {"fast": ("apgd-ce",), "lean": ("apgd-ce", "apgd-t"), "standard": ("apgd-ce", "apgd-t")}
NUM_CLASSES = 10


class Case(NamedTuple):
    """What is attacked, and at which epsilons."""

    forward: Callable[[torch.Tensor], torch.Tensor]
    pixels: torch.Tensor
    labels: torch.Tensor
    num_epsilons: int = 8
    num_classes: int = NUM_CLASSES

    @property
    def epsilons(self) -> list[Fraction]:
        return [LARGEST_EPSILON * level / self.num_epsilons for level in range(self.num_epsilons + 1)]

    def batches(self, size: int) -> Iterator[tuple[int, "Case"]]:
        """Each batch with the position of its first image."""
        for first in range(0, len(self.pixels), size):
            part = slice(first, first + size)
            yield first, self._replace(pixels=self.pixels[part], labels=self.labels[part])

    def with_classes(self, count: int) -> "Case":
        """Only the first classes, as if the model knew no others."""
        kept = self.labels < count
        return self._replace(
            forward=lambda pixels: self.forward(pixels)[:, :count],
            pixels=self.pixels[kept],
            labels=self.labels[kept],
            num_classes=count,
        )


def measure_ours(args: argparse.Namespace, case: Case, first: int) -> dict[str, Any]:
    counted, start = CountedForward(case.forward), time.perf_counter()
    found = find_breaking_points(
        counted,
        case.pixels,
        case.labels,
        norm="linf",
        epsilons=case.epsilons,
        tier=TIERS[args.tier]["linf"],
        seed=args.seed,
        positions=range(first, first + len(case.pixels)),
    )
    seconds = time.perf_counter() - start
    robust = [(found.broken_at > place).tolist() for place in range(len(case.epsilons))]
    return {"seconds": seconds, "passes": counted.passes, "robust": robust}


def measure_theirs(args: argparse.Namespace, case: Case, first: int) -> dict[str, Any]:
    robust, forwards, backwards, start = [], 0, 0, time.perf_counter()
    for epsilon in case.epsilons[1:]:
        result = run_autoattack(
            case.forward,
            case.pixels,
            case.labels,
            threat_model=ThreatModel("linf", epsilon),
            num_classes=case.num_classes,
            attacks=REFERENCES[args.tier],
            seed=args.seed,
            batch_size=len(case.pixels),
        )
        robust.append(result.robust.tolist())
        forwards, backwards = forwards + result.passes.forward, backwards + result.passes.backward
    return {"seconds": time.perf_counter() - start, "passes": (forwards, backwards), "robust": robust}


def kept(args: argparse.Namespace, measure: Callable[..., dict], case: Case, first: int) -> dict[str, Any]:
    """A measurement, from disk if it was made before."""
    told_apart = (args.memory_format, args.seed, case.num_epsilons, case.num_classes, first, len(case.pixels))
    path = args.output_dir / "_".join([measure.__name__, args.tier, *map(str, told_apart)])
    path = path.with_suffix(".json")
    if not path.exists():
        path.write_text(json.dumps(measure(args, case, first)))
        print(f"{path.name} done", flush=True)
    return json.loads(path.read_text())


def joined(batches: list[dict[str, Any]]) -> torch.Tensor:
    """Which images withstand each epsilon, shape `(epsilons, images)`."""
    return torch.cat([torch.tensor(batch["robust"]) for batch in batches], dim=1)


def passes_per_image(batches: list[dict[str, Any]]) -> tuple[float, float]:
    count = sum(len(batch["robust"][0]) for batch in batches)
    forward, backward = (sum(batch["passes"][which] for batch in batches) / count for which in (0, 1))
    return forward, backward


def operations_per_image(case: Case) -> tuple[int, int]:
    """Of a forward pass, and of the backward pass that follows it to the input."""
    pixels, found = case.pixels[:1], []
    for backward in (False, True):
        reading: dict[str, Any] = {}
        with instruments.work(pixels.device, reading, num_labels=NUM_CLASSES):
            leaf = pixels.detach().requires_grad_(backward)
            logits = case.forward(leaf)
            if backward:
                torch.autograd.grad(logits.sum(), leaf)
        found.append(reading["flops"])
    return found[0], found[1] - found[0]


def compare(args: argparse.Namespace, case: Case) -> None:
    """Both sides on the same batches."""
    ours, theirs = [], []
    for first, batch in case.batches(args.batch_size):
        ours.append(kept(args, measure_ours, batch, first))
        theirs.append(kept(args, measure_theirs, batch, first))
    count, (of_ours, of_theirs) = len(case.pixels), (joined(ours), joined(theirs))
    runs = f"AutoAttack ({', '.join(REFERENCES[args.tier])})"
    print(f"\n{count} images, {args.memory_format}, {torch.get_num_threads()} threads, seed {args.seed}")
    print("| | " + " | ".join(f"{level}/255" for level in range(9)) + " |")
    print("| --- " * 10 + "|")
    for name, accuracies in ((f"{args.tier}, %", of_ours), (f"{runs}, % |", of_theirs)):
        print(f"| {name} | " + " | ".join(f"{100 * row.float().mean():.1f}" for row in accuracies) + " |")
    print(f"the same for {100 * (of_ours[1:] == of_theirs).float().mean():.1f} % of images and epsilons\n")

    of_forward, of_backward = operations_per_image(case)
    print("| | forward / image | backward / image | seconds | GFLOP / image | GFLOP/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    totals = []
    for name, batches in ((args.tier, ours), (f"{runs}, 8 runs", theirs)):
        forward, backward = passes_per_image(batches)
        totals.append(forward + backward)
        seconds, operations = sum(b["seconds"] for b in batches), (forward * of_forward + backward * of_backward) / 1e9
        print(
            f"| {name} | {forward:.0f} | {backward:.0f} | {seconds:.0f} | {operations:.1f} "
            f"| {operations * count / seconds:.1f} |"
        )
    peak = instruments.matmul_peak(case.pixels.device, torch.float32)
    print(f"matrix product: {peak / 1e9:.0f} GFLOP/s of a core")
    times = [b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True)]
    print(f"\nforward and backward passes: {totals[1] / totals[0]:.2f} times fewer")
    print(f"time: {statistics.median(times):.2f} times less (median of {len(times)} batches, ", end="")
    print(f"{min(times):.2f} to {max(times):.2f})")
    withstood, standing = of_ours[1:].float().sum(dim=0).mean().item(), of_ours[1].float().mean().item()
    print(
        f"bound: an image withstands {withstood:.2f} of the 8 epsilons on average, {standing:.2f} of the images at "
        f"least one; one failed attack for each of those makes {withstood / standing:.2f} times fewer passes"
    )


def growth(args: argparse.Namespace, case: Case) -> None:
    """How the cost of an image grows. That of one run an epsilon is computed: a full one for each it withstands."""
    total = len(case.pixels)
    cases = [case._replace(num_epsilons=count) for count in (1, 2, 4, 16)]
    parts = [max(total // share, 1) for share in (4, 2)]
    cases += [case._replace(pixels=case.pixels[:part], labels=case.labels[:part]) for part in parts]
    cases += [case.with_classes(count) for count in (2, 4, 7)]
    print(f"\ntier {args.tier}; first row the reference, in the others one number differs")
    print("| epsilons | images | classes | accuracy at 0, at 8/255, % | passes / image | ms / image ", end="")
    print("| one run an epsilon, at least |")
    print("| --- " * 7 + "|")
    for each in [case, *cases]:
        if len(each.pixels) == 0:
            continue
        batches = [kept(args, measure_ours, batch, first) for first, batch in each.batches(args.batch_size)]
        robust, count = joined(batches).float(), len(each.pixels)
        seconds, withstood = sum(batch["seconds"] for batch in batches), robust[1:].sum(dim=0).mean().item()
        attacks = replace(TIERS[args.tier]["linf"], guess_steps=0)
        at_least = withstood * passes_to_withstand(attacks, "linf", each.num_classes)
        print(
            f"| {each.num_epsilons} | {count} | {each.num_classes} "
            f"| {100 * robust[0].mean():.0f}, {100 * robust[-1].mean():.0f} | {sum(passes_per_image(batches)):.0f} "
            f"| {1e3 * seconds / count:.0f} | {at_least:.0f} |",
            flush=True,
        )


def grouping(args: argparse.Namespace, case: Case) -> None:
    """All images in one group of batches, against each batch alone, in turn: calls of the model and processor time."""
    sizes: dict[str, list[int]] = {}
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    broken_at = {}
    for _ in range(args.rounds):
        for name, group in (("alone", args.batch_size), ("together", len(case.pixels))):
            sizes[name], start, found = [], time.process_time(), []

            def counted(pixels: torch.Tensor, calls: list[int] = sizes[name]) -> torch.Tensor:
                calls.append(len(pixels))
                return case.forward(pixels)

            for first, part in case._replace(forward=counted).batches(group):
                options = {"norm": "linf", "epsilons": case.epsilons, "tier": TIERS[args.tier]["linf"]}
                positions = range(first, first + len(part.pixels))
                options |= {"seed": args.seed, "positions": positions, "batch_size": args.batch_size}
                found.append(find_breaking_points(part.forward, part.pixels, part.labels, **options).broken_at)
            seconds[name].append(time.process_time() - start)
            broken_at[name] = torch.cat(found)
    same = (broken_at["alone"] == broken_at["together"]).float().mean().item()
    print(f"{len(case.pixels)} images, {args.batch_size} at a time; the same for {100 * same:.1f} % of them\n")
    print(
        "| batches | calls of the model | images in a call, mean | processor time, s (median) |\n" + "| --- " * 4 + "|"
    )
    for name, calls in sizes.items():
        print(f"| {name} | {len(calls)} | {sum(calls) / len(calls):.1f} | {statistics.median(seconds[name]):.0f} |")
    ratios = [alone / together for alone, together in zip(*seconds.values(), strict=True)]
    print(f"\ntime: {statistics.median(ratios):.2f} times less ({min(ratios):.2f} to {max(ratios):.2f})")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject.add_arguments(parser, max_samples=64)
    parser.add_argument("--tier", choices=list(REFERENCES), default="standard")
    parser.add_argument("--growth", action="store_true", help="Other numbers of epsilons, images and classes.")
    parser.add_argument("--grouping", action="store_true", help="Batches alone, against a group of them.")
    parser.add_argument("--rounds", type=int, default=3, help="Of --grouping.")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks/curve"))
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    measured = subject.load(args)
    case = Case(measured.forward, *measured.pixels_and_labels())
    (growth if args.growth else grouping if args.grouping else compare)(args, case)


if __name__ == "__main__":
    main()
