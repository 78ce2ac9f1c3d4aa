"""Do the trust checks notice defences that only mask gradients, and keep quiet about honest models?"""

import argparse
from pathlib import Path

import subject
import torch
import torch.nn.functional as F

from hf_rft import evaluate_robustness


class Masked(torch.nn.Module):
    """A classifier behind a trick that misleads attacks without making it robust."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).logits


class QuantisedInput(Masked):
    """Sixteen grey levels: the derivative of rounding is zero."""

    def forward(self, pixel_values):
        return super().forward((pixel_values * 8).round() / 8)


class ScaledLogits(Masked):
    """The softmax of logits times 1e4 is exactly 0 or 1."""

    def forward(self, pixel_values):
        return 1e4 * super().forward(pixel_values)


class RandomResize(Masked):
    """Smaller by up to an eighth, at a random place."""

    def forward(self, pixel_values):
        side = pixel_values.shape[-1]
        smaller = int(torch.randint(side * 7 // 8, side + 1, ()))
        left, top = torch.randint(0, side - smaller + 1, (2,)).tolist()
        margins = (left, side - smaller - left, top, side - smaller - top)
        return super().forward(F.pad(F.interpolate(pixel_values, size=(smaller, smaller)), margins))


class SoftmaxOutputs(Masked):
    """Probabilities in place of logits."""

    def forward(self, pixel_values):
        return super().forward(pixel_values).softmax(dim=1)


class DeadActivation(Masked):
    """An activation whose backward pass returns zero."""

    class _Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values.clone()

        @staticmethod
        def backward(ctx, gradient):
            return torch.zeros_like(gradient)

    def forward(self, pixel_values):
        return super().forward(self._Function.apply(pixel_values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    subject.add_arguments(parser, max_samples=32)
    parser.add_argument(
        "--standard_model",
        type=Path,
        default=Path("outputs/efficientnet_lite0_standard"),
        help="Folder that `hf-rft train --config fashion_mnist/efficientnet_lite0_standard` wrote.",
    )
    args = parser.parse_args()
    robust = subject.load(args)
    args.model = args.standard_model
    standard = subject.load(args)
    cases = [("robust model", robust.model, False), ("standard model", standard.model, False)]
    defences = (QuantisedInput, ScaledLogits, RandomResize, SoftmaxOutputs, DeadActivation)
    cases += [(defence.__name__, defence(standard.model), True) for defence in defences]

    print("| model | accuracy at 0, 2, 4, 8 /255, % | flags | as it should be |")
    print("| --- | --- | --- | --- |")
    wrong = 0
    for name, model, is_masked in cases:
        report = evaluate_robustness(
            model.eval(),
            robust.dataset,
            robust.processor,
            norm="linf",
            epsilons=["0", "2/255", "4/255", "8/255"],
            tier="fast",
            seed=args.seed,
            progress_bar=False,
        )
        is_right = bool(report.flags) == is_masked
        wrong += not is_right
        accuracies = ", ".join(f"{100 * accuracy:.0f}" for accuracy in report.accuracies)
        print(f"| {name} | {accuracies} | {', '.join(report.flags) or 'none'} | {is_right} |", flush=True)
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()
