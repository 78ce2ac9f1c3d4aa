"""LoRA (Hu et al. 2021, https://huggingface.co/papers/2106.09685): low-rank changes to the weights of a frozen model
are trained instead of the weights. The work is peft's, an optional dependency.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .parts import head_parameters


def is_adapted(model: Any) -> bool:
    """Whether this is a `peft.PeftModel`."""
    return hasattr(model, "get_base_model") and hasattr(model, "peft_config")


def add_lora(
    model: Any,
    *,
    r: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    base_model: str | None = None,
    revision: str | None = None,
):
    """Freeze a classifier and let it learn by adapters, except for its head, which learns as a whole.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Changed in place.
        r (`int`):
            Rank of the changes.
        alpha (`float`, *optional*):
            Changes are multiplied by `alpha / r`. Defaults to `2 * r`.
        dropout (`float`, *optional*, defaults to 0):
            Of the adapters' inputs, in [0, 1).
        target_modules (`Sequence[str]`, *optional*):
            Names of modules, or their last parts. Defaults to all linear layers and convolutions without groups
            (pointwise ones included), except for the head.
        base_model, revision (`str`, *optional*):
            What adapter_config.json shall call the base model, by default the name under which it was loaded, and the
            commit on the Hub.

    Returns:
        `peft.PeftModel`: the model with its adapters.

    Raises:
        ValueError: if there are no modules of these names, or none that peft can adapt.
    """
    from peft import LoraConfig, get_peft_model  # an optional dependency

    head = head_parameters(model)
    head_modules = {name.rpartition(".")[0] for name, parameter in model.named_parameters() if parameter in head}
    if target_modules is None:
        target_modules = [
            name
            for name, module in model.named_modules()
            if _can_be_adapted(name, module, model) and name not in head_modules
        ]
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        modules_to_save=sorted(head_modules),
        revision=revision,
    )
    adapted = get_peft_model(model, config)
    if base_model is not None:
        config.base_model_name_or_path = base_model
    return adapted


def _can_be_adapted(name: str, module: nn.Module, model: nn.Module) -> bool:
    # Some models of timm (BEiT, EVA) use the weight of this layer without calling it.
    is_called = not hasattr(model.get_submodule(name.rpartition(".")[0]), "q_bias")
    # Not subclasses: timm's Conv2dSame pads in a way that peft's copy of it does not.
    is_linear = type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)
    return is_linear and is_called


@contextlib.contextmanager
def saved_with_config(model: Any, folder: str | os.PathLike) -> Iterator[None]:
    """Around the saving of a model: if it is adapted, add the config.json that peft does not write, since the classes
    are those of the adapted model, and keep the card as it was: peft's names the base model by its path.
    """
    if not is_adapted(model):
        yield
        return
    card = Path(folder, "README.md")
    before = card.read_bytes() if card.is_file() else None
    yield
    model.get_base_model().config.save_pretrained(folder)
    card.unlink(missing_ok=True)
    if before is not None:
        card.write_bytes(before)


def describe_adapter(model: Any) -> str | None:
    """What is trained instead of the whole model, in words; None if that is the whole model."""
    if not is_adapted(model):
        return None
    config = model.peft_config[model.active_adapter]
    rank = f", rank {config.r}, alpha {config.lora_alpha:g}" if hasattr(config, "lora_alpha") else ""
    trained, total = model.get_nb_trainable_parameters()
    return (
        f"an adapter of the kind {config.peft_type.value}{rank}, with {100 * trained / total:.1f} % of all parameters"
    )


def adapter_tags(model: Any) -> list[str]:
    """The tags of a card that say what kind of adapter it is, as peft writes them."""
    return [config.peft_type.value.lower() for config in model.peft_config.values()] if is_adapted(model) else []
