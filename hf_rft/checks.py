"""Checks of what a user hands over, before anything is computed from it."""

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer
from transformers.utils import logging

from .attacks.base import takes
from .augmentation import SeededAugmentation
from .losses import LOSSES, RobustLoss
from .training_args import RobustTrainingArguments


logger = logging.get_logger(__name__)

LABEL_COLUMNS = ("labels", "label")


def check_setup(trainer: Trainer) -> None:
    """Refuse a model, processor or parallelism with which robust training would be wrong.

    Raises:
        ValueError: naming the argument, what was found, and the remedy.
    """
    if trainer.processing_class is None:
        raise ValueError(
            "`processing_class` is None; pass the model's image processor, "
            "`AutoImageProcessor.from_pretrained(...)`: perturbations are measured in its pixels."
        )
    config = getattr(trainer.model, "config", None)
    num_labels, problem_type = getattr(config, "num_labels", None), getattr(config, "problem_type", None)
    if num_labels is None or num_labels < 2 or problem_type not in (None, "single_label_classification"):
        raise ValueError(
            "`model` must be an image classifier with a `config` of at least 2 classes, one of which is right; got "
            f"{type(trainer.model).__name__} with num_labels={num_labels} and problem_type={problem_type!r}."
        )
    for name in ("train_dataset", "eval_dataset"):
        dataset = getattr(trainer, name)
        for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
            part = part.dataset if isinstance(part, SeededAugmentation) else part
            if isinstance(part, datasets.Dataset):
                for column in LABEL_COLUMNS:
                    class_names = getattr(part.features.get(column), "names", None)
                    check_class_order(f"`{name}`", class_names, config)
    if trainer.compute_loss_func is not None:
        raise ValueError("`compute_loss_func` would replace the robust loss; pass `robust_loss` instead.")
    check_parallelism(trainer)


def check_parallelism(trainer: Any) -> None:
    """Refuse what would train or measure something else than one process does, or wait for ever.

    DDP, FSDP2 and DeepSpeed ZeRO-1 and -2 remain.

    Raises:
        ValueError: naming the setting, why it cannot be supported, and the remedy.
    """
    args, state = trainer.args, trainer.accelerator.state
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (DataParallel) are not supported; start one process a GPU "
            "with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one."
        )
    if args.world_size > 1 and not args.accelerator_config.even_batches:
        raise ValueError(
            "`even_batches=False` lets some processes run out of batches while the others wait for their gradients; "
            "leave it True: the examples that complete the last batch count for nothing."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    sizes = {name: getattr(parallelism, name, None) or 1 for name in ("tp_size", "cp_size", "sp_size")}
    divided = {name: size for name, size in sizes.items() if size > 1}
    if divided or getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            f"Several processes that share one batch ({divided or 'a model divided when it was loaded'}) are not "
            "supported: loss and noise take each process to have examples of its own. Use data parallelism alone: "
            "DDP, FSDP2 or DeepSpeed ZeRO-2."
        )
    if trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
        raise ValueError(
            "DeepSpeed `zero_stage: 3` is not supported: all processes gather the weights in each pass together, but "
            "an attack may take more passes on one process than on another. Set `zero_stage: 2`, or use FSDP2 "
            "(recipes/accelerate_configs/fsdp.yaml)."
        )
    if trainer.is_fsdp_enabled:
        _check_fsdp(trainer, state.fsdp_plugin)
    if (
        args.world_size > 1
        and isinstance(trainer.train_dataset, torch.utils.data.IterableDataset)
        and args.accelerator_config.dispatch_batches is False
    ):
        logger.warning(
            "With `dispatch_batches=False` each process reads its own part of the iterable `train_dataset`. Should "
            "the parts end unevenly, examples are repeated, and nobody can tell which; leave `dispatch_batches` out "
            "to train as one process would."
        )


def _check_fsdp(trainer: Any, plugin: Any) -> None:
    problem = None
    if plugin.fsdp_version != 2:
        problem = f"`fsdp_version: {plugin.fsdp_version}` flattens weights, so that none is whole; set it to 2"
    elif "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        problem = (
            f"`fsdp_state_dict_type: {plugin.state_dict_type}` saves no model that `from_pretrained` could load; set "
            "it to FULL_STATE_DICT"
        )
    elif plugin.cpu_ram_efficient_loading:
        problem = "`fsdp_cpu_ram_efficient_loading: true` leaves processes without weights at first; set it to false"
    elif isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        problem = "`fsdp_offload_params: true` would bring all weights back for each attack anyway; set it to false"
    elif trainer.args.torch_compile:
        problem = "`torch_compile=True` has not been tried with divided weights; set it to False"
    else:
        try:  # accelerate calls this method of every model, and some have none
            trainer.model.get_input_embeddings()
        except NotImplementedError:
            problem = (
                f"accelerate cannot divide a {type(trainer.model).__name__}, which has no `get_input_embeddings`; use "
                "DDP (recipes/accelerate_configs/multi_gpu.yaml)"
            )
    if problem is not None:
        raise ValueError(f"FSDP: {problem}.")


