"""Checks of [`RobustTrainingArguments`], beyond the ranges of single numbers.

They refuse names that are not in a table, what has no effect, what is not defined, and what would silently train or
measure something else.
"""

import dataclasses
import os
from typing import Any

from transformers import TrainingArguments

from ..attacks import SINGLE_STEP
from ..losses import LOSSES
from ..threat_model import parse_epsilon


ROBUST_METRICS = ("robust_accuracy", "expected_robustness")


def check_choices(args: Any) -> None:
    for one in dataclasses.fields(args):
        choices = one.metadata.get("choices", ())
        if choices and one.name not in TrainingArguments.__dataclass_fields__:
            valid = [None, *choices] if one.default is None else [*choices]
            if getattr(args, one.name) not in valid:
                raise ValueError(f"`{one.name}={getattr(args, one.name)!r}` is unknown; choose one of {valid}.")


def check_attacks(args: Any) -> None:
    for attack, steps in (("attack", "attack_steps"), ("eval_attack", "eval_attack_steps")):
        name = getattr(args, attack)
        if name in SINGLE_STEP and getattr(args, steps) != 1:
            raise ValueError(
                f"`{attack}={name!r}` takes exactly one step, got `{steps}={getattr(args, steps)}`; set `{steps}=1` "
                f"or `{attack}='pgd'`."
            )
    if args.attack_steps_schedule != "constant" and args.attack in SINGLE_STEP:
        raise ValueError(
            f"`attack_steps_schedule={args.attack_steps_schedule!r}` has no effect: `attack={args.attack!r}` takes "
            "exactly one step. Leave it 'constant', or set `attack='pgd'`."
        )
    if args.attack == "nfgsm" and args.norm != "linf":
        raise ValueError(f"`attack='nfgsm'` is defined for `norm='linf'`, got {args.norm!r}; set `attack='pgd'`.")
    if args.attack == "nfgsm" and not args.attack_random_start:
        raise ValueError(
            "`attack='nfgsm'` starts from noise, which `attack_random_start=False` would leave out; set it to "
            "True, or `attack='fgsm'`."
        )
    if args.attack_dtype is not None and args.fp16:
        raise ValueError(
            f"`attack_dtype={args.attack_dtype!r}` has no effect with `fp16=True`, which runs the whole model in "
            "float16; leave it out, or set `bf16=True` instead of `fp16`."
        )


def check_loss_arguments(args: Any) -> None:
    if args.robust_loss == "mart" and args.label_smoothing_factor:
        raise ValueError(
            f"`robust_loss='mart'` does not define `label_smoothing_factor={args.label_smoothing_factor}`; set it "
            "to 0."
        )
    for name in ("mixup_alpha", "cutmix_alpha"):
        if (alpha := getattr(args, name)) and (args.robust_loss == "mart" or args.attack == "apgd_dlr"):
            raise ValueError(
                f"`{name}={alpha}` makes soft labels, which `robust_loss='mart'` and `attack='apgd_dlr'` do not "
                "define; set it to 0, or choose another loss and attack."
            )
    has_own_objective = LOSSES[args.robust_loss].attack_objective == "kl"
    if has_own_objective and args.attack == "apgd_dlr":
        raise ValueError(
            f"`attack='apgd_dlr'` has its own objective, but so does `robust_loss={args.robust_loss!r}`; set "
            "`attack='apgd'`."
        )
    if has_own_objective and not args.attack_random_start:
        raise ValueError(
            f"`robust_loss={args.robust_loss!r}` needs `attack_random_start=True`: the divergence it increases "
            "has a zero gradient at the clean image."
        )


def check_weights(args: Any) -> None:
    if args.awp_gamma is not None and args.fp16:
        raise ValueError(
            f"`awp_gamma={args.awp_gamma}` needs gradients without the loss scaling of `fp16=True`; set `bf16=True` "
            "instead."
        )


def check_eval_epsilons(args: Any) -> None:
    target = parse_epsilon(args.epsilon)
    if target == 0:
        raise ValueError(
            f"`epsilon={args.epsilon!r}` means no attack; for plain fine-tuning set `robust_loss='standard'`, and "
            "`epsilon` to the strength at which robustness is measured."
        )
    grid = args.epsilon_grid
    if args.eval_epsilons is not None:
        args.eval_epsilons = [str(epsilon) for epsilon in args.eval_epsilons]
    if target not in grid:
        raise ValueError(
            f"`eval_epsilons={args.eval_epsilons}` lacks `epsilon={args.epsilon!r}`, at which `robust_accuracy` "
            "is measured; add it."
        )
    metric = args.metric_for_best_model or ""
    if not args.eval_attack_during_training and metric.endswith(ROBUST_METRICS):
        raise ValueError(
            f"`metric_for_best_model={metric!r}` is not measured with `eval_attack_during_training=False`; set it "
            "to True."
        )


def check_supported(args: Any) -> None:
    """Refuse settings that would silently train or measure something else."""
    # These older names work in all supported versions; transformers 5.23 added others.
    checkpointing = args.gradient_checkpointing_kwargs
    if args.gradient_checkpointing and isinstance(checkpointing, dict) and checkpointing.get("use_reentrant"):
        raise ValueError(
            "Activation checkpointing with `use_reentrant=True` does not support `torch.autograd.grad`, which "
            "attacks use. Set `use_reentrant` to False."
        )
    started = int(os.environ.get("WORLD_SIZE") or 1) if "LOCAL_RANK" in os.environ else 1  # by torchrun
    if started != args.world_size:
        raise ValueError(
            f"{started} processes were started, but each would train by itself into the same `output_dir`: "
            "without an accelerator, they need `use_cpu=True` to communicate. Set it, or start one process."
        )
    if args.enable_jit_checkpoint:
        raise ValueError(
            "`enable_jit_checkpoint=True` saves before the optimizer step that it then takes, so resuming takes "
            "it twice. Leave it out: `RobustTrainer` saves and stops on SIGTERM by itargs."
        )
    for name, needed in (("eval_do_concat_batches", True), ("batch_eval_metrics", False)):
        if getattr(args, name) != needed:
            raise ValueError(f"`{name}={not needed}` is not supported: robust metrics need all predictions at once.")
