"""Random numbers that depend only on the example, never on torch's global generator.

The noise of an attack is a function of the seed, the optimizer step and the example's position in the global batch, so
gradient accumulation, the number of processes and resuming cannot change it. Hence one generator per example.
"""

from collections.abc import Sequence

import numpy as np
import torch


Generators = torch.Generator | Sequence[torch.Generator] | None

# The first number of each key: noise for different purposes must not share seeds.
TRAINING_ATTACK, EVALUATION_ATTACK, AUGMENTATION, PROBE, MIXING, CORRUPTION = 1, 2, 3, 4, 5, 6


def mix_seed(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several non-negative numbers, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def default_generator(device: torch.device | str) -> torch.Generator:
    """The fallback generator. Its seed is fixed, since the global generator belongs to the training loop."""
    return torch.Generator(device=device).manual_seed(0)


def example_generators(device: torch.device | str, positions: Sequence[int], *key: int) -> list[torch.Generator]:
    """One generator per position, seeded with `(*key, position)`."""
    return [torch.Generator(device=device).manual_seed(mix_seed(*key, position)) for position in positions]


def rand(images: torch.Tensor, generator: Generators = None) -> torch.Tensor:
    """Uniform numbers in [0, 1) with the shape, dtype and device of `images`."""
    return _draw(torch.rand, images, generator)


def randn(images: torch.Tensor, generator: Generators = None) -> torch.Tensor:
    """Standard normal numbers with the shape, dtype and device of `images`."""
    return _draw(torch.randn, images, generator)


def check_generators(generator: Generators, count: int) -> None:
    """Refuse a list of generators whose length is not `count`, the number of images."""
    if generator is not None and not isinstance(generator, torch.Generator) and len(generator) != count:
        raise ValueError(f"`generator` holds {len(generator)} generators for a batch of {count} images.")


def _draw(sample, images: torch.Tensor, generator: Generators) -> torch.Tensor:
    options = {"dtype": images.dtype, "device": images.device}
    if generator is None:
        generator = default_generator(images.device)
    if isinstance(generator, torch.Generator):
        return sample(images.shape, generator=generator, **options)
    check_generators(generator, len(images))
    if len(generator) == 0:
        return torch.empty_like(images)
    return torch.stack([sample(images.shape[1:], generator=one, **options) for one in generator])
