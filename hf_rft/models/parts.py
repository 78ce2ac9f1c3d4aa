"""The parts of a classifier: its head, and the depth of everything else."""

from typing import Any

from torch import nn


def head_parameters(model: Any) -> set[nn.Parameter]:
    """The parameters of the classification head; empty for a model that does not tell them apart."""
    if hasattr(model, "get_base_model"):  # of peft
        model = model.get_base_model()
    if hasattr(model, "timm_model"):
        return set(model.timm_model.get_classifier().parameters())
    return set(model.parameters()) - set(getattr(model, "base_model", model).parameters())


def depths(model: Any) -> dict[nn.Parameter, int]:
    """How deep each parameter lies: 0 before the first layer, one more for each layer, and one more after the last.

    Layers are the groups that timm defines or, for a transformers model, the largest stack of equal modules.

    Raises:
        ValueError: if the model has no such stack.
    """
    if hasattr(model, "timm_model"):
        from timm.models import group_parameters  # slow to import, and needed by its own models only

        by_name: Any = group_parameters(model.timm_model, model.timm_model.group_matcher(coarse=False), reverse=True)
        return {parameter: by_name[name] for name, parameter in model.timm_model.named_parameters()}
    stacks = [module for module in model.modules() if _is_stack(module)]
    if not stacks:
        raise ValueError(
            f"`layer_decay` needs a model of equal layers, which a {type(model).__name__} does not have; leave it out."
        )
    stack = max(stacks, key=lambda stack: sum(parameter.numel() for parameter in stack.parameters()))
    in_layer = {parameter: depth for depth, layer in enumerate(stack, start=1) for parameter in layer.parameters()}
    found, depth_outside = {}, 0
    for parameter in model.parameters():  # in the order of definition, which is that of computation
        if parameter in in_layer:
            depth_outside = len(stack) + 1
        found[parameter] = in_layer.get(parameter, depth_outside)
    return found


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
        return False
    return len({type(layer) for layer in module}) == 1 and all(
        any(True for _ in layer.parameters()) for layer in module
    )
