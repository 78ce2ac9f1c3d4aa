"""How well do clean margins rank the images by robustness, and what does that save?

All test images are attacked. Then, many times, a random subset is taken for the attacked ones, and the robust accuracy
of all images is estimated from the subset and all margins; the truth is known. `--threshold` is chosen on one half of
the images and judged on the other.
"""

import argparse

import numpy as np
import subject

from hf_rft import evaluate_robustness
from hf_rft.evaluation.margins import estimate_robust_accuracy
from hf_rft.metrics.expected_robustness.expected_robustness import confidence_interval


RECALL = 0.9


def subset_of(report, positions):
    """The report that these examples alone would have given."""
    columns = ("labels", "clean_predictions", "adversarial_predictions", "broken_at", "distances", "margins")
    return type(report)(
        norm=report.norm,
        epsilons=report.epsilons,
        flags=report.flags,
        passes=report.passes,
        settings=report.settings,
        **{name: getattr(report, name)[positions] for name in columns},
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject.add_arguments(parser, max_samples=500)
    parser.add_argument("--epsilons", nargs="+", default=["0", "2/255", "4/255", "8/255"])
    parser.add_argument("--tier", default="fast")
    parser.add_argument("--draws", type=int, default=1000, help="Random subsets of each size.")
    parser.add_argument("--cache_dir", default="outputs/benchmarks/margins")
    args = parser.parse_args(argv)
    measured = subject.load(args)
    report = evaluate_robustness(
        measured.model,
        measured.dataset,
        measured.processor,
        norm="linf",
        epsilons=args.epsilons,
        tier=args.tier,
        seed=args.seed,
        cache_dir=args.cache_dir,
    )
    generator = np.random.default_rng(args.seed)
    is_right, is_robust = report.broken_at > 0, report.broken_at == len(report.epsilons)
    print(
        f"{len(report)} images: {100 * is_right.mean():.1f} % right, {100 * is_robust.mean():.1f} % robust at ", end=""
    )
    print(f"{args.epsilons[-1]}; rank correlation of margin and distance {report.margin_correlation:.2f}\n")

    found = []
    for _ in range(args.draws):
        order = generator.permutation(len(report))
        half, other = order[: len(report) // 2], order[len(report) // 2 :]
        threshold = subset_of(report, half).margin_threshold(RECALL)
        below = report.margins[other] <= threshold
        brittle, robust = is_right[other] & ~is_robust[other], is_robust[other]
        found.append((below[brittle].mean(), below[robust].mean()))
    recalled, alarmed = np.mean(found, axis=0)
    print(
        f"threshold for {RECALL:.0%} of the brittle predictions of one half: it finds {recalled:.0%} of those of the "
    )
    print(f"other half, and {alarmed:.0%} of its robust predictions\n")

    print(
        "| attacked images | mean error, points | of the subset alone | width of the interval | of the subset's own ",
        end="",
    )
    print("| holds the truth, % |")
    print("| --- " * 6 + "|")
    truth = is_robust.mean()
    for size in (25, 50, 100, 200):
        rows = []
        for _ in range(args.draws):
            positions = generator.choice(len(report), size, replace=False)
            estimate = estimate_robust_accuracy(subset_of(report, positions), is_right, report.margins)
            alone = is_robust[positions].mean()
            low, high = confidence_interval(alone, size)
            is_covered = estimate.low <= truth <= estimate.high
            errors = abs(estimate.robust_accuracy - truth), abs(alone - truth)
            rows.append((*errors, estimate.high - estimate.low, high - low, is_covered))
        numbers = 100 * np.mean(rows, axis=0)
        print(f"| {size} | " + " | ".join(f"{number:.1f}" for number in numbers) + " |")


if __name__ == "__main__":
    main()