def check_loss(robust_loss: RobustLoss, args: RobustTrainingArguments, attack: Callable | None) -> None:
    """Refuse a loss of another signature, a weight that it does not have, and an attack that cannot serve it."""
    for name, function in (("robust_loss", robust_loss.function), ("attack", attack)):
        if function is not None and not callable(function):
            raise ValueError(
                f"`{name}={function!r}` is no function; pass one, or name a built-in one with "
                f"`RobustTrainingArguments({name}=...)`."
            )
    _check_loss_signature(robust_loss.function)
    weight = args.robust_loss_weight
    if weight is not None and robust_loss in LOSSES.values() and robust_loss.weight is None:
        raise ValueError(
            f"`robust_loss_weight={weight}` has no meaning for `robust_loss={args.robust_loss!r}`; leave it out, or "
            "choose 'trades' or 'mart'."
        )
    if robust_loss.attack_objective == "kl" and attack is not None and not takes(attack, "objective"):
        raise ValueError(
            f"`attack={attack!r}` takes no `objective`, but this `robust_loss` chooses what its attack increases; add "
            "the argument `objective`, a function of logits and labels."
        )


def _check_loss_signature(function: Callable) -> None:
    """Refuse a loss that cannot be called as training will; one whose signature cannot be read is let through."""
    try:
        inspect.signature(function).bind(None, None, None, weight=None, label_smoothing=0.0)
    except TypeError as error:
        raise ValueError(
            f"`robust_loss={function!r}` must take `(clean_logits, adversarial_logits, labels, *, weight, "
            f"label_smoothing)`, which its signature {inspect.signature(function)} does not: {error}. Take what it "
            "does not use as well, or `**_`."
        ) from error
    except ValueError:  # some callables written in C have no signature
        pass


def check_dataset(name: str, dataset: Any, num_labels: int) -> None:
    """Refuse an empty dataset, and labels the model has no class for, where the dataset can tell.

    Args:
        name (`str`):
            The argument, for the message.
        dataset:
            Any dataset, a dictionary of them, or None.
        num_labels (`int`):
            Number of classes of the model.

    Raises:
        ValueError: naming the argument, what was found, and the remedy.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_dataset(f"{name}[{key!r}]", part, num_labels)
        return
    if dataset is None or not hasattr(dataset, "__len__"):
        return
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty; robust fine-tuning needs at least one example.")
    if isinstance(dataset, SeededAugmentation):
        dataset = dataset.dataset
    if isinstance(dataset, datasets.Dataset):
        for column in LABEL_COLUMNS:
            dtype = getattr(dataset.features.get(column), "dtype", "")
            if dtype.startswith(("int", "uint")):  # other columns are the transform's to turn into labels
                check_labels(f"`{name}`", np.asarray(dataset.with_format("numpy")[column][:]), num_labels)


def check_class_order(where: str, class_names: Sequence[str] | None, config: Any) -> None:
    """Refuse a model that has the same class names at other numbers; `where` begins the message.

    Args:
        class_names (`Sequence[str]`, *optional*):
            Those of the data, in the order of their numbers. None if they are not known.
        config:
            Of the model.

    Raises:
        ValueError: naming the first such class.
    """
    number_of = _numbers_of_unique_names(config)
    for number, name in enumerate(class_names or []):
        if number_of.get(name, number) != number:
            raise ValueError(
                f"{where} numbers the class {name!r} {number}, the model {number_of[name]} (`config.id2label`); bring "
                "the labels into the model's order (recipes/evaluate_robustness.py does), or, if the numbers are "
                f"right and the names are not, {NUMBERS_ARE_RIGHT}."
            )


NUMBERS_ARE_RIGHT = "cast the label column to `datasets.Value('int64')`"


def class_numbers(
    where: str, class_names: Sequence[str], config: Any, numbers_are_right: str = NUMBERS_ARE_RIGHT
) -> list[int]:
    """The number that the model gives to each class of the data, found by name.

    A model without names of its own (`LABEL_0`, ...) is taken to number its classes as the data does. Single classes
    may be unknown to the model, or be several of its classes, as long as the others, which must be more, have the
    same numbers in both: ImageNet's second "crane" goes by different names.

    Args:
        where (`str`):
            The argument that names the data, for the message.
        class_names (`Sequence[str]`):
            Those of the data, in the order of their numbers.
        config:
            Of the model.
        numbers_are_right (`str`):
            What to do if the data's numbers are the model's and only the names differ, for the message.

    Raises:
        ValueError: if the data's classes are not the model's.
    """
    numbers, names, number_of = list(range(len(class_names))), _class_names(config), _numbers_of_unique_names(config)
    if not has_class_names(config):
        return numbers
    found = [number_of.get(name, number) for number, name in enumerate(class_names)]
    unknown = [name for name in class_names if name not in number_of]
    if not unknown or (found == numbers and 2 * len(unknown) < len(numbers)):
        return found
    several = [name for name in unknown if name in names.values()]
    problem = f"Several classes of the model have the names {several[:5]}"
    if len(several) < len(unknown):
        missing = [name for name in unknown if name not in several]
        problem = f"The model has no classes {missing[:5]}"
    raise ValueError(
        f"{problem}; its classes are {list(names.values())[:5]} and so on. Give images of its classes ({where}), "
        "rename the data's classes, or, if their numbers are the model's and only the names differ, "
        f"{numbers_are_right}."
    )


def has_class_names(config: Any) -> bool:
    """Whether a model's classes have names other than those that transformers gives them (`LABEL_0`, ...)."""
    return any(name != f"LABEL_{number}" for number, name in _class_names(config).items())


