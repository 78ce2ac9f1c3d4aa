"""Results on disk, one file per batch, so that an interrupted evaluation resumes where it stopped.

A file is named by a hash of everything its content depends on: the model's weights and structure, the images and
labels themselves, the threat model, the attacks and the seed. So one folder can hold the results of many evaluations
and serve several processes at once; results that do not match are never read.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..utils.files import replacing


logger = logging.getLogger(__name__)

Record = dict[str, torch.Tensor]


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of the names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_model(model: torch.nn.Module) -> str:
    """Hash of the weights, buffers and structure of a model, and of the settings of its adapters (peft).

    It does not cover the model's code, so [`ResultCache`] also compares predictions.
    """
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # peft keeps the head that it replaced, often a random one.
    weights = {name: tensor for name, tensor in weights.items() if ".original_module." not in name}
    described = {"structure": repr(model), "weights": hash_tensors(weights)}
    if adapters := getattr(model, "peft_config", None):
        described["adapters"] = {name: _settings(config.to_dict()) for name, config in adapters.items()}
    return hash_json(described)


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    """What an adapter computes; not where it comes from."""
    origin = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    return {name: str(value) for name, value in values.items() if name not in origin}


def hash_json(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class ResultCache:
    """Records of tensors by key, in `<folder>/<key>.safetensors`; without a folder, nothing is stored.

    Args:
        folder (`str` or `Path`, *optional*):
            Created if it does not exist.
    """

    def __init__(self, folder: str | Path | None):
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def load(self, key: str, logits: torch.Tensor) -> Record | None:
        """The record, if it exists and its model had these logits on the clean images."""
        if self.folder is None or not (path := self.folder / f"{key}.safetensors").is_file():
            return None
        try:
            record = load_file(path)
            atol = 1e-3 * logits.abs().max().item()
            is_same = torch.allclose(record.pop("clean_logits"), logits.cpu(), rtol=1e-3, atol=atol)
        except (SafetensorError, KeyError, RuntimeError, OSError) as error:
            logger.warning("%s cannot be read (%s); its batch is evaluated again.", path, error)
            return None
        if not is_same:
            logger.warning("%s is from a model with other predictions; its batch is evaluated again.", path)
            return None
        return record

    def save(self, key: str, record: Record, logits: torch.Tensor) -> None:
        """Write a record whole or not at all."""
        if self.folder is None:
            return
        tensors = {name: tensor.cpu().contiguous() for name, tensor in {**record, "clean_logits": logits}.items()}
        with replacing(self.folder / f"{key}.safetensors") as scratch:
            save_file(tensors, scratch)


def hash_examples(pixels: torch.Tensor, labels: torch.Tensor) -> list[str]:
    """A hash per image and its label."""
    return [hash_tensors({"pixels": image, "label": label}) for image, label in zip(pixels, labels, strict=True)]


def hash_levels(pixels: torch.Tensor, labels: torch.Tensor) -> list[str]:
    """[`hash_examples`] of the images in bytes: the same for processors that differ only in how they normalise."""
    return hash_examples((255 * pixels).round().to(torch.uint8), labels.long())


def group_key(evaluated: Mapping[str, Any], positions: Sequence[int], examples: Sequence[str]) -> str:
    """Key of a group of batches: a hash of what is evaluated, and of the examples and their positions."""
    return hash_json({"evaluated": evaluated, "positions": list(positions), "examples": list(examples)})
