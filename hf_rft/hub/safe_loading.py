"""Loading models of unknown origin without running their code or fetching anything else.

`trust_remote_code=False` keeps a repository's Python files from being run. But pickled weights run code when they are
loaded, and a config.json can refer to other repositories and files. Both are refused here. An adapter (of peft) names
the model whose weights it changes; that one is fetched, and loaded by the same rules.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, find_adapter_config_file

from ..data import bundled
from ..utils.values import naming
from .download import download, is_on_hub


# transformers' own implementations of attention; any other name is a repository with compiled code.
_ATTENTION = {"eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"}
# Kinds of adapters that consist of their weights alone; others fetch further models or compile code.
_ADAPTERS = {"IA3", "LORA"}
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
    name_or_path: str | os.PathLike,
    config: PreTrainedConfig,
    *,
    auto_class: Any = AutoModelForImageClassification,
    trust_remote_code: bool = False,
    **options,
) -> Any:
    """The result of `from_pretrained` of an auto class, from safetensors files only.

    For an adapter it is a `peft.PeftModel` on its base model, whose classes are those of `config`.

    Raises:
        ValueError: if there are none.
    """
    if is_adapter(name_or_path, **only_hub_options(options)):
        return _load_adapted(name_or_path, config, **options)
    # transformers would have a Space convert other weights, and send it the user's token.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")
    options = {"config": config, "use_safetensors": True, "trust_remote_code": trust_remote_code, **options}
    try:
        return auto_class.from_pretrained(name_or_path, **options)
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise ValueError(
            f"{name_or_path} has no weights in the safetensors format. Others (pytorch_model.bin) are pickles, which "
            "can run code and are not loaded; if you trust the author, load the model with transformers and use the "
            "folder that `save_pretrained` writes."
        ) from error


def is_adapter(name_or_path: str | os.PathLike, **hub_options) -> bool:
    """Whether the weights in a folder or repository are changes to those of another model.

    Raises:
        ValueError: if a folder holds those of a whole model as well.
    """
    found = find_adapter_config_file(str(name_or_path), **hub_options) is not None
    if found and Path(name_or_path, SAFE_WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{name_or_path} holds both a whole model ({SAFE_WEIGHTS_NAME}) and an adapter ({ADAPTER_CONFIG_NAME}); "
            "move one of them to another folder."
        )
    return found


def base_of(folder: str | os.PathLike) -> tuple[str, str | None]:
    """The name of an adapter's base model, and its revision.

    Raises:
        ValueError: if the adapter does not name one, or is of a kind that is not loaded.
    """
    path = Path(folder, ADAPTER_CONFIG_NAME)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        name, revision, kind = (config.get(key) for key in ("base_model_name_or_path", "revision", "peft_type"))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); save the adapter again.") from error
    if kind not in _ADAPTERS:
        raise ValueError(
            f"{path} is about an adapter of the kind {kind!r}; only {sorted(_ADAPTERS)} are loaded. Merge it into its "
            "base model (`merge_and_unload` in peft), and save the result."
        )
    if not isinstance(name, str) or not name:
        raise ValueError(f"{path} has no `base_model_name_or_path`; write there which model the adapter changes.")
    return name, revision


def can_be_fetched(base_model: str | None) -> bool:
    """Whether others can load this base model too: it is bundled, or its name is that of a repository."""
    return base_model == bundled.MODEL or (base_model is not None and is_on_hub(base_model))


def download_base(folder: str | os.PathLike, **hub_options) -> Path:
    """The folder of an adapter's base model; `hub_options` are `token` and `cache_dir`.

    Raises:
        ValueError: if it cannot be had.
    """
    name, revision = base_of(folder)
    try:
        return download(bundled.resolve(name), revision=revision, **hub_options)
    except (ValueError, OSError) as error:  # OSError: of the Hub
        raise ValueError(f"The base model {name!r} of the adapter {folder} cannot be loaded: {error}") from error


def _load_adapted(
    name_or_path: str | os.PathLike, config: PreTrainedConfig, *, output_loading_info: bool = False, **options
) -> Any:
    try:
        from peft import PeftModel, get_peft_model_state_dict  # an optional dependency
    except ImportError as error:
        raise ImportError(f'{name_or_path} is an adapter, which needs peft: `pip install "hf_rft[peft]"`.') from error
    hub_options = only_hub_options(options)
    folder = Path(name_or_path) if os.path.isdir(name_or_path) else download(name_or_path, **hub_options)
    hub_options.pop("revision", None)  # not that of the base model
    weights = folder / ADAPTER_SAFE_WEIGHTS_NAME
    if not weights.is_file():
        raise ValueError(f"{name_or_path} has no {weights.name}; weights in pickles are not loaded.")
    base_folder = download_base(folder, **hub_options)
    if is_adapter(base_folder):
        raise ValueError(f"The base model {base_folder} of {name_or_path} is an adapter itself; merge it first.")
    check_weight_index(base_folder)
    options = {**options, "revision": None, "ignore_mismatched_sizes": True, "output_loading_info": True}
    base, found = load_classifier(base_folder, config, **options)
    names = {str(key) for key in found["missing_keys"]} | {str(key[0]) for key in found["mismatched_keys"]}
    random = {parameter: name for name, parameter in base.named_parameters() if name in names}
    with naming("The adapter", str(name_or_path), "save it again, with its head (`modules_to_save`)"):
        model = PeftModel.from_pretrained(base, str(folder))
    with safe_open(weights, framework="pt") as file:
        differing = get_peft_model_state_dict(model).keys() ^ set(file.keys())
    used = (parameter for name, parameter in model.named_parameters() if ".original_module." not in name)
    if lost := sorted([*differing, *(random[parameter] for parameter in used if parameter in random)]):
        raise ValueError(
            f"{weights.name} of {name_or_path} does not fit its configuration and its base model, so that the weights "
            f"{lost[:5]} would be random or left out; save the adapter again, with its head (`modules_to_save`)."
        )
    model.config._name_or_path = str(name_or_path)  # not that of the base model
    return (model, {"missing_keys": set(), "mismatched_keys": set()}) if output_loading_info else model


def only_hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that every download takes."""
    return {name: options[name] for name in ("revision", "token", "cache_dir") if name in options}


def check_weight_index(folder: str | os.PathLike) -> None:
    """Refuse a folder whose weights are elsewhere.

    Raises:
        ValueError: naming the file and its entry.
    """
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
