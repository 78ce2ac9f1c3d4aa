"""Does FMN find distances that are known? Linear classifiers, whose boundaries are planes, in float32."""

import argparse
import time

import torch

from hf_rft import ThreatModel
from hf_rft.attacks import fmn


SHAPE = (3, 32, 32)
DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}
# No example needs this much.
LARGEST = {"linf": 1, "l2": 50, "l1": 1000}
# Distances below it drown in float32; above, one pixel alone (the L1 optimum) would leave [0, 1].
SMALLEST_DISTANCE, LARGEST_DISTANCE = 1e-3, 0.35


def make_problem(classes: int, norm: str, count: int, seed: int):
    """Classifier, images, labels and the distance of each image to the nearest plane, in float64."""
    generator = torch.Generator().manual_seed(seed)
    dimension = torch.Size(SHAPE).numel()
    weight = torch.randn((classes, dimension), generator=generator, dtype=torch.float64)
    pixels = (0.4 + 0.2 * torch.rand((count, dimension), generator=generator, dtype=torch.float64)).float()
    bias = -(pixels.double() @ weight.T).mean(dim=0)

    def forward(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ weight.to(images).T + bias.to(images)

    logits = forward(pixels.double())
    labels = logits.argmax(dim=1)
    lead = logits.gather(1, labels.unsqueeze(1)) - logits
    slope = torch.linalg.vector_norm(weight[labels].unsqueeze(1) - weight, ord=DUAL[norm], dim=2)
    distances = (lead / slope.clamp_min(1e-12)).scatter(1, labels.unsqueeze(1), torch.inf).amin(dim=1)
    usable = (distances >= SMALLEST_DISTANCE) & (distances <= LARGEST_DISTANCE)
    return forward, pixels[usable].reshape(-1, *SHAPE), labels[usable], distances[usable]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--count", type=int, default=1000, help="Images drawn; those at usable distances are kept.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    print(f"FMN, {args.steps} steps, seeds {args.seeds}, {torch.get_num_threads()} threads; distance found / distance")
    print("| classes | norm | images | found | median | 95th percentile | largest | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for classes in (2, 10):
        for norm in DUAL:
            ratios, fooled, start = [], [], time.perf_counter()
            for seed in args.seeds:
                forward, pixels, labels, distances = make_problem(classes, norm, args.count, seed)
                threat_model = ThreatModel(norm, LARGEST[norm])
                adversarial = fmn(forward, pixels, labels, threat_model=threat_model, steps=args.steps)
                fooled.append(forward(adversarial).argmax(dim=1) != labels)
                found = threat_model.distance(adversarial.double(), pixels.double())
                ratios.append((found / distances)[fooled[-1]])
            ratio, found = torch.cat(ratios), torch.cat(fooled)
            print(
                f"| {classes} | {norm} | {len(found)} | {100 * found.double().mean():.2f} % | {ratio.median():.5f} | "
                f"{ratio.quantile(0.95):.5f} | {ratio.max():.5f} | {time.perf_counter() - start:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
