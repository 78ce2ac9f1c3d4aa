"""Mixup (Zhang et al. 2018, https://huggingface.co/papers/1710.09412) and CutMix (Yun et al. 2019,
https://huggingface.co/papers/1905.04899): training images that are mixtures of two, with labels to match.

The attack then increases the loss of the mixed label, within the ball around the mixed image.
"""

from typing import Any

import torch
from torchvision.transforms import v2

from ..utils.noise import MIXING, mix_seed


def mixed(
    pixel_values: torch.Tensor, labels: torch.Tensor, args: Any, num_classes: int, key: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each image with its neighbour in the batch, as `mixup_alpha` and `cutmix_alpha` of the arguments say.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`):
            Images, normalised or not: mixing is linear.
        labels (`torch.Tensor` of shape `(batch,)`):
            True classes.
        num_classes (`int`):
            Number of classes.
        key (`tuple` of non-negative `int`):
            Seed of the random numbers; the global generator is untouched.

    Returns:
        `tuple`: the images, and the labels as probabilities of shape `(batch, classes)`; unchanged if both are 0.
    """
    methods = [(v2.MixUp, args.mixup_alpha), (v2.CutMix, args.cutmix_alpha)]
    transforms = [method(alpha=alpha, num_classes=num_classes) for method, alpha in methods if alpha > 0]
    if not transforms:
        return pixel_values, labels
    if not pixel_values.is_floating_point():  # from a processor that leaves bytes
        pixel_values = pixel_values.float()
    with torch.random.fork_rng(devices=[]):  # the shares are drawn on the CPU
        torch.manual_seed(mix_seed(MIXING, *key))
        return v2.RandomChoice(transforms)(pixel_values, labels)
