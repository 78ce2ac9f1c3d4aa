"""What a robustness number depends on, to be recorded with it."""

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..training_args import RobustTrainingArguments

PACKAGES = ("hf_rft", "torch", "transformers", "timm", "datasets")


def attack_name(attack: Callable) -> str:
    """The function's name, without the arguments bound to it."""
    while isinstance(attack, partial):
        attack = attack.func
    return getattr(attack, "__name__", repr(attack))


def evaluation_settings(args: "RobustTrainingArguments", attack: Callable) -> dict[str, Any]:
    """Threat model, attack, seed and versions behind the numbers of `RobustTrainer.evaluate`; JSON values only.

    The tier is `"custom"`: one attack with few steps chooses checkpoints, and is no standard evaluation.
    """
    return {
        "norm": args.norm,
        "epsilon": args.epsilon,
        "epsilons": args.epsilons_as_text,
        "tier": "custom",
        "attacks": [{"attack": attack_name(attack), "steps": args.eval_attack_steps, "restarts": 1}],
        "seed": args.seed,
        "versions": {package: version(package) for package in PACKAGES},
    }
