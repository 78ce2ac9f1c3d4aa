"""`RobustTrainer`: `Trainer` that learns from adversarial examples and measures robustness.

Five things differ from the parent, each in an override that calls `super()`: the loss (`compute_loss`,
`training_step`, `get_batch_samples`), what evaluation predicts (`prediction_step`, `evaluation_loop`), the metrics
(`compute_metrics`), the logged epsilon (`log`) and how weights are restored (`_load_from_checkpoint`,
`_load_best_model`).
"""

import contextlib
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction, PreTrainedModel, Trainer

from .attacks import ATTACKS, Attack
from .attacks.base import checked
from .attacks.objectives import KLDivergence
from .callbacks import DatasetEpochCallback, EpsilonScheduleCallback
from .checkpoints import restore_weights
from .checks import check_batch, check_dataset, check_loss, check_setup
from .evaluation.metrics import robust_metrics
from .evaluation.search import find_breaking_points
from .evaluation.tiers import make_tier
from .evaluation.versions import versions
from .losses import LOSSES, RobustLoss
from .model_state import batch_norm_frozen, under_attack
from .noise import TRAINING_ATTACK, example_generators
from .pixel_space import PixelNormalization
from .schedules import EpsilonSchedule
from .threat_model import ThreatModel
from .training_args import RobustTrainingArguments


