"""Do the trust checks notice defences that only mask gradients, and keep quiet about honest models?"""

import argparse
import copy
import io
from pathlib import Path

import subject
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

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


class FiveBits(Masked):
    """32 grey levels (feature squeezing, Xu et al. 2018)."""

    def forward(self, pixel_values):
        return super().forward((pixel_values * 16).round() / 16)


class Thermometer(Masked):
    """How many of 15 thresholds a value exceeds (Buckman et al. 2018), without their further training."""

    def forward(self, pixel_values):
        thresholds = torch.linspace(-1, 1, 17, device=pixel_values.device)[1:-1]
        exceeded = (pixel_values.unsqueeze(-1) > thresholds).to(pixel_values).mean(dim=-1)
        return super().forward(2 * exceeded - 1 + 0 * pixel_values)  # the derivative exists, and is zero


class Jpeg(Masked):
    """JPEG of quality 75, whose derivative nobody computes."""

    class _Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, pixels):
            compressed = []
            for image in pixels:
                file = io.BytesIO()
                to_pil_image(image.clamp(0, 1)).save(file, "JPEG", quality=75)
                compressed.append(pil_to_tensor(Image.open(file)) / 255)
            return torch.stack(compressed).to(pixels)

        @staticmethod
        def backward(ctx, gradient):
            return torch.zeros_like(gradient)

    def forward(self, pixel_values):
        return super().forward(2 * self._Function.apply((pixel_values + 1) / 2) - 1)


class OnActivations(Masked):
    """Changes what every activation function returns."""

    def __init__(self, model: torch.nn.Module):
        super().__init__(copy.deepcopy(model))
        for module in self.model.modules():
            if isinstance(module, torch.nn.ReLU6):
                module.register_forward_hook(lambda module, inputs, output: self.changed(output))


class KWinners(OnActivations):
    """Only the largest half of an image's activations stays in each layer (Xiao et al. 2020)."""

    def changed(self, activations):
        kept = activations.flatten(1)
        smallest = kept.topk(kept.shape[1] // 2, dim=1).values[:, -1].reshape(-1, *[1] * (activations.dim() - 1))
        return activations * (activations >= smallest)


class MeanSparse(OnActivations):
    """Activations within 0.2 standard deviations of their channel's mean become the mean (Amini et al. 2024)."""

    def changed(self, activations):
        others = (0, *range(2, activations.dim()))
        mean = activations.detach().mean(dim=others, keepdim=True)
        near = (activations - mean).abs() < 0.2 * activations.detach().std(dim=others, keepdim=True)
        return torch.where(near, mean, activations)


class Temperature(Masked):
    """Logits divided by 100, an honest change: confidence says nothing about robustness."""

    def forward(self, pixel_values):
        return super().forward(pixel_values) / 100


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
    cases += [(f"Temperature, {name}", Temperature(model), False) for name, model, _ in cases]
    defences = (QuantisedInput, FiveBits, Thermometer, Jpeg, ScaledLogits, RandomResize, SoftmaxOutputs)
    defences += (DeadActivation, KWinners, MeanSparse)
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
