"""`evaluate_robustness`: from a classifier and a dataset to the whole curve of accuracy over epsilon."""

import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..attacks import ATTACKS
from ..attacks.base import Forward, Passes
from ..data.examples import Examples, num_image_channels
from ..data.labels import check_class_order, class_numbers
from ..models.classifier import CountedForward, PixelClassifier, check_labels
from ..models.folding import exactly_foldable_pairs, folded, folded_weights
from ..models.pixel_space import PixelNormalization
from ..threat_model import parse_epsilons
from ..utils.files import check_writable
from ..utils.values import COUNT, SEED
from .cache import Record, ResultCache, batch_key, hash_examples, hash_json, hash_levels
from .estimate import CostEstimate
from .evaluator import Evaluator
from .flags import drawn_examples, trust_flags
from .provenance import describe_model
from .report import AdversarialExamples, RobustnessReport
from .tiers import make_tier


# Number of adversarial examples in the report, and kept per batch.
SHOWN_EXAMPLES = 8


def evaluate_robustness(
    model: torch.nn.Module,
    dataset: Any,
    processor: Any,
    *,
    norm: str,
    epsilons: Sequence[str | float | Fraction],
    tier: str | Sequence = "standard",
    batch_size: int = 64,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    autocast_dtype: torch.dtype | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    progress_bar: bool = True,
) -> RobustnessReport:
    """Measure the accuracy of an image classifier under attack, over a grid of perturbation strengths.

    Under `accelerate launch` or `torchrun`, the batches are distributed over the processes, and each of them returns
    the same report as a single process would. The model is measured in evaluation mode, and on a CPU with convolutions
    in channels_last, which is faster; its modes and memory format are restored.

    Args:
        model (`torch.nn.Module`):
            A transformers image classifier, or any module that maps `pixel_values` to logits (such as a timm model),
            on the device to run on.
        dataset:
            A `datasets.Dataset`, or any dataset with `__len__` and `__getitem__`. Each example holds a label, and an
            image or `pixel_values` from the processor. A stream (`datasets.IterableDataset`) is read once, into a
            temporary folder: take as many examples as you need, `stream.take(1000)`.
        processor:
            The model's image processor; perturbations are measured on the pixels it produces, scaled to [0, 1]. For a
            module that has none, a [`PixelNormalization`] or its `(mean, std)`: then images are normalised but not
            resized, and have as many channels as `mean` or `std` has values.
        norm (`str`):
            A name in `NORMS`.
        epsilons (`Sequence` of `str`, number or `Fraction`):
            The grid, increasing and starting at 0, for example `["0", "2/255", "4/255"]`.
        tier (`str` or `Sequence`, *optional*, defaults to `"standard"`):
            `"fast"` (APGD on cross-entropy, from five starts in L1), `"standard"` (adds targeted APGD) or `"full"`
            (adds FMN and Square); or a list of `(attack, steps)` or `(attack, steps, restarts)`. An example counts as
            robust if these attacks fail, which does not prove that it is. The named tiers also search outwards from
            each clean image, since an attack may fail in a large ball and succeed in a smaller one (search.py); a list
            runs exactly its attacks.
        batch_size (`int`, *optional*, defaults to 64):
            Images per pass through the model, and per file of the cache.
        seed (`int`, *optional*, defaults to 0):
            Determines the attacks' random starts, together with an example's position in the dataset.
        cache_dir (`str` or `Path`, *optional*):
            Folder for the results of finished batches, from which an interrupted evaluation resumes. Several
            evaluations may share it.
        autocast_dtype (`torch.dtype`, *optional*):
            Craft adversarial examples in this precision, for example `torch.bfloat16`; they count only if they fool
            the model in its own precision.
        image_column, label_column (`str`, *optional*):
            Default to the usual names: `image` or `img`, `labels` or `label`.
        progress_bar (`bool`, *optional*, defaults to `True`):
            Show the number of examples decided and the time left, and first, if it may take more than a minute, how
            long.

    Raises:
        ValueError: naming the argument, the problem and the remedy, before any attack runs.

    Example, for a timm model:

    ```python
    config = timm.data.resolve_model_data_config(model)  # of `model = timm.create_model(...).eval()`
    prepare = timm.data.create_transform(**config)
    images = dataset.with_transform(
        lambda batch: {
            "pixel_values": [prepare(image.convert("RGB")) for image in batch["image"]],
            "label": batch["label"],
        }
    )
    report = evaluate_robustness(
        model, images, (config["mean"], config["std"]), norm="linf", epsilons=["0", "2/255", "4/255"]
    )
    ```
    """
    evaluator = Evaluator(norm, parse_epsilons(norm, epsilons), make_tier(tier, norm), seed, autocast_dtype)
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"`model` must be a torch module, got {type(model).__name__}.")
    for name, value, allowed in (("batch_size", batch_size, COUNT), ("seed", seed, SEED)):
        if value not in allowed:
            raise ValueError(f"`{name}={value!r}` must be {allowed}.")
    if autocast_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"`autocast_dtype={autocast_dtype!r}` must be torch.bfloat16, torch.float16 or None.")
    if cache_dir is not None:
        check_writable("cache_dir", cache_dir)
    if cache_dir is not None and any(run.attack not in ATTACKS.values() for run in evaluator.tier.attacks):
        raise ValueError(
            "`cache_dir` cannot distinguish attacks of your own by their code; leave it out, or use the attacks "
            f"{list(ATTACKS)}."
        )
    config = getattr(model, "config", None)
    if isinstance(processor, tuple | list) and len(processor) == 2:
        processor = PixelNormalization(*processor)
    if isinstance(processor, PixelNormalization):
        normalization, num_channels = processor, max(len(processor.mean), len(processor.std))
    else:
        normalization = PixelNormalization.from_processor(processor, argument="processor")
        num_channels = num_image_channels(config)
    columns = {"image_column": image_column, "label_column": label_column}
    examples = Examples(dataset, processor, num_channels=num_channels, **columns)
    features = (isinstance(dataset, datasets.Dataset | datasets.IterableDataset) and dataset.features) or {}
    if (class_names := getattr(features.get(examples.label_column), "names", None)) is not None:
        check_class_order("`dataset`", class_names, config)
        class_numbers("`dataset`", class_names, config)
    classifier = PixelClassifier(model, normalization)
    described_model = describe_model(model)
    dtype = None if autocast_dtype is None else str(autocast_dtype).removeprefix("torch.")
    asked = {**evaluator.describe(), "autocast_dtype": dtype}
    evaluated = {"model": described_model["sha256"], "normalization": [normalization.mean, normalization.std], **asked}
    # Without `cpu`, accelerate ignores the launcher's processes on a machine without an accelerator.
    state = PartialState(cpu=not torch.accelerator.is_available())
    was_training = any(module.training for module in model.modules())

    first_image, _ = classifier.load(examples, [0])
    shape = first_image.shape[1:]
    with classifier.under_attack(), classifier.in_fast_format(first_image):
        batches = [
            range(first, min(first + batch_size, len(examples))) for first in range(0, len(examples), batch_size)
        ]
        mine = batches[state.process_index :: state.num_processes]
        # Check all images and labels before the first attack: hours later is too late for an error.
        clean = [_look_at(classifier, examples, positions, shape) for positions in mine]
        crafting = _crafting(classifier, evaluator.autocast_dtype)
        cache, results = ResultCache(cache_dir), []
        total = sum(len(positions) for positions in mine)
        with tqdm(total=total, unit=" examples", disable=not (progress_bar and state.is_main_process)) as bar:
            # Written, not logged: like the bar, it is for whoever waits.
            estimate = CostEstimate(evaluator, lambda text: bar.disable or bar.write(text, file=sys.stderr))
            num_right = sum(batch.num_right for batch in clean)
            for batch in clean:
                estimate.left(images=total - bar.n, num_right=num_right)
                record = _evaluate_batch(
                    classifier, crafting, examples, batch, evaluator, evaluated, cache, bar, estimate
                )
                num_right -= batch.num_right
                results.append((batch.positions[0], record, batch.level_hashes))
        results = sorted(gather_object(results), key=lambda result: result[0])
        records = [record for _, record, _ in results]
        merged = {name: torch.cat([record[name] for record in records]) for name in records[0] if name != "passes"}
        checked: list[Any] = [None, None]
        if state.is_main_process:
            checked = [*_check_trust(classifier, examples, merged, evaluator, was_training)]
        flags, for_checks = broadcast_object_list(checked)
        shown = _shown_examples(classifier, examples, merged)
    forward, backward = torch.stack([record["passes"] for record in records]).sum(dim=0).tolist()
    settings = asked | evaluator.settings(
        model=described_model,
        dataset=dataset,
        normalization=normalization,
        batch_size=batch_size,
        sha256=hash_json([hashes for *_, of_batch in results for hashes in of_batch]),
        image_shape=list(shape),
    )
    settings["dataset"] |= {"image_column": image_column, "label_column": label_column}
    return RobustnessReport(
        norm=norm,
        epsilons=evaluator.epsilons,
        labels=merged["labels"].numpy(),
        clean_predictions=merged["clean_predictions"].numpy(),
        adversarial_predictions=merged["adversarial_predictions"].numpy(),
        broken_at=merged["broken_at"].numpy(),
        distances=merged["distances"].double().numpy(),
        flags=flags,
        passes=Passes(forward + for_checks.forward, backward + for_checks.backward),
        settings=settings,
        examples=shown,
    )


