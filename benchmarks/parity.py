"""Is tier "standard" as strong as the public AutoAttack, in each norm? Accuracy at each epsilon, and agreement per
example."""

import argparse
import json
from pathlib import Path

import subject
import torch

from hf_rft import ThreatModel, evaluate_robustness
from hf_rft.evaluation.reference import run_autoattack


EPSILONS = {"linf": ["2/255", "4/255", "8/255"], "l2": ["0.25", "0.5", "1"], "l1": ["3", "6", "12"]}


def reference_robust(args, forward, pixels, labels, norm: str, epsilon: str) -> torch.Tensor:
    """Which examples withstand `apgd-ce` and `apgd-t` of pyautoattack; each finished batch is kept on disk."""
    robust = []
    for first in range(0, len(pixels), args.batch_size):
        path = args.output_dir / f"reference_{norm}_{epsilon.replace('/', '_')}_{first}_{args.batch_size}.json"
        if not path.exists():
            batch = slice(first, first + args.batch_size)
            result = run_autoattack(
                forward,
                pixels[batch],
                labels[batch],
                threat_model=ThreatModel(norm, epsilon),
                num_classes=10,
                attacks=("apgd-ce", "apgd-t"),
                seed=args.seed,
                batch_size=args.batch_size,
            )
            path.write_text(json.dumps({"robust": result.robust.tolist(), "passes": result.passes}))
            print(f"{path.name}: {result.robust.sum()} of {len(result.robust)} withstand", flush=True)
        robust += json.loads(path.read_text())["robust"]
    return torch.tensor(robust)


def compare(args, measured: subject.Measured, norm: str, epsilons: list[str]) -> list[str]:
    """Rows of the table."""
    pixels, labels = measured.pixels_and_labels()
    report = evaluate_robustness(
        measured.model,
        measured.dataset,
        measured.processor,
        norm=norm,
        epsilons=["0", *epsilons],
        tier="standard",
        batch_size=args.batch_size,
        seed=args.seed,
        cache_dir=args.output_dir / "cache",
    )
    print(f"\n{report.table()}\n", flush=True)
    rows = []
    for place, epsilon in enumerate(epsilons, start=1):
        theirs = reference_robust(args, measured.forward, pixels, labels, norm, epsilon).numpy()
        ours = report.broken_at > place
        rows.append(
            f"| {norm} | {epsilon} | {100 * ours.mean():.1f} % | {100 * theirs.mean():.1f} % | "
            f"{100 * (ours.mean() - theirs.mean()):+.1f} | {100 * (ours == theirs).mean():.1f} % | "
            f"{(theirs & ~ours).sum()} | {(ours & ~theirs).sum()} |"
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    subject.add_arguments(parser, max_samples=200)
    parser.add_argument("--norms", nargs="+", choices=list(EPSILONS), default=list(EPSILONS))
    parser.add_argument("--epsilons", nargs="+", help="Of the one norm given, instead of three for each.")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks/parity"))
    args = parser.parse_args(argv)
    if args.epsilons and len(args.norms) > 1:
        parser.error("--epsilons are those of one norm; name it with --norms.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    measured = subject.load(args)

    rows = [row for norm in args.norms for row in compare(args, measured, norm, args.epsilons or EPSILONS[norm])]
    print("| norm | epsilon | standard | apgd-ce + apgd-t | difference | same for | only ours fools | only theirs |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
