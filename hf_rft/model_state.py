"""Context managers that change a model for a while and give every module and parameter back exactly as it was."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put all modules into training or evaluation mode."""
    changed = [module for module in model.modules() if module.training != training]
    for module in changed:
        module.training = training
    try:
        yield
    finally:
        for module in changed:
            module.training = not training


@contextlib.contextmanager
def parameters_frozen(model: nn.Module) -> Iterator[None]:
    """Switch parameter gradients off: an attack differentiates with respect to the images only."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def in_memory_format(model: nn.Module, memory_format: torch.memory_format) -> Iterator[None]:
    """Keep the weights of 2D convolutions in this memory format; afterwards they are the very tensors they were."""
    kept = [(parameter, parameter.data) for parameter in model.parameters() if parameter.dim() == 4]
    for parameter, data in kept:
        parameter.data = data.to(memory_format=memory_format)
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


@contextlib.contextmanager
def batch_norm_frozen(model: nn.Module) -> Iterator[None]:
    """Keep modules with running statistics in evaluation mode.

    Adversarial examples are crafted against running statistics. Learning from them with batch statistics, another
    function of the same weights, undoes the training (design note in the README, "Why BatchNorm is frozen").
    """
    frozen = [
        module for module in model.modules() if module.training and getattr(module, "running_mean", None) is not None
    ]
    for module in frozen:
        module.training = False
    try:
        yield
    finally:
        for module in frozen:
            module.training = True


@contextlib.contextmanager
def under_attack(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Everything an attack on `model` needs: input gradients but no parameter gradients, one mode for all modules.

    Neither the model nor the global random number generators have changed afterwards: in training mode, where dropout
    draws from them, they are set back, and modules with running statistics stay in evaluation mode all the same.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(parameters_frozen(model))
        stack.enter_context(in_mode(model, training=training))
        if training:
            devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
            stack.enter_context(torch.random.fork_rng(devices=list(devices)))
            stack.enter_context(batch_norm_frozen(model))
        yield
