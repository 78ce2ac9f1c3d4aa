"""Mixup (Zhang et al. 2018, https://huggingface.co/papers/1710.09412) and CutMix (Yun et al. 2019,
https://huggingface.co/papers/1905.04899): training images that are mixtures of two, with labels to match.

The attack then increases the loss of the mixed label, within the ball around the mixed image.
"""

import torch
from torchvision.transforms import v2

from ..utils.noise import MIXING, mix_seed


def mixed(
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    num_classes: int,
    key: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each image with its neighbour in the batch.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`):
            Images, normalised or not: mixing is linear.
        labels (`torch.Tensor` of shape `(batch,)`):
            True classes.
        mixup_alpha, cutmix_alpha (`float`):
            The share of an image is drawn from Beta(alpha, alpha), once a batch; 0 switches a method off. If both are
            on, each batch is mixed by one of them, at random.
        num_classes (`int`):
            Number of classes.
        key (`tuple` of non-negative `int`):
            Seed of the random numbers; the global generator is untouched.

    Returns:
        `tuple`: the images, and the labels as probabilities of shape `(batch, classes)`.
    """
    methods = [(v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha)]
    transforms = [method(alpha=alpha, num_classes=num_classes) for method, alpha in methods if alpha > 0]
    with torch.random.fork_rng(devices=[]):  # the shares are drawn on the CPU
        torch.manual_seed(mix_seed(MIXING, *key))
        return v2.RandomChoice(transforms)(pixel_values, labels)
