"""Checks before training: the model, the datasets, the loss, the attack and the kind of parallelism."""

import inspect
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers.utils import logging

from ..attacks.base import takes
from ..data.augmentation import SeededAugmentation
from ..data.labels import LABEL_COLUMNS, check_class_order
from ..hub.safe_loading import can_be_fetched
from ..losses import LOSSES, RobustLoss
from ..models.adapters import is_adapted
from ..models.classifier import check_labels
from ..models.parts import depths, head_parameters


logger = logging.get_logger(__name__)


def check_setup(trainer: Any) -> None:
    """Refuse a model, processor or parallelism with which robust training would be wrong.

    Raises:
        ValueError: naming the argument, what was found, and the remedy.
    """
    if trainer.processing_class is None:
        raise ValueError(
            "`processing_class` is None; pass the model's image processor, "
            "`AutoImageProcessor.from_pretrained(...)`, which says how pixels are normalised."
        )
    config = getattr(trainer.model, "config", None)
    num_labels, problem_type = getattr(config, "num_labels", None), getattr(config, "problem_type", None)
    if num_labels is None or num_labels < 2 or problem_type not in (None, "single_label_classification"):
        raise ValueError(
            "`model` must be an image classifier with a `config` of at least 2 classes, one of which is right; got "
            f"{type(trainer.model).__name__} with num_labels={num_labels} and problem_type={problem_type!r}. Load a "
            "timm model by `AutoModelForImageClassification`, and wrap a module of your own: "
            "`hf_rft.ModuleForImageClassification(module, class_names=[...])`."
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
    for name in ("head_learning_rate", "head_warmup_steps"):
        if (value := getattr(trainer.args, name)) and not head_parameters(trainer.model):
            raise ValueError(
                f"`{name}={value}` needs a model that tells its classification head from the rest, which "
                f"{type(trainer.model).__name__} does not; leave it out."
            )
    _check_adapter(trainer.model, trainer.args)
    for name in ("head_learning_rate", "layer_decay"):
        if trainer.optimizer is not None and (value := getattr(trainer.args, name)) is not None:
            raise ValueError(
                f"`{name}={value}` has no effect on an optimizer of your own (`optimizers`); leave it out."
            )
    if trainer.args.layer_decay is not None:
        depths(trainer.model)
    check_parallelism(trainer)
    for name in ("train_dataset", "eval_dataset"):
        check_dataset(name, getattr(trainer, name), num_labels)


def _check_adapter(model: Any, args: Any) -> None:
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "`model` has adapters of `add_adapter`, which are saved without the head; call "
            "`peft.get_peft_model(model, config)` instead, with the head in `modules_to_save`."
        )
    if not is_adapted(model):
        return
    if model.active_adapters != ["default"]:
        raise ValueError(
            f"`model` has the active adapters {model.active_adapters}, which peft saves in folders of their own; "
            "leave `adapter_name` of `get_peft_model` out."
        )
    config = model.peft_config["default"]
    if args.push_to_hub and not can_be_fetched(config.base_model_name_or_path):
        raise ValueError(
            f"`push_to_hub=True` would publish an adapter of the base model {config.base_model_name_or_path!r}, which "
            "is not on the Hub; start from one that is, or push the merged model afterwards "
            "(`load_robust_model(..., merge=True)`)."
        )
    if not any(parameter.requires_grad for parameter in head_parameters(model)) and not config.modules_to_save:
        logger.warning(
            "The classification head of `model` is frozen, and not saved with its adapter. Name it in "
            "`modules_to_save` of the adapter's configuration, unless the base model was trained on these classes."
        )
    has_statistics = any(getattr(module, "running_mean", None) is not None for module in model.modules())
    if has_statistics and not args.freeze_batch_norm:
        raise ValueError(
            "`freeze_batch_norm=False` changes BatchNorm's running statistics, which are not saved with an adapter; "
            "leave it True."
        )


def check_loss(robust_loss: RobustLoss, args: Any, attack: Callable | None) -> None:
    """Refuse a loss with another signature, a weight the loss does not have, and an attack it cannot use."""
    for name, function in (("robust_loss", robust_loss.function), ("attack", attack)):
        if function is not None and not callable(function):
            raise ValueError(
                f"`{name}={function!r}` is not a function; pass one, or name a built-in one with "
                f"`RobustTrainingArguments({name}=...)`."
            )
    _check_loss_signature(robust_loss.function)
    weight = args.robust_loss_weight
    if weight is not None and robust_loss in LOSSES.values() and robust_loss.weight is None:
        raise ValueError(
            f"`robust_loss_weight={weight}` has no effect on `robust_loss={args.robust_loss!r}`; leave it out, or "
            "choose 'trades' or 'mart'."
        )
    if robust_loss.attack_objective == "kl" and attack is not None and not takes(attack, "objective"):
        raise ValueError(
            f"`attack={attack!r}` takes no `objective`, but this `robust_loss` chooses what the attack increases; add "
            "an `objective` argument: a function of logits and labels."
        )


