"""A quick look, during training, at how a few training examples fare under a weak and a stronger attack.

A model that withstands one step but not several has overfitted to one step (*catastrophic overfitting*). One whose
input gradient is exactly zero can be neither attacked by gradients nor trained against such attacks.
"""

import contextlib
import random
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from ..attacks import fgsm, pgd
from ..attacks.base import Forward, classes_of, evaluate, has_zero_gradient, log_odds, margin
from ..data.augmentation import SeededAugmentation
from ..threat_model import ThreatModel
from ..utils.noise import PROBE, Generators, example_generators, mix_seed


PROBED_EXAMPLES = 32
MULTI_STEPS = 10
# Probes per run: one per epoch, but within these bounds, and not more often than every few steps, since a probe costs
# as much as a step or two.
LEAST_PROBES, MOST_PROBES = 10, 100
LEAST_STEPS = 5


def probe(
    forward: Forward,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    *,
    threat_model: ThreatModel,
    random_start: bool = True,
    generator: Generators = None,
) -> dict[str, torch.Tensor]:
    """Whether each example is classified correctly: clean and, at epsilon above 0, under FGSM and 10-step PGD.

    Passes per example: 1 forward and 1 backward at epsilon 0; otherwise at most 14 forward and 12 backward, less than
    training on it twice with the default 7-step attack.

    Args:
        forward (`Callable`):
            Maps pixels to logits.
        pixels (`torch.Tensor` of shape `(batch, channels, height, width)`):
            Clean images, pixels in [0, 1].
        labels (`torch.Tensor` of shape `(batch,)`):
            True classes.
        threat_model ([`ThreatModel`]):
            Norm, and the current epsilon of training.
        random_start (`bool`, *optional*, defaults to `True`):
            Whether FGSM starts from a random point. Set it as in training: models overfit to the step they train on.
        generator (`torch.Generator`, or a list of them, one per example, *optional*):
            Source of the random starts.

    Returns:
        `dict[str, torch.Tensor]`: booleans of shape `(batch,)`: `clean_accuracy`, `zero_gradient_share` and, at
        epsilon above 0, `single_step_accuracy` and `multi_step_accuracy`.
    """
    clean = evaluate(forward, pixels, labels, log_odds)
    found = {"clean_accuracy": ~clean.fooled, "zero_gradient_share": has_zero_gradient(clean.gradient)}
    if threat_model.is_trivial:
        return found
    common = {"threat_model": threat_model, "generator": generator, "early_stop": True}
    for name, adversarial in (
        ("single_step", fgsm(forward, pixels, labels, random_start=random_start, **common)),
        ("multi_step", pgd(forward, pixels, labels, steps=MULTI_STEPS, **common)),
    ):
        found[f"{name}_accuracy"] = ~evaluate(forward, adversarial, labels, margin, gradient=False).fooled
    return found


class Probe:
    """[`probe`] of a few of a trainer's training examples, at its current epsilon."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._batches: list[dict[str, Any]] | None = None

    def __call__(self) -> dict[str, float]:
        """Shares named `probe_...`, equal on all processes; empty for a dataset without random access."""
        trainer, found, first = self._trainer, defaultdict(list), 0
        if self._batches is None:
            examples = probe_examples(trainer.train_dataset, trainer.args.seed)
            collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="probe")
            size = trainer._train_batch_size
            self._batches = [collate(examples[start : start + size]) for start in range(0, len(examples), size)]
        if not self._batches:
            return {}
        threat_model, _ = trainer.adversary.strength(trainer.share_of_epsilon)
        for batch in self._batches:
            inputs = trainer._prepare_inputs(dict(batch))
            pixels = trainer.classifier.normalization.to_pixels(inputs.pop("pixel_values"))
            labels = classes_of(inputs.pop("labels"))
            positions = range(first, first + len(labels))
            first += len(labels)
            with trainer.adversary.under_attack():
                of_batch = probe(
                    partial(trainer.classifier, **inputs),
                    pixels,
                    labels,
                    threat_model=threat_model,
                    random_start=trainer.args.attack_random_start,
                    generator=example_generators(pixels.device, positions, PROBE, trainer.args.seed),
                )
            for name, values in of_batch.items():
                found[name].append(values)
        # Rounding may differ between devices; the mean over processes does not.
        shares = torch.stack([torch.cat(values).double().mean() for values in found.values()]).float()
        shares = trainer.accelerator.reduce(shares, "mean").tolist()
        named = {f"probe_{name}": share for name, share in zip(found, shares, strict=True)}
        return {"probe_epsilon": float(threat_model.epsilon), **named}


def probe_interval(max_steps: int, num_epochs: float) -> int:
    """Optimizer steps from one probe to the next: an epoch, but for 10 to 100 probes per run, and at least 5 steps."""
    number = min(max(num_epochs, LEAST_PROBES), MOST_PROBES)
    return max(LEAST_STEPS, round(max_steps / number))


def probe_examples(dataset: Any, seed: int) -> list[Any]:
    """A few random examples of a training dataset: the same ones on every process, and after resuming.

    Random transforms draw from the global generators, which are seeded for them and restored afterwards; a
    [`SeededAugmentation`] is that of its first epoch.

    Returns:
        `list`: at most 32 examples; none if the dataset has no random access.
    """
    is_stream = isinstance(dataset, torch.utils.data.IterableDataset)
    if is_stream or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return []
    if isinstance(dataset, SeededAugmentation):
        dataset = SeededAugmentation(dataset.dataset, dataset.transform, dataset.seed)
    count = min(PROBED_EXAMPLES, len(dataset))
    # Not evenly spaced: datasets are often sorted, or cycle through their classes.
    indices = np.random.default_rng(mix_seed(PROBE, seed)).choice(len(dataset), count, replace=False)
    with _global_generators_seeded(seed):
        return [dataset[index] for index in sorted(indices.tolist())]


@contextlib.contextmanager
def _global_generators_seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generators of Python, numpy and torch for the block, and restore them afterwards."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
