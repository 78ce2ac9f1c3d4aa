"""A tiny robust model as it is published: weights, processor, report and card in one folder."""

from pathlib import Path

from conftest import Images, make_model
from transformers import AutoModelForImageClassification, ViTImageProcessor

from hf_rft import evaluate_robustness
from hf_rft.hub.evidence import attach_report


def save_model(folder: Path, family: str = "vit", seed: int = 0, **options) -> None:
    make_model(family, seed).save_pretrained(folder, **options)
    size = {"height": 16, "width": 16}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)


def evaluate(folder: Path, epsilons=("0", "2/255", "8/255")):
    return evaluate_robustness(
        AutoModelForImageClassification.from_pretrained(folder),
        Images(12),
        ViTImageProcessor.from_pretrained(folder),
        norm="linf",
        epsilons=list(epsilons),
        tier=[("apgd", 3)],
        progress_bar=False,
    )


def publish(folder: Path, report=None, name: str = "user/robust"):
    """Write the evidence into the folder of a saved model; the report as it is written."""
    return attach_report(folder, report or evaluate(folder), name=name)
