"""What the benchmarks measure: a fine-tuned model, and images of the bundled test split."""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset, load_dataset
from instruments import MEMORY_FORMATS
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_rft import PixelNormalization
from hf_rft.data import bundled
from hf_rft.data.examples import Examples
from hf_rft.models.classifier import PixelClassifier


class Measured(NamedTuple):
    model: torch.nn.Module
    processor: object
    dataset: Dataset
    subject: PixelClassifier

    def pixels_and_labels(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.subject.load(Examples(self.dataset, self.processor), range(len(self.dataset)))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.subject.forward_in(None)(pixels)


def add_arguments(parser: argparse.ArgumentParser, *, max_samples: int) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("outputs/efficientnet_lite0_hinge"),
        help="Folder that `hf-rft train` wrote.",
    )
    parser.add_argument("--max_samples", type=int, default=max_samples, help="Images of the bundled test split.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory_format", choices=list(MEMORY_FORMATS), default="channels_last")


def load(args: argparse.Namespace) -> Measured:
    if not args.model.is_dir():
        raise SystemExit(f"--model {args.model} is not there; `hf-rft train` makes it.")
    model = AutoModelForImageClassification.from_pretrained(args.model).eval().requires_grad_(False)
    model = model.to(memory_format=MEMORY_FORMATS[args.memory_format])
    dataset = load_dataset(bundled.resolve(bundled.DATASET), split="test")
    dataset = dataset.shuffle(seed=0).select(range(min(args.max_samples, len(dataset))))
    processor = AutoImageProcessor.from_pretrained(args.model)
    subject = PixelClassifier(model, PixelNormalization.from_processor(processor))
    return Measured(model, processor, dataset, subject)
