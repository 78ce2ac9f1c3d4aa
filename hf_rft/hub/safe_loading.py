"""Loading models of unknown origin without running their code or fetching anything else.

`trust_remote_code=False` keeps a repository's Python files from being run. But pickled weights run code when they are
loaded, and a config.json can refer to other repositories and files. Both are refused here.
"""

import json
import os
from pathlib import Path

from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME


# transformers' own implementations of attention; any other name is a repository with compiled code.
_ATTENTION = {"eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"}
# Arguments of `timm.create_model` that make it read files or send requests.
_TIMM_SOURCES = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


def load_config(
    name_or_path: str | os.PathLike, *, trust_remote_code: bool = False, **hub_options
) -> PreTrainedConfig:
    """The configuration of a model; refused if it would fetch code or weights from elsewhere.

    Args:
        name_or_path (`str`):
            Repository on the Hub, or local folder.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Allow custom code, and references to other places.
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
    """The result of `AutoModelForImageClassification.from_pretrained`, from safetensors files only.

    Raises:
        ValueError: if there are none.
    """
    # transformers would have a Space convert other weights, and send it the user's token.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")
    options = {"config": config, "use_safetensors": True, "trust_remote_code": trust_remote_code, **options}
    try:
        return AutoModelForImageClassification.from_pretrained(name_or_path, **options)
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise ValueError(
            f"{name_or_path} has no weights in the safetensors format. Others (pytorch_model.bin) are pickles, which "
            "can run code and are not loaded; if you trust the author, load the model with transformers and use the "
            "folder that `save_pretrained` writes."
        ) from error


def check_weight_index(folder: str | os.PathLike) -> None:
    """Refuse a folder whose weights are elsewhere.

    Raises:
        ValueError: naming the file and its entry.
    """
    if Path(folder, ADAPTER_CONFIG_NAME).exists():
        raise ValueError(
            f"{folder} has an {ADAPTER_CONFIG_NAME}, so its weights only modify another model's; merge them "
            "(`merge_and_unload` in peft) and save the result."
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
        raise ValueError(f"{index} names weights that are not safetensors files in its folder: {outside}; not loaded.")


def _is_weight_file(name: str) -> bool:
    """Whether this is the name of a safetensors file in the same folder, on any operating system."""
    return name.endswith(".safetensors") and not set(name) & set("/\\\0:")


def _check_config(config: PreTrainedConfig, name: str) -> None:
    attention = getattr(config, "_attn_implementation", None)
    weights = getattr(config, "transformers_weights", None)
    is_timm, problem = config.model_type == "timm_wrapper", None
    if attention is not None and attention not in _ATTENTION:
        problem = f"its attention from {attention!r}, code of another repository"
    elif weights is not None and not _is_weight_file(str(weights)):
        problem = f"weights from another place, {weights!r}"
    elif is_timm and ":" in config.architecture:
        problem = f"its architecture from another place, {config.architecture!r}"
    elif is_timm and (named := sorted(_TIMM_SOURCES & set(config.model_args or {}))):
        problem = f"weights from another place, by {named}"
    if problem is not None:
        raise ValueError(
            f"The configuration of {name} takes {problem}. Remove the entry from config.json, or pass "
            "`trust_remote_code=True` if you trust its author."
        )
