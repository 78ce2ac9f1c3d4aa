"""Values of the arguments that `transformers` takes as they come, to fail hours later or to train something else.

`TrainingArguments` is told a learning rate of NaN, 0 examples a batch or "no" for a switch, and stores them.
"""

import dataclasses
import enum
import functools
import json
import os
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Union, cast

import torch
from accelerate.utils import DynamoBackend
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from .ranges import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, POSITIVE, SECONDS, SEED, SHARE, YEAR, Range, check_ranges


# More worker processes than a machine can start are a typing error.
WORKERS = Range(0, 4096, is_whole=True)

TRAINING_RANGES: Mapping[str, Range] = {
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "num_train_epochs": POSITIVE,
    "learning_rate": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "label_smoothing_factor": SHARE,
    "neftune_noise_alpha": NOT_NEGATIVE,
    "logging_steps": NOT_NEGATIVE,
    "eval_steps": NOT_NEGATIVE,
    "eval_delay": NOT_NEGATIVE,
    "save_steps": POSITIVE,
    "save_total_limit": COUNT_OR_NONE,
    "eval_accumulation_steps": COUNT,
    "torch_empty_cache_steps": COUNT,
    "seed": SEED,
    "data_seed": SEED,
    "dataloader_num_workers": WORKERS,
    "dataloader_prefetch_factor": COUNT,
    "ddp_bucket_cap_mb": POSITIVE,  # torch takes parts of a MB as well
    "ddp_timeout": Range(1, YEAR, is_whole=True),
    "hub_timeout": SECONDS,
    "attack_step_size": POSITIVE._replace(hint="; it is relative to epsilon"),
    "attack_steps": COUNT._replace(hint="; for training without an attack set `robust_loss='standard'`"),
    "eval_attack_steps": COUNT,
    "robust_loss_weight": NOT_NEGATIVE,
}

# Of the dictionaries, those that may also be the path of a JSON file, and those that may not.
_A_PATH = ("accelerator_config", "fsdp_config")
_NEVER_A_PATH = (
    "lr_scheduler_kwargs",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs",
    "epsilon_schedule_kwargs",
)


def check_values(arguments: TrainingArguments) -> None:
    """Refuse numbers out of range, switches that are neither true nor false, unknown names, and text that is no JSON.

    To be called before the parent's `__post_init__`, whose errors do not name the argument.

    Raises:
        ValueError: naming argument, value and remedy.
    """
    if not isinstance(arguments.max_steps, int) or isinstance(arguments.max_steps, bool):
        raise ValueError(f"`max_steps={arguments.max_steps!r}` must be a whole number.")
    if arguments.max_steps != -1 and arguments.max_steps not in COUNT:
        raise ValueError(
            f"`max_steps={arguments.max_steps}` must be {COUNT}; leave it out, or give -1, to train for "
            "`num_train_epochs`."
        )
    check_ranges(arguments, TRAINING_RANGES)
    for name, hint in _hints(type(arguments)).items():
        value = getattr(arguments, name)
        if hint is bool and not isinstance(value, bool):
            raise ValueError(f"`{name}={value!r}` must be True or False.")
        if value is not None and (choices := _enum_of(hint)) is not None:
            try:
                choices(value)
            except ValueError:
                valid = [choice.value for choice in choices]
                raise ValueError(f"`{name}={value!r}` is unknown; choose one of {valid}.") from None
    _check_report_to(arguments.report_to)
    backend, backends = arguments.torch_compile_backend, [one.value.lower() for one in DynamoBackend]
    if backend is not None and str(backend).lower() not in backends:
        raise ValueError(f"`torch_compile_backend={backend!r}` is unknown; choose one of {backends}.")
    if arguments.optim_args is not None and not re.fullmatch(r"[^=,]+=[^=,]+(,[^=,]+=[^=,]+)*", arguments.optim_args):
        raise ValueError(f"`optim_args={arguments.optim_args!r}` must be written like 'betas=0.9,eps=1e-8'.")
    for name in arguments._VALID_DICT_FIELDS:
        _check_dictionary(name, getattr(arguments, name))


def check_scheduler(arguments: TrainingArguments) -> None:
    """Build the learning rate schedule once, for nothing: a wrong one would end the training at its first step.

    To be called after the parent's `__post_init__`, which reads the dictionary.

    Raises:
        ValueError: naming the arguments.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    kwargs = cast(dict[str, Any], arguments.lr_scheduler_kwargs or {})
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=dict(kwargs),
        )
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"`lr_scheduler_type={SchedulerType(arguments.lr_scheduler_type).value!r}` does not work with "
            f"`lr_scheduler_kwargs={kwargs}`: {error}."
        ) from error


def _check_report_to(value: Any) -> None:
    for name in value if isinstance(value, list) else [value]:
        if name in (None, "none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"`report_to={name!r}` is unknown; choose among none, all, {', '.join(INTEGRATION_TO_CALLBACK)}."
            )
        if name not in get_available_reporting_integrations():
            raise ValueError(f"`report_to={name!r}` is not installed; install it, or leave it out.")


def _check_dictionary(name: str, value: Any) -> None:
    if not isinstance(value, str):
        return
    if value.startswith("{"):
        try:
            json.loads(value)
        except ValueError as error:
            raise ValueError(f"`{name}={value!r}` is not a JSON object ({error}).") from error
    elif name in _A_PATH and not os.path.isfile(value):
        raise ValueError(f"`{name}={value!r}` is neither a JSON object nor a file that holds one.")
    elif name in _NEVER_A_PATH:
        raise ValueError(
            f"`{name}={value!r}` is not a JSON object; write '{{\"name\": value}}', with the names in double quotes."
        )


@functools.cache
def _hints(arguments_type: type) -> dict[str, Any]:
    hints = typing.get_type_hints(arguments_type)
    return {field.name: hints[field.name] for field in dataclasses.fields(arguments_type) if field.init}


def _enum_of(hint: Any) -> type[enum.Enum] | None:
    """The enumeration that an annotation such as `IntervalStrategy | str` names, if any."""
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    for one in typing.get_args(hint) if is_union else (hint,):
        if isinstance(one, type) and issubclass(one, enum.Enum):
            return one
    return None