class RobustTrainer(Trainer):
    """Robust fine-tuning of an image classifier.

    The data pipeline is that of any image classification with [`~transformers.Trainer`]: batches hold `pixel_values`,
    as the image processor returns them, and `labels`. Saved models are ordinary transformers checkpoints.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class, ... :
            As in [`~transformers.Trainer`]. `args` must be [`RobustTrainingArguments`], and `processing_class` the
            model's image processor, from which the pixel range follows.
        attack (`Callable`, *optional*):
            Training attack with the signature of [`hf_rft.attacks.Attack`], instead of `args.attack`.
        eval_attack (`Callable`, *optional*):
            Evaluation attack, instead of `args.eval_attack`.
        robust_loss (`Callable` or [`hf_rft.losses.RobustLoss`], *optional*):
            `(clean_logits, adversarial_logits, labels, *, weight, label_smoothing) -> (batch,)`, instead of
            `args.robust_loss`.
        epsilon_schedule (`Callable[[float], float]`, *optional*):
            Maps progress in [0, 1] to a multiplier of epsilon, instead of `args.epsilon_schedule_type`.

    `evaluate` returns, besides the loss, `eval_accuracy`, `eval_robust_accuracy` (at `args.epsilon`),
    `eval_expected_robustness` and `eval_accuracy_at_<epsilon>` for each epsilon of the grid; `predict` returns the
    pair (clean logits, predicted label at each epsilon), or the logits alone if the dataset has no labels. A
    `compute_metrics` gets the clean logits, as usual.
    """

    args: RobustTrainingArguments
    model: PreTrainedModel
    # The loss is divided by the number of examples of the whole optimizer step, not of the micro-batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: RobustTrainingArguments | None = None,
        *trainer_args,
        attack: Attack | None = None,
        eval_attack: Attack | None = None,
        robust_loss: RobustLoss | Callable[..., torch.Tensor] | None = None,
        epsilon_schedule: EpsilonSchedule | None = None,
        **trainer_kwargs,
    ):
        if args is None:
            args = RobustTrainingArguments(output_dir="tmp_trainer")
        if not isinstance(args, RobustTrainingArguments):
            raise ValueError(f"`args` must be RobustTrainingArguments, got {type(args).__name__}.")
        super().__init__(model, args, *trainer_args, **trainer_kwargs)
        check_setup(self)
        self.pixel_normalization = PixelNormalization.from_processor(self.processing_class)
        num_labels = self.model.config.num_labels
        check_dataset("train_dataset", self.train_dataset, num_labels)
        check_dataset("eval_dataset", self.eval_dataset, num_labels)

        self.threat_model = ThreatModel(args.norm, args.epsilon)
        options = {"random_start": args.attack_random_start, "step_size": args.attack_step_size}
        self.attack = checked(attack) if attack else partial(ATTACKS[args.attack], **options)
        self.eval_tier = make_tier([(eval_attack or args.eval_attack, args.eval_attack_steps)])
        robust_loss = robust_loss or LOSSES[args.robust_loss]
        self.robust_loss = robust_loss if isinstance(robust_loss, RobustLoss) else RobustLoss(robust_loss)
        check_loss(self.robust_loss, args, attack)

        self.add_callback(DatasetEpochCallback())
        if self._epsilon_callback is None:
            schedule = epsilon_schedule or args.make_epsilon_schedule()
            self.add_callback(EpsilonScheduleCallback(schedule, args.epsilon_schedule_interval))
        elif epsilon_schedule is not None:
            raise ValueError("Give either `epsilon_schedule` or an `EpsilonScheduleCallback`, not both.")

        # A user's function sees what it would see in a plain Trainer: the clean logits.
        self._user_compute_metrics, self.compute_metrics = self.compute_metrics, self._compute_metrics
        if self.preprocess_logits_for_metrics is not None:
            self.preprocess_logits_for_metrics = partial(_preprocess_clean, self.preprocess_logits_for_metrics)

        self._train_epsilon: float | None = None  # of the last training step, for the log
        self._micro_batch = 0  # within the optimizer step
        self._examples_in_step: int | None = None  # over all micro-batches and processes
        self._eval_batch = 0  # within the evaluation
        self._until_backward_ends: contextlib.ExitStack | None = None

    # --- Training ---

    @property
    def _epsilon_callback(self) -> EpsilonScheduleCallback | None:
        # Looked up each time: resuming may replace callback objects.
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EpsilonScheduleCallback):
                return callback
        return None

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        examples = sum(len(batch["labels"]) for batch in batches if "labels" in batch)
        if self.args.world_size > 1:
            examples = int(self.accelerator.reduce(torch.tensor(examples, device=device), "sum"))
        self._examples_in_step, self._micro_batch = examples, 0
        return batches, num_items_in_batch

    def training_step(self, model, inputs, num_items_in_batch=None):
        # `compute_loss` freezes BatchNorm; activation checkpointing runs the forward pass again during backward.
        try:
            with contextlib.ExitStack() as self._until_backward_ends:
                return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._until_backward_ends = None
            self._micro_batch += 1

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        check_batch(inputs, self.model.config.num_labels)
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels, pixel_values = inputs.pop("labels"), inputs.pop("pixel_values")
        with contextlib.ExitStack() as until_loss_is_computed:
            if self.args.freeze_batch_norm:
                until = self._until_backward_ends or until_loss_is_computed
                until.enter_context(batch_norm_frozen(self.model))
            adversarial_values = self._adversarial_pixel_values(pixel_values, labels, inputs)
            # Clean and adversarial examples share one forward pass through the wrapped model: DDP expects one.
            if adversarial_values is None:  # at epsilon 0 the clean example is the adversarial one
                outputs = model(pixel_values=pixel_values, **inputs)
                clean_logits = adversarial_logits = outputs.logits
            elif self.robust_loss.needs_clean:
                outputs = model(pixel_values=torch.cat([pixel_values, adversarial_values]), **inputs)
                clean_logits, adversarial_logits = outputs.logits.chunk(2)
            else:
                outputs = model(pixel_values=adversarial_values, **inputs)
                clean_logits, adversarial_logits = None, outputs.logits
            loss = self.robust_loss.function(
                clean_logits,
                adversarial_logits,
                labels,
                weight=self._loss_weight,
                label_smoothing=self.args.label_smoothing_factor,
            )
        examples = self._examples_in_step if self._until_backward_ends is not None else None
        if examples is None:  # called by hand, not by the training loop: this batch is the whole step
            examples = len(labels) * self.args.world_size
        loss = loss.sum() * self.args.world_size / examples  # DDP averages gradients over processes
        return (loss, outputs) if return_outputs else loss

    @property
    def _loss_weight(self) -> float | None:
        weight = self.args.robust_loss_weight
        return self.robust_loss.weight if weight is None else weight

    def _adversarial_pixel_values(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, extra_inputs: dict[str, Any]
    ) -> torch.Tensor | None:
        """Adversarial examples for this step, normalised; None where no attack is due."""
        callback = self._epsilon_callback
        multiplier = callback.multiplier(self.state) if callback is not None else 1.0
        threat_model = ThreatModel(self.args.norm, multiplier * float(self.threat_model.epsilon))
        pixels = self.pixel_normalization.to_pixels(pixel_values)
        is_attacked = self.robust_loss.needs_adversarial and not threat_model.is_trivial
        self._train_epsilon = float(threat_model.epsilon) if is_attacked else 0.0
        if not is_attacked:
            return None
        # The position of the first example in the global batch: neither accumulation nor processes change it.
        first = (self._micro_batch * self.args.world_size + self.args.process_index) * self._train_batch_size
        generator = example_generators(
            pixels.device,
            range(first, first + len(pixels)),
            TRAINING_ATTACK,
            self.args.seed,
            self.state.global_step,
        )
        with under_attack(self.model, training=self.args.attack_model_mode == "train"):
            forward = partial(self._forward, **extra_inputs)
            options = {}
            if self.robust_loss.attack_objective == "kl":
                with torch.no_grad():
                    options["objective"] = KLDivergence(forward(pixels))
            adversarial = self.attack(
                forward,
                pixels,
                labels,
                threat_model=threat_model,
                steps=self.args.attack_steps,
                generator=generator,
                **options,
            )
        adversarial_values = self.pixel_normalization.from_pixels(adversarial)
        # Bytes (a processor that does nothing) cannot hold a perturbation: those stay float.
        return adversarial_values.to(pixel_values.dtype) if pixel_values.is_floating_point() else adversarial_values

    def _forward(self, pixels: torch.Tensor, **extra_inputs) -> torch.Tensor:
        """Pixels in [0, 1] to logits, through the bare model: crafting must not trigger gradient synchronisation."""
        pixel_values = self.pixel_normalization.from_pixels(pixels).to(self.model.dtype)
        return self.model(pixel_values=pixel_values, **extra_inputs).logits

    # --- Evaluation ---

    def evaluation_loop(self, *args, **kwargs):
        self._eval_batch = 0
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Adds to the parent's (loss, logits, labels) the predicted label at each epsilon, beside the logits."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if prediction_loss_only or logits is None or labels is None:
            return loss, logits, labels
        logits = logits[0] if isinstance(logits, tuple) else logits
        inputs = self._prepare_inputs(dict(inputs))
        pixel_values, _ = inputs.pop("pixel_values"), inputs.pop("labels")
        first = (self._eval_batch * self.args.world_size + self.args.process_index) * self.args.eval_batch_size
        self._eval_batch += 1
        epsilons = self._evaluated_epsilons
        with under_attack(self.model, training=False):
            broken = find_breaking_points(
                partial(self._forward, **inputs),
                self.pixel_normalization.to_pixels(pixel_values),
                labels,
                norm=self.args.norm,
                epsilons=epsilons,
                tier=self.eval_tier,
                seed=self.args.seed,
                positions=range(first, first + len(labels)),
                clean_predictions=logits.argmax(dim=1),
            )
        return loss, (logits, broken.predictions(len(epsilons))), labels

    @property
    def _evaluated_epsilons(self) -> list[Fraction]:
        if self.is_in_train and not self.args.eval_attack_during_training:
            return [Fraction(0)]
        return self.args.epsilon_grid

    def _compute_metrics(self, evaluation: EvalPrediction) -> dict[str, float]:
        logits, predictions = cast(tuple[np.ndarray, np.ndarray], evaluation.predictions)
        metrics = {}
        if self._user_compute_metrics is not None:
            of_clean_logits = EvalPrediction(logits, evaluation.label_ids, evaluation.inputs, evaluation.losses)
            metrics.update(self._user_compute_metrics(of_clean_logits))
        metrics.update(robust_metrics(predictions, evaluation.label_ids, self._evaluated_epsilons, self.threat_model))
        return metrics

    def evaluation_settings(self) -> dict[str, Any]:
        """What the numbers of `evaluate` depend on, besides model and data, to be kept with them."""
        return {
            "norm": self.args.norm,
            "epsilon": self.args.epsilon,
            "epsilons": self.args.epsilons_as_text,
            **self.eval_tier.describe(),
            "seed": self.args.seed,
            "versions": versions(),
        }

    # --- Logging ---

    def log(self, logs, start_time=None):
        if "loss" in logs and self._train_epsilon is not None:
            logs = {**logs, "epsilon": self._train_epsilon}
        super().log(logs, start_time)

    # --- Restoring weights ---

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self._is_sharded or not restore_weights(model or self.model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if self._is_sharded or not restore_weights(self.model, self.state.best_model_checkpoint):
            super()._load_best_model()

    @property
    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled


def _preprocess_clean(preprocess: Callable, logits: Any, labels: torch.Tensor | None) -> Any:
    """Apply a user's `preprocess_logits_for_metrics` to the clean logits only."""
    if labels is None:  # nothing was attacked
        return preprocess(logits, labels)
    return preprocess(logits[0], labels), logits[1]
