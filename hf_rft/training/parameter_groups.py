"""Learning rates of parts of a model: of the head, and of layers by their depth."""

from collections import defaultdict

from torch import nn
from torch.optim import Optimizer

from ..models.parts import depths, head_parameters


def set_learning_rates(
    optimizer: Optimizer, model: nn.Module, head_learning_rate: float | None, layer_decay: float | None
) -> None:
    """Divide the groups of an optimizer so that each part has its learning rate.

    Args:
        head_learning_rate (`float`, *optional*):
            Learning rate of the classification head. None: that of the deepest layer.
        layer_decay (`float`, *optional*):
            Learning rate of a layer relative to that of the next deeper one (Clark et al. 2020, ELECTRA; Bao et al.
            2022, BEiT). None: 1.
    """
    depth = depths(model) if layer_decay is not None else {}
    deepest, head = max(depth.values(), default=0), head_parameters(model) if head_learning_rate is not None else set()
    for group in list(optimizer.param_groups):
        by_rate = defaultdict(list)
        for parameter in group["params"]:
            rate = group["lr"] if layer_decay is None else group["lr"] * layer_decay ** (deepest - depth[parameter])
            by_rate[head_learning_rate if parameter in head else rate].append(parameter)
        if not by_rate:
            continue
        (group["lr"], group["params"]), *others = by_rate.items()
        for rate, parameters in others:
            optimizer.add_param_group({**group, "params": parameters, "lr": rate})
