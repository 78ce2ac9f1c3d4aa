"""Models from elsewhere: their files may hold weights and settings, but not make this machine run or fetch anything.

`trust_remote_code=False` keeps Python files of a repository from being run. Beside that, weights that are pickles run
code when they are opened, and a config.json can name further repositories and files; both are refused here.
"""

import json
import os
from pathlib import Path

from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME


# How transformers' own code computes attention; any other name is that of a repository with compiled code.
_ATTENTION = {"eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"}
# What `timm.create_model` reads files with, or asks servers.
_TIMM_SOURCES = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


def load_config(
    name_or_path: str | os.PathLike, *, trust_remote_code: bool = False, **hub_options
) -> PreTrainedConfig:
    """The configuration of a model, refused if it would fetch code or weights from elsewhere.

    Args:
        name_or_path (`str`):
            Repository on the Hub, or a local folder.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Let the model run code of its own, and the configuration name other places.
        hub_options:
            As in [`~transformers.PreTrainedConfig.from_pretrained`].

    Raises:
        ValueError: naming the file, its entry, and the remedy.
    """
    if os.path.isdir(name_or_path):
        check_weight_index(name_or_path)
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **hub_options)
    if not trust_remote_code:
        _check_config(config, str(name_or_path))
    return config


def load_classifier(
    name_or_path: str | os.PathLike, config: PreTrainedConfig, *, trust_remote_code: bool = False, **options
):
    """The image classifier with this configuration; from safetensors files only, for other weights are pickles.

    Args:
        options:
            As in [`~transformers.PreTrainedModel.from_pretrained`], whose result is returned.

    Raises:
        ValueError: if there are no such files.
    """
    # transformers would have a Space convert other weights, and sends it the user's token for that.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")
    options = {"config": config, "use_safetensors": True, "trust_remote_code": trust_remote_code, **options}
    try:
        return AutoModelForImageClassification.from_pretrained(name_or_path, **options)
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise ValueError(
            f"{name_or_path} holds no weights in the safetensors format. Others (pytorch_model.bin) are pickles, "
            "which can run code and are not opened; if you trust its author, load it with transformers once, and use "
            "the folder that `save_pretrained` writes."
        ) from error


def check_weight_index(folder: str | os.PathLike) -> None:
    """Refuse a folder whose weights lie elsewhere.

    Raises:
        ValueError: naming the file and its entry.
    """
    if Path(folder, ADAPTER_CONFIG_NAME).exists():
        raise ValueError(
            f"{folder} holds an {ADAPTER_CONFIG_NAME}, so its weights are those of another model with changes; merge "
            "them (`merge_and_unload` in peft) and save the result."
        )
    index = Path(folder, SAFE_WEIGHTS_INDEX_NAME)
    if not index.exists():
        return
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        outside = sorted(name for name in files if not _is_weight_file(name))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({type(error).__name__}: {error}); save the model again.") from error
    if outside:
        raise ValueError(f"{index} names weights that are no safetensors files of its folder, {outside}; not read.")


def _is_weight_file(name: str) -> bool:
    """Whether the name is that of a safetensors file in the same folder, on any system."""
    return name.endswith(".safetensors") and not set(name) & set("/\\\0:")


def _check_config(config: PreTrainedConfig, name: str) -> None:
    remedy = "Remove the entry from config.json, or pass `trust_remote_code=True` if you trust its author."
    attention = getattr(config, "_attn_implementation", None)
    if attention is not None and attention not in _ATTENTION:
        raise ValueError(
            f"The configuration of {name} takes its attention from {attention!r}, code of another repository. {remedy}"
        )
    weights = getattr(config, "transformers_weights", None)
    if weights is not None and not _is_weight_file(str(weights)):
        raise ValueError(f"The configuration of {name} takes weights from another place, {weights!r}. {remedy}")
    if config.model_type != "timm_wrapper":
        return
    if ":" in config.architecture:
        raise ValueError(
            f"The configuration of {name} takes its architecture from another place, {config.architecture!r}. {remedy}"
        )
    if named := sorted(_TIMM_SOURCES & set(config.model_args or {})):
        raise ValueError(f"The configuration of {name} takes weights from another place, by {named}. {remedy}")
