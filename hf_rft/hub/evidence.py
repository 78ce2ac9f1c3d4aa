"""The evidence stored beside a robust model's weights: the report, its curve, and the card that shows both.

The report holds the SHA-256 of each weight file (which the Hub shows, and `sha256sum` prints), so it cannot be passed
off as that of other weights.
"""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import AutoImageProcessor
from transformers.utils import CONFIG_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from ..evaluation.cache import hash_model
from ..evaluation.provenance import describe_normalization
from ..evaluation.report import RobustnessReport
from ..models.pixel_space import PixelNormalization
from ..utils.files import check_links, replacing, write_text
from .model_card import check_card, make_card
from .safe_loading import base_of, check_weight_index, download_base, is_adapter, load_classifier, load_config


REPORT_NAME, CURVE_NAME, CARD_NAME = "robustness.json", "robustness_curve.png", "README.md"


def hash_weight_files(folder: str | os.PathLike) -> dict[str, str]:
    """SHA-256 of each safetensors file in the folder, by name; of an adapter also that of its configuration.

    Raises:
        ValueError: if there is none, or if other weights would be loaded.
    """
    check_weight_index(folder)
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{folder} has no weights in the safetensors format; save the model with `save_pretrained`.")
    if is_adapter(folder):
        paths.append(Path(folder, ADAPTER_CONFIG_NAME))
    hashes = {}
    for path in paths:
        with path.open("rb") as stream:
            hashes[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def write_evidence(
    folder: str | os.PathLike, report: RobustnessReport, *, name: str | None = None
) -> RobustnessReport:
    """[`attach_report`] without the card: write robustness.json and robustness_curve.png beside the weights."""
    hashes = hash_weight_files(folder)
    if not Path(folder, CONFIG_NAME).is_file():
        raise ValueError(f"{folder} has no {CONFIG_NAME}, so it is not a model that transformers can load.")
    evaluated, found = report.settings["model"]["sha256"], hash_model(load_classifier(folder, load_config(folder)))
    if evaluated != found:
        raise ValueError(
            f"The report is about the model {evaluated[:12]}, but {folder} holds {found[:12]}: another model, or one "
            "trained further after the evaluation. Evaluate the model in the folder."
        )
    _check_processor(report, AutoImageProcessor.from_pretrained(folder), str(folder))
    described = {**report.settings["model"], "name": name or Path(folder).resolve().name, "files": hashes}
    if is_adapter(folder):
        described["base"] = _describe_base(folder)
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
    """Write a saved model's report, its curve and its card, as [`load_robust_model`] requires.

    Args:
        folder (`str`):
            A saved model with its processor.
        report ([`RobustnessReport`], *optional*):
            A report about exactly these weights. Defaults to the robustness.json in the folder.
        name (`str`, *optional*):
            The repository it will be published as. Defaults to the folder's name.
        license, base_model (`str`, *optional*):
            Used if the card does not state them already.

    Returns:
        [`RobustnessReport`]: the report with the hashes of the weight files.

    Raises:
        ValueError: if there is no report, or the model in the folder is not the one that was evaluated.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    check_links(folder)  # before a linked file is read into the card
    report = write_evidence(folder, report or read_report(folder / REPORT_NAME), name=name)
    path = folder / CARD_NAME
    existing = ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else None
    stated = existing.data.to_dict() if existing else {}
    offered = {"license": license, "base_model": base_model}
    metadata = {key: value for key, value in offered.items() if not stated.get(key)}
    options = {"metadata": metadata, "is_adapter": is_adapter(folder)}
    card = make_card(existing, name=name.split("/")[-1], report=report, curve=CURVE_NAME, **options)
    write_text(path, card.content)
    return report


def read_evidence(
    folder: str | os.PathLike, *, name: str | None = None, trust_remote_code: bool = False
) -> RobustnessReport:
    """Read a model's report and check that it, the card, the processor and the weights belong together.

    `name` is the model's name in error messages, by default the folder.

    Raises:
        ValueError: naming what is missing or does not match.
    """
    folder, name = Path(folder), name or str(folder)
    report = read_report(folder / REPORT_NAME, name=name)
    remedy = f"`hf_rft.hub.attach_report({name!r})`" if os.path.isdir(name) else "`hf_rft.hub.attach_report`"
    hashes = report.settings["model"].get("files")
    if hashes is None:
        raise ValueError(
            f"{REPORT_NAME} of {name} does not hold the SHA-256 of the weight files beside it. {remedy} checks that "
            "they are the evaluated ones, and writes the hashes and the card."
        )
    for file, found in hash_weight_files(folder).items():
        if hashes.get(file) != found:
            raise ValueError(
                f"{file} of {name} has the SHA-256 {found[:12]}, but {REPORT_NAME} is about "
                f"{hashes.get(file, 'no such file')[:12]}: the weights have changed since, or the report is another "
                "model's. Evaluate the model again, or load it without evidence (`AutoModelForImageClassification`)."
            )
    if missing := set(hashes) - set(os.listdir(folder)):
        raise ValueError(f"{name} lacks the weights {sorted(missing)} that {REPORT_NAME} is about.")
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    _check_processor(report, processor, name)
    card_path = folder / CARD_NAME
    if not card_path.is_file():
        raise ValueError(
            f"{name} has no model card ({CARD_NAME}) that states the threat model of its numbers; {remedy} writes it."
        )
    check_card(ModelCard.load(card_path), report, name=name)
    return report


def check_base(folder: str | os.PathLike, report: RobustnessReport, *, name: str | None = None, **hub_options) -> None:
    """Check that the base model of an adapter is the one that its report is about.

    Args:
        folder, name:
            Of the adapter, as in [`read_evidence`].
        hub_options:
            `token` and `cache_dir`, with which to fetch the base model.

    Raises:
        ValueError: naming the base model and what does not match.
    """
    expected = report.settings["model"].get("base", {}).get("files")
    if expected is None:
        raise ValueError(
            f"{REPORT_NAME} of the adapter {name or folder} does not say which base model was evaluated with it. "
            "`hf_rft.hub.attach_report` checks that, and writes it."
        )
    found = _describe_base(folder, **hub_options)
    if found["files"] != expected:
        raise ValueError(
            f"The base model {found['name']} of the adapter {name or folder} has weights with the SHA-256 "
            f"{_first_characters(found['files'])}, but {REPORT_NAME} is about {_first_characters(expected)}: the base "
            "model has changed since. Evaluate the adapter again, or name in adapter_config.json the `revision` that "
            "was evaluated."
        )


def _describe_base(folder: str | os.PathLike, **hub_options) -> dict[str, Any]:
    (name, revision), base_folder = base_of(folder), download_base(folder, **hub_options)
    name = Path(name).name if os.path.isdir(name) else name  # reports are published
    return {"name": name, "revision": revision, "files": hash_weight_files(base_folder)}


def _first_characters(hashes: dict[str, str]) -> str:
    return ", ".join(sorted(value[:12] for value in hashes.values()))


def read_report(path: str | os.PathLike, *, name: str | None = None) -> RobustnessReport:
    """Read a robustness.json, without comparing it with the files beside it.

    `name` is the model's name in error messages, by default the folder.

    Raises:
        ValueError: if there is none, or it is damaged, of another version or incomplete.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"{name or path.parent} has no {path.name}, so nothing is known about its robustness. Evaluate it with "
            "`hf-rft evaluate` or `evaluate_robustness`, and attach the report with `hf_rft.hub.attach_report`."
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


def _check_processor(report: RobustnessReport, processor: Any, name: str) -> None:
    evaluated = report.settings["processor"]
    found = describe_normalization(PixelNormalization.from_processor(processor))
    if any(evaluated.get(key) != found[key] for key in ("mean", "std")):
        raise ValueError(
            f"{name} was evaluated with the processor values {evaluated.get('source')}, but now has "
            f"{found['source']}; its numbers hold only for the former. Restore the processor, or evaluate again."
        )
