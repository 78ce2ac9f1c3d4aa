"""Where a number comes from: which weights, images and versions. JSON values only.

Reports are published, so nothing here reveals a local path.
"""

import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..data.labels import class_names_of, has_class_names
from ..models.pixel_space import PixelNormalization
from .cache import hash_model


PACKAGES = ("hf_rft", "torch", "transformers", "timm", "datasets")

# How `datasets` records the files of a dataset from the Hub.
_HUB_FILE = re.compile(r"hf://datasets/(?P<name>[^@]+)@(?P<revision>[^/]+)/")


def versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


def describe_model(model: torch.nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "")
    names = class_names_of(config) if has_class_names(config) else {}
    return {
        "name": (Path(name).name if os.path.isdir(name) else name) or type(model).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "num_classes": getattr(config, "num_labels", None) or getattr(model, "num_classes", None),
        "class_names": {str(number): name for number, name in names.items()},  # as JSON will have it
        "sha256": hash_model(model),
    }


def describe_normalization(normalization: PixelNormalization) -> dict[str, Any]:
    return {"mean": list(normalization.mean), "std": list(normalization.std), "source": normalization.source}


def describe_dataset(dataset: Any) -> dict[str, Any]:
    """Name, revision, configuration, split and fingerprint, as far as the dataset knows them."""
    info = getattr(dataset, "info", None)
    split = getattr(dataset, "split", None)
    files = map(_HUB_FILE.match, getattr(info, "download_checksums", None) or ())
    on_hub = next(filter(None, files), None)
    name = getattr(info, "dataset_name", None)
    if name == getattr(info, "builder_name", None):  # "imagefolder": the kind of files, not a name
        name = None
    return {
        "name": on_hub["name"] if on_hub else name,
        "revision": on_hub["revision"] if on_hub else None,
        "config": getattr(info, "config_name", None),
        "split": None if split is None else str(split),
        "fingerprint": getattr(dataset, "_fingerprint", None),
    }
