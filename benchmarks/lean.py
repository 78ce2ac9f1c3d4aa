"""Does the tier `lean` find what `standard` finds, and at which cost?

Both attack the same images in 9-point curves of each norm, trust checks included. `standard` agrees with AutoAttack's
`apgd-ce` and `apgd-t` (curve.py, parity.py), one full run of which at each withstood epsilon is what the last column
compares with; its bound is what a search at the cost of `standard` could save at most. Finished batches are kept on
disk: the same command goes on where it was.
"""

import argparse
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import subject
from datasets import load_dataset

from hf_rft import evaluate_robustness
from hf_rft.data import bundled
from hf_rft.evaluation.estimate import passes_to_withstand
from hf_rft.evaluation.tiers import TIERS
from hf_rft.threat_model import NORMS, format_epsilon, parse_epsilon


POINTS = 8


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject.add_arguments(parser, max_samples=64)
    parser.add_argument("--dataset_name", default=bundled.DATASET)
    parser.add_argument("--norms", nargs="+", choices=list(NORMS), default=list(NORMS))
    parser.add_argument("--largest", nargs="+", default=["8/255", "1", "46"], help="Largest epsilon of each norm.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks/lean"))
    args = parser.parse_args(argv)
    measured = subject.load(args)
    dataset = load_dataset(bundled.resolve(args.dataset_name), split="test").shuffle(seed=0)
    dataset = dataset.select(range(min(args.max_samples, len(dataset))))

    print(
        "| norm | largest epsilon | accuracy of standard, of lean, in % | the same for | only standard breaks ", end=""
    )
    print("| passes / image | times fewer than one run an epsilon (bound) |")
    print("| --- " * 7 + "|")
    for norm, largest in zip(args.norms, args.largest, strict=True):
        epsilons = [parse_epsilon(largest) * Fraction(point, POINTS) for point in range(POINTS + 1)]
        reports, seconds = {}, {}
        for tier in ("standard", "lean"):
            start = time.perf_counter()
            reports[tier] = evaluate_robustness(
                measured.model,
                dataset,
                measured.processor,
                norm=norm,
                epsilons=epsilons,
                tier=tier,
                seed=args.seed,
                batch_size=32,
                cache_dir=args.output_dir,
            )
            seconds[tier] = time.perf_counter() - start
        standard, lean = reports.values()
        withstood = np.clip(standard.broken_at - 1, 0, None)
        classes = standard.settings["model"]["num_classes"]
        one_run = passes_to_withstand(replace(TIERS["standard"][norm], guess_steps=0), norm, classes)
        passes = {tier: sum(report.passes) / len(report) for tier, report in reports.items()}
        at_once, bound = withstood.mean() * one_run, withstood.mean() / (withstood > 0).mean()
        accuracies = [", ".join(f"{100 * accuracy:.0f}" for accuracy in r.accuracies) for r in (standard, lean)]
        points = np.arange(POINTS + 1)[:, None]
        same = (standard.broken_at > points) == (lean.broken_at > points)
        print(
            f"| {norm} | {format_epsilon(epsilons[-1])} | {'; '.join(accuracies)} | {100 * same.mean():.1f} % "
            f"| {int((standard.broken_at < lean.broken_at).sum())} of {len(standard)} images "
            f"| {passes['standard']:.0f}, {passes['lean']:.0f} "
            f"| {at_once / passes['standard']:.1f}, {at_once / passes['lean']:.1f} ({bound:.1f}) |",
            flush=True,
        )
        print(f"({norm}: {seconds['standard']:.0f} and {seconds['lean']:.0f} s, if nothing was on disk)", flush=True)


if __name__ == "__main__":
    main()
