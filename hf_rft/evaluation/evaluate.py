"""`evaluate_robustness`: from a classifier and a dataset to the whole curve of accuracy over epsilon."""

import itertools
from collections.abc import Sequence
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState

from ..attacks import ATTACKS
from ..data.examples import Examples, num_image_channels
from ..data.labels import check_class_order, class_numbers
from ..models.classifier import PixelClassifier
from ..models.pixel_space import PixelNormalization
from ..threat_model import parse_epsilons
from ..utils.files import check_writable
from ..utils.values import COUNT, SEED
from .cache import ResultCache, hash_json
from .corruptions import PACKAGE, check_installed
from .evaluator import Evaluator
from .profile import comparable_evaluators
from .provenance import describe_model
from .report import Profile, RobustnessReport
from .subject import Subject, gathered, groups_of_batches, look_at
from .tiers import make_tier


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
    profile: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    progress_bar: bool = True,
) -> RobustnessReport:
    """Measure the accuracy of an image classifier under attack, over a grid of perturbation strengths.

    Under `accelerate launch` or `torchrun`, groups of batches are distributed over the processes, and each of them
    returns the same report as a single process would. The model is measured in evaluation mode, and on a CPU with
    convolutions in channels_last, which is faster; its modes and memory format are restored.

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
            `"fast"` (APGD on cross-entropy, from five starts in L1), `"lean"` (adds targeted APGD towards the three
            nearest classes), `"standard"` (towards the nine most likely ones) or `"full"` (adds FMN and Square); or a
            list of `(attack, steps)` or `(attack, steps, restarts)`. An example counts as robust if these attacks
            fail, which does not prove that it is. The named tiers also search outwards from each clean image, since an
            attack may fail in a large ball and succeed in a smaller one (search.py); a list runs exactly its attacks.
        batch_size (`int`, *optional*, defaults to 64):
            Images per pass through the model. Of many images, several batches are attacked together, so that batches
            stay full, and share a file of the cache; eight batches at most, whose images are on the device together.
        seed (`int`, *optional*, defaults to 0):
            Determines the attacks' random starts, together with an example's position in the dataset.
        cache_dir (`str` or `Path`, *optional*):
            Folder for the results of finished groups of batches, from which an interrupted evaluation resumes. Several
            evaluations may share it.
        autocast_dtype (`torch.dtype`, *optional*):
            Craft adversarial examples in this precision, for example `torch.bfloat16`; they count only if they fool
            the model in its own precision.
        profile (`bool`, *optional*, defaults to `False`):
            Also measure what the model was not necessarily trained for, as `report.profile`: the other norms, at
            comparable radii (profile.py), and common corruptions (corruptions.py; package `hf_rft[corruptions]`). All
            norms together take 3 (tier `full`) to 6 times (`fast`) the passes of L-inf alone, and corrupting an image
            of 224 pixels some seconds of a CPU core.
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
    if profile:
        check_installed()
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
    # Without `cpu`, accelerate ignores the launcher's processes on a machine without an accelerator.
    state = PartialState(cpu=not torch.accelerator.is_available())
    was_training = any(module.training for module in model.modules())

    first_image, _ = classifier.load(examples, [0])
    shape = first_image.shape[1:]
    if profile and shape[0] not in (1, 3):
        raise ValueError(f"`profile=True` needs images with 1 or 3 channels, to corrupt them; these have {shape[0]}.")
    others = comparable_evaluators(evaluator, shape) if profile else []
    with classifier.under_attack(), classifier.in_fast_format(first_image):
        mine = groups_of_batches(len(examples), batch_size)[state.process_index :: state.num_processes]
        # Check all images and labels before the first attack: hours later is too late for an error.
        clean = [look_at(classifier, examples, positions, shape, batch_size) for positions in mine]
        provenance = {
            "model": describe_model(model),
            "dataset": dataset,
            "normalization": normalization,
            "batch_size": batch_size,
            "sha256": hash_json(
                [*itertools.chain(*gathered({group.positions[0]: group.level_hashes for group in clean}))]
            ),
            "image_shape": list(shape),
        }
        show_progress = progress_bar and state.is_main_process
        subject = Subject(classifier, examples, clean, ResultCache(cache_dir), was_training, provenance, show_progress)
        report = subject.attack(evaluator)
        if profile:
            norms = {other.norm: subject.attack(other) for other in others}
            report.profile = Profile(norms, subject.count_right_corrupted(seed))
            report.settings["versions"][PACKAGE] = version(PACKAGE)
    for each in [report, *(report.profile.norms.values() if report.profile else ())]:
        each.settings["dataset"] |= {"image_column": image_column, "label_column": label_column}
    return report
