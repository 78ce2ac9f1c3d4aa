"""One model and its examples under any set of attacks, and under corruptions: batches, cache, progress, processes."""

import itertools
import math
import sys
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..attacks.base import Forward, Passes
from ..data.examples import Examples
from ..models.classifier import CountedForward, PixelClassifier, check_labels
from ..models.folding import exactly_foldable_pairs, folded, folded_weights
from .cache import Record, ResultCache, group_key, hash_examples, hash_levels
from .corruptions import KINDS, PACKAGE, SEVERITIES, corrupt
from .estimate import CostEstimate
from .evaluator import Evaluator
from .flags import drawn_examples, trust_flags
from .margins import logit_margins
from .provenance import versions
from .report import AdversarialExamples, RobustnessReport


# Number of adversarial examples in the report, and kept per group.
SHOWN_EXAMPLES = 8


# Batches attacked together: examples drop out, and the batches of the long attacks stay full nevertheless. Groups of
# batches are what processes share and the cache holds, so there are at least so many of them if there can be.
LARGEST_GROUP, FEWEST_GROUPS = 8, 32


def groups_of_batches(count: int, batch_size: int) -> list[range]:
    """The positions of all examples, in groups of whole batches."""
    batches = math.ceil(count / batch_size)
    size = batch_size * min(max(batches // FEWEST_GROUPS, 1), LARGEST_GROUP)
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


class CleanGroup(NamedTuple):
    """What is known about a group of batches before it is attacked."""

    positions: range  # in the dataset
    hashes: list[str]  # one per image and its label, for the cache
    level_hashes: list[str]  # the same of the images in bytes, for the report
    logits: torch.Tensor  # (examples, classes), on the CPU
    num_right: int


@torch.no_grad()
def look_at(
    classifier: PixelClassifier, examples: Examples, positions: range, shape: torch.Size, batch_size: int
) -> CleanGroup:
    """Check the images and labels of a group, and classify it.

    Raises:
        ValueError: naming the examples, if an image does not have this shape or a label is not one of the model's.
    """
    pixels, labels = classifier.load(examples, positions)
    if pixels.shape[1:] != shape:
        raise ValueError(
            f"`dataset`: the images {positions[0]} to {positions[-1]} have the shape {tuple(pixels.shape[1:])}, the "
            f"first one has {tuple(shape)}; resize them to one size, that of the model."
        )
    logits = _logits(classifier, pixels, batch_size)
    check_labels(f"`dataset` (examples {positions[0]} to {positions[-1]})", labels, logits.shape[1])
    num_right = int((logits.argmax(dim=1) == labels).sum())
    hashes = hash_examples(pixels, labels), hash_levels(pixels, labels)
    return CleanGroup(positions, *hashes, logits.cpu(), num_right)


def _logits(classifier: PixelClassifier, pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
    return torch.cat([classifier.forward_in(None)(part) for part in pixels.split(batch_size)])


def gathered(results: dict[int, Any]) -> list[Any]:
    """The values of all processes, in the order of their keys, positions in the dataset."""
    return [value for _, value in sorted(gather_object([*results.items()]), key=lambda item: item[0])]


class Subject(NamedTuple):
    """A model and its examples.

    Args:
        classifier ([`PixelClassifier`]):
            In evaluation mode.
        examples ([`Examples`]):
            All of them.
        clean (`list[CleanGroup]`):
            The groups of this process.
        cache ([`ResultCache`]):
            Of finished groups.
        was_training (`bool`):
            Whether the model was passed in training mode.
        provenance (`dict`):
            The arguments of [`Evaluator.settings`].
        show_progress (`bool`):
            On standard error.
    """

    classifier: PixelClassifier
    examples: Examples
    clean: list[CleanGroup]
    cache: ResultCache
    was_training: bool
    provenance: dict[str, Any]
    show_progress: bool

    def attack(self, evaluator: Evaluator) -> RobustnessReport:
        """The report of all processes' examples."""
        dtype = evaluator.autocast_dtype
        described = evaluator.describe()
        described |= {"autocast_dtype": None if dtype is None else str(dtype).removeprefix("torch.")}
        crafting, evaluated, records = _crafting(self.classifier, dtype), self._evaluated(described), {}
        with self._progress(evaluator.norm) as bar:
            # Written, not logged: like the bar, it is for whoever waits.
            estimate = CostEstimate(evaluator, lambda text: bar.disable or bar.write(text, file=sys.stderr))
            num_right = sum(group.num_right for group in self.clean)
            for group in self.clean:
                estimate.left(images=bar.total - bar.n, num_right=num_right)
                record = _attack_group(self, crafting, group, evaluator, evaluated, bar, estimate)
                num_right -= group.num_right
                records[group.positions[0]] = record
        records = gathered(records)
        merged = {name: torch.cat([record[name] for record in records]) for name in records[0] if name != "passes"}
        checked: list[Any] = [None, None]
        if PartialState().is_main_process:
            checked = [*_check_trust(self, merged, evaluator)]
        flags, for_checks = broadcast_object_list(checked)
        forward, backward = torch.stack([record["passes"] for record in records]).sum(dim=0).tolist()
        return RobustnessReport(
            norm=evaluator.norm,
            epsilons=evaluator.epsilons,
            labels=merged["labels"].numpy(),
            clean_predictions=merged["clean_predictions"].numpy(),
            adversarial_predictions=merged["adversarial_predictions"].numpy(),
            broken_at=merged["broken_at"].numpy(),
            distances=merged["distances"].double().numpy(),
            margins=merged["margins"].double().numpy(),
            flags=flags,
            passes=Passes(forward + for_checks.forward, backward + for_checks.backward),
            settings=described | evaluator.settings(**self.provenance),
            examples=_shown_examples(self.classifier, self.examples, merged),
        )

    @torch.no_grad()
    def count_right_corrupted(self, seed: int) -> dict[str, list[int]]:
        """By kind of corruption, the number of all processes' examples classified correctly at each severity."""
        kinds = [kind for group in KINDS.values() for kind in group]
        used = {**versions(), PACKAGE: version(PACKAGE)}
        evaluated = self._evaluated({"corruptions": kinds, "seed": seed, "versions": used})
        totals = torch.zeros(len(kinds), len(SEVERITIES), dtype=torch.long)
        with self._progress("corruptions", len(kinds) * len(SEVERITIES)) as bar:
            for group in self.clean:
                key = group_key(evaluated, group.positions, group.hashes)
                record = self.cache.load(key, group.logits)
                if record is None:
                    pixels, labels = self.classifier.load(self.examples, group.positions)
                    right = torch.zeros_like(totals)
                    for (row, kind), severity in itertools.product(enumerate(kinds), SEVERITIES):
                        corrupted = corrupt(pixels, kind, severity, seed=seed, positions=group.positions)
                        logits = _logits(self.classifier, corrupted, self.provenance["batch_size"])
                        right[row, severity - 1] = (logits.argmax(dim=1) == labels).sum()
                        bar.update(len(group.positions))
                    record = {"right": right}
                    self.cache.save(key, record, group.logits)
                totals += record["right"]
        totals = torch.stack(gather_object([totals])).sum(dim=0)
        return dict(zip(kinds, totals.tolist(), strict=True))

    def _evaluated(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What a result depends on besides the examples."""
        normalization = self.classifier.normalization
        statistics = [normalization.mean, normalization.std]
        return {"model": self.provenance["model"]["sha256"], "normalization": statistics, **settings}

    def _progress(self, description: str, times: int = 1) -> tqdm:
        total = times * sum(len(group.positions) for group in self.clean)
        return tqdm(total=total, unit=" examples", desc=description, disable=not self.show_progress)


def _crafting(classifier: PixelClassifier, dtype: torch.dtype | None) -> Forward | None:
    """A faster function on which to run the attacks: in another precision, with BatchNorm folded; None: there is none.

    Folding rounds differently, so that what is found counts only if it fools the model itself.
    """
    model = classifier.model
    weights = folded_weights(exactly_foldable_pairs(model)) if isinstance(model, PreTrainedModel) else {}
    if dtype is None and not weights:
        return None
    forward = classifier.forward_in(dtype)

    def crafting(pixels: torch.Tensor) -> torch.Tensor:
        with folded(weights):
            return forward(pixels)

    return crafting


def _attack_group(
    subject: Subject,
    crafting: Forward | None,
    group: CleanGroup,
    evaluator: Evaluator,
    evaluated: dict[str, Any],
    bar: tqdm,
    estimate: CostEstimate,
) -> Record:
    """The record of a group, from the cache or newly computed."""
    classifier, positions, done_before = subject.classifier, group.positions, bar.n
    key = group_key(evaluated, positions, group.hashes)

    def show(attack: str, decided: int) -> None:
        bar.set_postfix_str(attack, refresh=False)
        bar.update(done_before + decided - bar.n)

    record = subject.cache.load(key, group.logits)
    if record is None:
        pixels, labels = classifier.load(subject.examples, positions)
        exact = classifier.forward_in(None)
        attacked = estimate.watched(crafting or exact)
        found, passes = evaluator.attack(
            exact if crafting else attacked,
            pixels,
            labels,
            positions,
            group.logits.argmax(dim=1).to(labels.device),
            crafting=attacked if crafting else None,
            batch_size=subject.provenance["batch_size"],
            on_progress=show,
        )
        estimate.make()
        is_shown = (found.broken_at > 0) & (found.broken_at < len(evaluator.epsilons))
        shown = is_shown.nonzero().flatten()[:SHOWN_EXAMPLES]
        record = found._asdict()
        record["shown_positions"] = shown + positions[0]
        record["shown_adversarial"] = record.pop("adversarial")[shown]
        record["passes"] = torch.tensor(passes)
        record = {name: tensor.cpu() for name, tensor in record.items()}
        subject.cache.save(key, record, group.logits)
    show("", len(positions))
    return record | {"margins": logit_margins(group.logits)}


def _check_trust(subject: Subject, merged: Record, evaluator: Evaluator) -> tuple[dict[str, str], Passes]:
    """Run the trust checks on examples that the model classifies correctly; also return their cost."""
    classifier = subject.classifier
    positions = drawn_examples(merged["broken_at"] > 0, evaluator.seed)
    pixels, labels = classifier.load(subject.examples, positions or [0])
    counted = CountedForward(classifier.forward_in(None))
    flags = trust_flags(
        counted,
        pixels[: len(positions)],
        labels[: len(positions)],
        norm=evaluator.norm,
        epsilons=evaluator.epsilons,
        tier=evaluator.tier.name,
        broken_at=merged["broken_at"][positions].to(classifier.device),
        seed=evaluator.seed,
        was_training=subject.was_training,
    )
    return flags, counted.passes


@torch.no_grad()
def _shown_examples(classifier: PixelClassifier, examples: Examples, merged: Record) -> AdversarialExamples | None:
    positions = merged["shown_positions"][:SHOWN_EXAMPLES].tolist()
    if not positions:
        return None
    pixels, _ = classifier.load(examples, positions)
    adversarial = merged["shown_adversarial"][:SHOWN_EXAMPLES].to(classifier.device)
    exact = classifier.forward_in(None)
    logits, adversarial_logits = exact(pixels), exact(adversarial)
    names = getattr(getattr(classifier.model, "config", None), "id2label", None) or {}
    return AdversarialExamples(
        positions, pixels.cpu(), adversarial.cpu(), logits.float().cpu(), adversarial_logits.float().cpu(), names
    )