class _CleanBatch(NamedTuple):
    """What is known about a batch before it is attacked."""

    positions: range  # in the dataset
    hashes: list[str]  # one per image and its label, for the cache
    level_hashes: list[str]  # the same of the images in bytes, for the report
    logits: torch.Tensor  # (batch, classes), on the CPU
    num_right: int


@torch.no_grad()
def _look_at(classifier: PixelClassifier, examples: Examples, positions: range, shape: torch.Size) -> _CleanBatch:
    pixels, labels = classifier.load(examples, positions)
    if pixels.shape[1:] != shape:
        raise ValueError(
            f"`dataset`: the images {positions[0]} to {positions[-1]} have the shape {tuple(pixels.shape[1:])}, the "
            f"first one has {tuple(shape)}; resize them to one size, that of the model."
        )
    logits = classifier.forward_in(None)(pixels)
    check_labels(f"`dataset` (examples {positions[0]} to {positions[-1]})", labels, logits.shape[1])
    num_right = int((logits.argmax(dim=1) == labels).sum())
    hashes = hash_examples(pixels, labels), hash_levels(pixels, labels)
    return _CleanBatch(positions, *hashes, logits.cpu(), num_right)


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


def _evaluate_batch(
    classifier: PixelClassifier,
    crafting: Forward | None,
    examples: Examples,
    batch: _CleanBatch,
    evaluator: Evaluator,
    evaluated: dict[str, Any],
    cache: ResultCache,
    bar: tqdm,
    estimate: CostEstimate,
) -> Record:
    """The record of a batch, from the cache or newly computed."""
    positions, done_before = batch.positions, bar.n
    key = batch_key(evaluated, positions, batch.hashes)

    def show(attack: str, decided: int) -> None:
        bar.set_postfix_str(attack, refresh=False)
        bar.update(done_before + decided - bar.n)

    record = cache.load(key, batch.logits)
    if record is None:
        pixels, labels = classifier.load(examples, positions)
        exact = classifier.forward_in(None)
        attacked = estimate.watched(crafting or exact)
        found, passes = evaluator.attack(
            exact if crafting else attacked,
            pixels,
            labels,
            positions,
            batch.logits.argmax(dim=1).to(labels.device),
            crafting=attacked if crafting else None,
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
        cache.save(key, record, batch.logits)
    show("", len(positions))
    return record


def _check_trust(
    classifier: PixelClassifier, examples: Examples, merged: Record, evaluator: Evaluator, was_training: bool
) -> tuple[dict[str, str], Passes]:
    """Run the trust checks on examples that the model classifies correctly; also return their cost."""
    positions = drawn_examples(merged["broken_at"] > 0, evaluator.seed)
    pixels, labels = classifier.load(examples, positions or [0])
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
        was_training=was_training,
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
