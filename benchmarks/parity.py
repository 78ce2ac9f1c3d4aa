"""Is tier "standard" as strong as the public AutoAttack? Accuracy at each epsilon, and agreement per example."""

import argparse
import json
from pathlib import Path

import subject
import torch

from hf_rft import ThreatModel, evaluate_robustness
from hf_rft.evaluation.reference import run_autoattack


def reference_robust(args, forward, pixels, labels, epsilon: str) -> torch.Tensor:
    """Which examples withstand `apgd-ce` and `apgd-t` of pyautoattack; each finished batch is kept on disk."""
    robust = []
    for first in range(0, len(pixels), args.batch_size):
        path = args.output_dir / f"reference_{epsilon.replace('/', '_')}_{first}_{args.batch_size}.json"
        if not path.exists():
            batch = slice(first, first + args.batch_size)
            result = run_autoattack(
                forward,
                pixels[batch],
                labels[batch],
                threat_model=ThreatModel("linf", epsilon),
                num_classes=10,
                attacks=("apgd-ce", "apgd-t"),
                seed=args.seed,
                batch_size=args.batch_size,
            )
            path.write_text(json.dumps({"robust": result.robust.tolist(), "passes": result.passes}))
            print(f"{path.name}: {result.robust.sum()} of {len(result.robust)} withstand", flush=True)
        robust += json.loads(path.read_text())["robust"]
    return torch.tensor(robust)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    subject.add_arguments(parser, max_samples=200)
    parser.add_argument("--epsilons", nargs="+", default=["2/255", "4/255", "8/255"])
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks/parity"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    measured = subject.load(args)
    pixels, labels = measured.pixels_and_labels()

    report = evaluate_robustness(
        measured.model,
        measured.dataset,
        measured.processor,
        norm="linf",
        epsilons=["0", *args.epsilons],
        tier="standard",
        batch_size=args.batch_size,
        seed=args.seed,
        cache_dir=args.output_dir / "cache",
    )
    print(f"\n{report.table()}\n")
    print("| epsilon | standard | apgd-ce + apgd-t | difference | same for | only ours fools | only theirs |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for place, epsilon in enumerate(args.epsilons, start=1):
        theirs = reference_robust(args, measured.forward, pixels, labels, epsilon).numpy()
        ours = report.broken_at > place
        print(
            f"| {epsilon} | {100 * ours.mean():.1f} % | {100 * theirs.mean():.1f} % | "
            f"{100 * (ours.mean() - theirs.mean()):+.1f} | {100 * (ours == theirs).mean():.1f} % | "
            f"{(theirs & ~ours).sum()} | {(ours & ~theirs).sum()} |"
        )


if __name__ == "__main__":
    main()
