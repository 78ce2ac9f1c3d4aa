"""What a published robust model carries beside its weights: the report, its curve, and the card that states both.

The report names the SHA-256 of each weight file (as the Hub shows it, and `sha256sum` prints it), so evidence and
weights cannot be exchanged without being noticed.
"""

import dataclasses
import hashlib
import os
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import AutoImageProcessor
from transformers.utils import CONFIG_NAME

from ..evaluation.cache import hash_model
from ..evaluation.provenance import describe_normalization
from ..evaluation.report import RobustnessReport
from ..models.pixel_space import PixelNormalization
from ..utils.files import check_links, replacing, write_text
from .model_card import check_card, make_card
from .safe_loading import check_weight_index, load_classifier, load_config


REPORT_NAME, CURVE_NAME, CARD_NAME = "robustness.json", "robustness_curve.png", "README.md"


def hash_weight_files(folder: str | os.PathLike) -> dict[str, str]:
    """SHA-256 of each safetensors file in the folder, by name.

    Raises:
        ValueError: if there is none, or the weights that would be loaded are others.
    """
    check_weight_index(folder)
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise ValueError(
            f"{folder} holds no weights in the safetensors format; save the model with `save_pretrained`."
        )
    hashes = {}
    for path in paths:
        with path.open("rb") as stream:
            hashes[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def write_evidence(
    folder: str | os.PathLike, report: RobustnessReport, *, name: str | None = None, trust_remote_code: bool = False
) -> RobustnessReport:
    """Write robustness.json and robustness_curve.png beside the weights that the report is about.

    Args:
        folder (`str`):
            A saved model with its processor.
        report ([`RobustnessReport`]):
            Of the very same weights.
        name (`str`, *optional*):
            What to call the model in the report. Defaults to the folder's name.

    Returns:
        [`RobustnessReport`]: the report with the hashes of the weight files.

    Raises:
        ValueError: if the model in the folder is not the one that was evaluated.
    """
    hashes = hash_weight_files(folder)
    if not Path(folder, CONFIG_NAME).is_file():
        raise ValueError(f"{folder} holds no {CONFIG_NAME}, so it is not a model that transformers can load.")
    config = load_config(folder, trust_remote_code=trust_remote_code)
    model = load_classifier(folder, config, trust_remote_code=trust_remote_code)
    evaluated, found = report.settings["model"]["sha256"], hash_model(model)
    if evaluated != found:
        raise ValueError(
            f"The report is about the model {evaluated[:12]}, but {folder} holds {found[:12]}: it was trained "
            "further after the evaluation, or is another model. Evaluate the model in the folder."
        )
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    _check_processor(report, PixelNormalization.from_processor(processor), str(folder))
    described = {**report.settings["model"], "name": name or Path(folder).resolve().name, "files": hashes}
    report = dataclasses.replace(report, settings={**report.settings, "model": described})
    report.save(Path(folder, REPORT_NAME))
    with replacing(Path(folder, CURVE_NAME)) as scratch:
        report.plot(scratch)
    return report


def attach_report(
    folder: str | os.PathLike,
    report: RobustnessReport | None = None,
    *,
    name: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
) -> RobustnessReport:
    """Make a saved model one that [`load_robust_model`] takes: write its report, the curve, and both into its card.

    Args:
        folder (`str`):
            A saved model with its processor.
        report ([`RobustnessReport`], *optional*):
            Of the very same weights. Defaults to the robustness.json in the folder.
        name (`str`, *optional*):
            Of the repository it will be published as. Defaults to the folder's name.
        license, base_model (`str`, *optional*):
            For a card that does not state them.

    Returns:
        [`RobustnessReport`]: the report with the hashes of the weight files.

    Raises:
        ValueError: if there is no report, or the model in the folder is not the one that was evaluated.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    check_links(folder)  # before the text of a card goes into another
    report = write_evidence(folder, report or read_report(folder / REPORT_NAME), name=name)
    path = folder / CARD_NAME
    existing = ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else None
    stated = existing.data.to_dict() if existing else {}
    metadata = {"license": license, "base_model": base_model}
    metadata = {key: value for key, value in metadata.items() if not stated.get(key)}
    card = make_card(existing, name=name.split("/")[-1], report=report, curve=CURVE_NAME, metadata=metadata)
    write_text(path, card.content)
    return report


def read_evidence(
    folder: str | os.PathLike, *, name: str | None = None, trust_remote_code: bool = False
) -> RobustnessReport:
    """Read a model's report and check that it, the card, the processor and the weights belong together.

    Args:
        folder (`str`):
            Where weights, configuration, robustness.json and README.md are.
        name (`str`, *optional*):
            The model's name in messages. Defaults to the folder.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    folder, name = Path(folder), name or str(folder)
    report = read_report(folder / REPORT_NAME, name=name)
    remedy = f"`hf_rft.hub.attach_report({name!r})`" if os.path.isdir(name) else "`hf_rft.hub.attach_report`"
    hashes = report.settings["model"].get("files")
    if hashes is None:
        raise ValueError(
            f"{REPORT_NAME} of {name} is not tied to the weight files beside it: it does not hold their SHA-256. "
            f"{remedy} compares the model with the one that was evaluated, and writes the hashes and the card."
        )
    for file, found in hash_weight_files(folder).items():
        if hashes.get(file) != found:
            raise ValueError(
                f"{file} of {name} has the SHA-256 {found[:12]}, but {REPORT_NAME} is about "
                f"{hashes.get(file, 'no such file')[:12]}: the weights have changed since, or the report is another "
                "model's, so its numbers do not hold. Evaluate the model again, or load it without evidence "
                "(`AutoModelForImageClassification`)."
            )
    if missing := set(hashes) - set(os.listdir(folder)):
        raise ValueError(f"{name} lacks the weights {sorted(missing)} that {REPORT_NAME} is about.")
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    _check_processor(report, PixelNormalization.from_processor(processor), name)
    card_path = folder / CARD_NAME
    if not card_path.is_file():
        raise ValueError(
            f"{name} has no model card ({CARD_NAME}), which states the threat model of its numbers; {remedy} writes "
            "one."
        )
    check_card(ModelCard.load(card_path), report, name=name)
    return report


def read_report(path: str | os.PathLike, *, name: str | None = None) -> RobustnessReport:
    """The report alone, whatever lies beside it.

    Args:
        path (`str`):
            Of the robustness.json.
        name (`str`, *optional*):
            The model's name in messages. Defaults to the folder.

    Raises:
        ValueError: if there is none, it is damaged or of another version, or lacks its threat model.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"{name or path.parent} has no {path.name}, so nothing is known about its robustness. Evaluate it with "
            "`hf-rft evaluate` or `evaluate_robustness`, and attach the report with "
            "`hf_rft.hub.attach_report`."
        )
    report = RobustnessReport.load(path)
    missing = sorted({"model", "dataset", "processor", "tier", "attacks", "seed"} - set(report.settings))
    is_described = not missing and all(isinstance(report.settings[key], dict) for key in ("model", "processor"))
    if not is_described or "sha256" not in report.settings["model"]:
        raise ValueError(
            f"{path} does not say what was attacked, or how: `settings` lacks "
            f"{missing or 'the hash of the model, or the values of the processor'}. Evaluate the model again."
        )
    return report


def _check_processor(report: RobustnessReport, normalization: PixelNormalization, name: str) -> None:
    evaluated, found = report.settings["processor"], describe_normalization(normalization)
    if any(evaluated.get(key) != found[key] for key in ("mean", "std")):
        raise ValueError(
            f"{name} was evaluated with the processor values {evaluated.get('source')}, but now has "
            f"{found['source']}; its numbers hold for the former only. Restore the processor, or evaluate again."
        )