def _class_names(config: Any) -> dict[int, str]:
    """The model's name of each class, by number; empty if it has none."""
    return {int(number): str(name) for number, name in (getattr(config, "id2label", None) or {}).items()}


def _numbers_of_unique_names(config: Any) -> dict[str, int]:
    names = _class_names(config)
    counts = Counter(names.values())
    return {name: number for number, name in names.items() if counts[name] == 1}


def names_of_missing_classes(labels: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """Classes without any example."""
    counts = np.bincount(np.asarray(labels), minlength=len(class_names))
    return [name for name, count in zip(class_names, counts, strict=True) if count == 0]


def check_batch(inputs: dict[str, Any], num_labels: int) -> None:
    """Refuse a batch without images or labels, with further tensors, or with labels the model has no class for."""
    missing = [key for key in ("pixel_values", "labels") if key not in inputs]
    if missing:
        raise ValueError(
            f"A batch has no {missing}, its keys are {sorted(inputs)}; let the dataset and `data_collator` return "
            "`pixel_values` and `labels` (and keep `remove_unused_columns=False` for a transform made on the fly)."
        )
    others = [
        key
        for key, value in inputs.items()
        if isinstance(value, torch.Tensor) and key not in ("pixel_values", "labels")
    ]
    if others:
        raise ValueError(
            f"A batch holds further tensors {others}; only `pixel_values` can be attacked. Leave them out."
        )
    labels = inputs["labels"]
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"`labels` must hold one class index per image, got {labels.dtype} of shape {tuple(labels.shape)}; "
            "regression and several labels per image are not supported."
        )
    check_labels("A batch", labels, num_labels)


def check_labels(where: str, labels: Any, num_labels: int) -> None:
    """Refuse labels outside 0 ... `num_labels - 1`; `where` begins the message."""
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0:
        raise ValueError(
            f"{where} holds labels down to {lowest}; negative ones mark unlabelled examples, leave them out."
        )
    if highest >= num_labels:
        raise ValueError(
            f"{where} holds labels from {lowest} to {highest}, but the model has {num_labels} classes (0 to "
            f"{num_labels - 1}); load it with `num_labels={highest + 1}` and `ignore_mismatched_sizes=True`, or "
            "correct the labels."
        )


class NonFiniteError(ArithmeticError):
    """A loss or gradient is infinite or not a number; the weights are those of the last optimizer step."""


def check_finite(what: str, values: torch.Tensor, when: str, world_size: int = 1) -> None:
    """Refuse NaN and infinity; where `world_size` processes have values of their own, on all of them or none.

    Args:
        what (`str`):
            What `values` are, for the message.
        values (`torch.Tensor`):
            Of this process; any shape.
        when (`str`):
            Step and micro-batch.

    Raises:
        NonFiniteError: on every process if any of them found one.
    """
    bad = (~values.isfinite()).flatten()
    found = bad.any().to(torch.int32)
    if world_size > 1:
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    if not found:
        return
    positions = bad.nonzero().flatten().tolist()
    where = "on another process"
    if positions:
        values = values.detach().flatten()[bad]
        where = f"{values[0].item()}" + (f" for examples {positions} of the batch" if len(bad) > 1 else "")
    raise NonFiniteError(
        f"The {what} is not finite {when}: {where}. No optimizer step was taken from it and no checkpoint written. Go "
        "on from the last checkpoint with `resume_from_checkpoint=True`, after looking at the images, with a lower "
        "`learning_rate`, a `max_grad_norm`, or `bf16` in place of `fp16`."
    )