def _check_loss_signature(function: Callable) -> None:
    """Refuse a loss that cannot be called as in training; accept one whose signature cannot be read."""
    try:
        inspect.signature(function).bind(None, None, None, weight=None, label_smoothing=0.0)
    except TypeError as error:
        raise ValueError(
            f"`robust_loss={function!r}` must take `(clean_logits, adversarial_logits, labels, *, weight, "
            f"label_smoothing)`, but its signature is {inspect.signature(function)}: {error}. Add `**_` for arguments "
            "it does not use."
        ) from error
    except ValueError:  # some callables written in C have no signature
        pass


def check_dataset(name: str, dataset: Any, num_labels: int) -> None:
    """Refuse an empty dataset and, if the dataset allows to check, labels the model has no class for.

    Args:
        name (`str`):
            Name of the argument, for the message.
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
            if dtype.startswith(("int", "uint")):  # a transform must convert other types
                check_labels(f"`{name}`", np.asarray(dataset.with_format("numpy")[column][:]), num_labels)


def check_parallelism(trainer: Any) -> None:
    """Refuse kinds of parallelism that would deadlock, or train or evaluate differently from one process.

    DDP, FSDP2 and DeepSpeed ZeRO-1 and -2 are supported.

    Raises:
        ValueError: naming the setting, why it is not supported, and the remedy.
    """
    args, state = trainer.args, trainer.accelerator.state
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (DataParallel) are not supported; start one process per GPU "
            "with `accelerate launch` or `hf-rft train --num_processes`, or set CUDA_VISIBLE_DEVICES to one."
        )
    if args.world_size > 1 and not args.accelerator_config.even_batches:
        raise ValueError(
            "`even_batches=False` lets some processes run out of batches while the others wait for their gradients; "
            "leave it True: the examples that pad the last batch are not counted."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    sizes = {name: getattr(parallelism, name, None) or 1 for name in ("tp_size", "cp_size", "sp_size")}
    divided = {name: size for name, size in sizes.items() if size > 1}
    if divided or getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            f"Processes that share one batch ({divided or 'a model that was split when it was loaded'}) are not "
            "supported: loss and noise assume that each process has its own examples. Use data parallelism only: DDP, "
            "FSDP2 or DeepSpeed ZeRO-2."
        )
    if trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
        raise ValueError(
            "DeepSpeed `zero_stage: 3` is not supported: all processes must gather the weights together in each pass, "
            "but an attack may take more passes on one process than on another. Set `zero_stage: 2`, or use FSDP2 "
            "(`hf-rft train --accelerate_config fsdp`)."
        )
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    for name in ("weight_averaging", "awp_gamma", "head_warmup_steps"):
        if is_sharded and (value := getattr(args, name)):
            raise ValueError(
                f"`{name}={value!r}` needs whole weights on each process, which FSDP and DeepSpeed divide; leave it "
                "out, or use DDP (`hf-rft train --accelerate_config multi_gpu`)."
            )
    if trainer.is_fsdp_enabled:
        _check_fsdp(trainer, state.fsdp_plugin)
    if (
        args.world_size > 1
        and isinstance(trainer.train_dataset, torch.utils.data.IterableDataset)
        and args.accelerator_config.dispatch_batches is False
    ):
        logger.warning(
            "With `dispatch_batches=False` each process reads its own part of the iterable `train_dataset`. If the "
            "parts have different lengths, some examples are repeated and count twice; leave `dispatch_batches` out "
            "to train as one process would."
        )


def _check_fsdp(trainer: Any, plugin: Any) -> None:
    problem = None
    if is_adapted(trainer.model):
        problem = "adapters (peft) are untested with sharded weights; use DDP"
    elif plugin.fsdp_version != 2:
        problem = f"`fsdp_version: {plugin.fsdp_version}` flattens the weights; set it to 2"
    elif "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        problem = (
            f"`fsdp_state_dict_type: {plugin.state_dict_type}` saves no model that `from_pretrained` can load; set "
            "it to FULL_STATE_DICT"
        )
    elif plugin.cpu_ram_efficient_loading:
        problem = "`fsdp_cpu_ram_efficient_loading: true` starts processes without weights; set it to false"
    elif isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        problem = "`fsdp_offload_params: true` would move all weights back for each attack; set it to false"
    elif trainer.args.torch_compile:
        problem = "`torch_compile=True` is untested with sharded weights; set it to False"
    else:
        try:  # accelerate calls this method, which some models lack
            trainer.model.get_input_embeddings()
        except NotImplementedError:
            problem = (
                f"accelerate cannot shard a {type(trainer.model).__name__}, which has no `get_input_embeddings`; use "
                "DDP (`hf-rft train --accelerate_config multi_gpu`)"
            )
    if problem is not None:
        raise ValueError(f"FSDP: {problem}.")
