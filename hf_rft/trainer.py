"""`RobustTrainer`: `Trainer` that learns from adversarial examples and measures robustness.

Here is what differs while training, each in an override that calls `super()`: the loss (`compute_loss`,
`training_step`, `get_batch_samples`, `_get_grad_norm`) and the logged epsilon and accuracy (`log`). Evaluation is in
trainer_evaluation.py, what several processes need in trainer_distributed.py, checkpoints and resuming in
trainer_resume.py, what the alarms measure in trainer_alarms.py, the model card and pushing to the Hub in
trainer_sharing.py.
"""

import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .attacks import ATTACKS, Attack
from .attacks.base import checked
from .attacks.objectives import KLDivergence
from .callbacks import (
    AttackCheckCallback,
    BestCheckpointCallback,
    DatasetEpochCallback,
    DataWaitCallback,
    EpsilonScheduleCallback,
)
from .checks import check_batch, check_dataset, check_finite, check_loss, check_setup
from .interruption import InterruptionCallback
from .losses import LOSSES, RobustLoss
from .model_state import batch_norm_frozen
from .noise import TRAINING_ATTACK, example_generators
from .pixel_space import PixelNormalization
from .schedules import EpsilonSchedule, checked_multiplier, scaled_steps
from .threat_model import ThreatModel
from .trainer_alarms import AlarmsMixin
from .trainer_evaluation import EvaluationMixin
from .trainer_resume import ResumeMixin
from .trainer_sharing import SharingMixin
from .training_args import RobustTrainingArguments
from .uneven_batches import own_real_examples, training_remainder


class RobustTrainer(AlarmsMixin, EvaluationMixin, ResumeMixin, SharingMixin):
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
    `eval_expected_robustness` and `eval_accuracy_at_<epsilon>` for each epsilon of the grid; `predict` returns
    (clean logits, predicted label at each epsilon, size of the smallest perturbation found that fools the model), or
    the logits alone if the dataset has no labels. A `compute_metrics` gets the clean logits, as usual.

    `robustness_report` holds the last such evaluation as a [`RobustnessReport`], the evidence that the model card and
    `push_to_hub` publish; you may put one of your own there, from [`evaluate_robustness`].
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
        super().__init__(model, args, *trainer_args, eval_attack=eval_attack, **trainer_kwargs)
        check_setup(self)
        self._set_up_processes()
        self.pixel_normalization = PixelNormalization.from_processor(self.processing_class)
        num_labels = self.model.config.num_labels
        check_dataset("train_dataset", self.train_dataset, num_labels)
        check_dataset("eval_dataset", self.eval_dataset, num_labels)

        self.threat_model = ThreatModel(args.norm, args.epsilon)
        options = {"random_start": args.attack_random_start, "step_size": args.attack_step_size}
        self.attack = checked(attack) if attack else partial(ATTACKS[args.attack], **options)
        robust_loss = robust_loss or LOSSES[args.robust_loss]
        self.robust_loss = robust_loss if isinstance(robust_loss, RobustLoss) else RobustLoss(robust_loss)
        check_loss(self.robust_loss, args, attack)

        self.add_callback(DatasetEpochCallback())
        self.add_callback(BestCheckpointCallback())
        self.add_callback(DataWaitCallback(lambda: self._seconds_for_data))
        self._has_own_schedule = epsilon_schedule is not None or self._epsilon_callback is not None
        if self._epsilon_callback is None:
            schedule = epsilon_schedule or args.make_epsilon_schedule()
            self.add_callback(EpsilonScheduleCallback(schedule, args.epsilon_schedule_interval))
        elif epsilon_schedule is not None:
            raise ValueError("Give either `epsilon_schedule` or an `EpsilonScheduleCallback`, not both.")
        self.add_callback(
            AttackCheckCallback(
                attacks=lambda: self._attacks,
                is_due=lambda: not self._scheduled_threat_model.is_trivial,
                trainer_name=type(self).__name__,
            )
        )
        self.add_callback(self._make_alarm_callback())
        self.interruption = InterruptionCallback()
        self.add_callback(self.interruption)  # the last one: others may have requests

        self._train_epsilon: float | None = None  # of the last training step, for the log
        self._train_attack_steps = 0  # likewise
        self._attacks = 0  # that have run in training
        self._seconds_for_data = 0.0  # spent waiting for batches
        self._micro_batch = 0  # within the optimizer step
        self._examples_in_step = 0  # over all micro-batches and processes
        self._real_examples: list[int] = []  # of this process, in each micro-batch of the step
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
        self._real_examples = []

        def counted():
            for batch in epoch_iterator:
                self._real_examples.append(self._count_real(len(batch["labels"])) if "labels" in batch else 0)
                yield batch

        start = time.perf_counter()
        batches, num_items_in_batch = super().get_batch_samples(counted(), num_batches, device)
        self._seconds_for_data += time.perf_counter() - start
        if batches and len(batches) < num_batches:
            # A pass over a stream ended within a step, which the parent takes after `num_batches` micro-batches only:
            # repetitions of which no example counts complete it.
            missing = num_batches - len(batches)
            batches += missing * batches[-1:]
            self._real_examples += missing * [0]
        examples = sum(self._real_examples)
        if self.args.world_size > 1:
            examples = int(self.accelerator.reduce(torch.tensor(examples, device=device), "sum"))
        self._examples_in_step, self._micro_batch = examples, 0
        return batches, num_items_in_batch

    def _count_real(self, batch_size: int) -> int:
        """How many examples of the batch just fetched are not repetitions that complete the epoch's last batch."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader:
            return batch_size
        remainder = training_remainder(state.active_dataloader, self.args.world_size)
        return own_real_examples(remainder, batch_size, self.args.process_index)

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
        if not self.model.training:  # the mean over this process's examples: the parent weights it with their number
            return super().compute_loss(model, inputs, return_outputs)
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
        if self._until_backward_ends is not None and self._micro_batch < len(self._real_examples):
            examples, real = self._examples_in_step, self._real_examples[self._micro_batch]
        else:  # called by hand, not by the training loop: this batch is the whole step
            examples, real = len(labels) * self.args.world_size, len(labels)
        if self._until_backward_ends is not None:
            micro_batch, step = self._micro_batch + 1, self.state.global_step + 1
            when = f"in micro-batch {micro_batch} of optimizer step {step}"
            check_finite("loss", loss[:real], when, self.args.world_size)
        self._count_right(adversarial_logits[:real], labels[:real])
        # Without a real example the gradient is zero, but there is one: the other processes wait for it. DDP averages
        # gradients over processes.
        loss = loss[:real].sum() * self.args.world_size / examples
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # With a loss scale (fp16) infinite gradients are normal now and then: the scaler skips the step.
        if self.accelerator.scaler is None and not self.is_deepspeed_enabled:
            when = f"before optimizer step {self.state.global_step + 1}, though the loss is"
            check_finite("gradient", torch.as_tensor(grad_norm), when)  # the same on all processes
        return grad_norm

    def _determine_best_metric(self, metrics, trial):
        # Models trained at different epsilons are not compared. Until there is a best one, early stopping waits.
        callback = self._epsilon_callback
        if callback is not None and self.robust_loss.needs_adversarial and not self.args.best_model_at_any_epsilon:
            if not callback.is_final(self.state):
                return False
        return super()._determine_best_metric(metrics, trial)

    @property
    def _loss_weight(self) -> float | None:
        weight = self.args.robust_loss_weight
        return self.robust_loss.weight if weight is None else weight

    @property
    def _scheduled_threat_model(self) -> ThreatModel:
        """That of the next training step; epsilon is 0 for a loss that needs no adversarial examples."""
        if not self.robust_loss.needs_adversarial:
            return ThreatModel(self.args.norm, 0)
        return ThreatModel(self.args.norm, self._multiplier * float(self.threat_model.epsilon))

    @property
    def _multiplier(self) -> float:
        """The share of epsilon that the next training step uses."""
        callback = self._epsilon_callback
        if callback is None:
            return 1.0
        # Once more: a subclass may override `multiplier`.
        return checked_multiplier(callback.multiplier(self.state), callback.progress(self.state))

    @property
    def _scheduled_steps(self) -> int:
        """Attack steps of the next training step, where epsilon is not 0."""
        steps = self.args.attack_steps
        return steps if self.args.attack_steps_schedule == "constant" else scaled_steps(steps, self._multiplier)

    def _adversarial_pixel_values(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, extra_inputs: dict[str, Any]
    ) -> torch.Tensor | None:
        """Adversarial examples for this step, normalised; None where no attack is due."""
        threat_model = self._scheduled_threat_model
        pixels = self.pixel_normalization.to_pixels(pixel_values)
        self._train_epsilon = float(threat_model.epsilon)
        if threat_model.is_trivial:
            self._train_attack_steps = 0
            return None
        self._train_attack_steps = self._scheduled_steps
        # The position of the first example in the global batch: neither accumulation nor processes change it.
        of_all_processes = self._over_processes(self._train_batch_size)
        first = self._micro_batch * of_all_processes + self.args.process_index * len(pixels)
        generator = example_generators(
            pixels.device,
            range(first, first + len(pixels)),
            TRAINING_ATTACK,
            self.args.seed,
            self.state.global_step,
        )
        with self._under_attack(training=self.args.attack_model_mode == "train"), self._folded():
            forward = partial(self._forward_for_training_attack, **extra_inputs)
            options = {}
            if self.robust_loss.attack_objective == "kl":
                with torch.no_grad():
                    options["objective"] = KLDivergence(forward(pixels))
            adversarial = self.attack(
                forward,
                pixels,
                labels,
                threat_model=threat_model,
                steps=self._train_attack_steps,
                generator=generator,
                **options,
            )
        self._attacks += 1
        adversarial_values = self.pixel_normalization.from_pixels(adversarial)
        # Bytes (a processor that does nothing) cannot hold a perturbation: those stay float.
        return adversarial_values.to(pixel_values.dtype) if pixel_values.is_floating_point() else adversarial_values

    # --- Logging ---

    def log(self, logs, start_time=None):
        if "loss" in logs and self._train_epsilon is not None:
            logs = {**logs, "epsilon": self._train_epsilon}
            if self.args.attack_steps_schedule != "constant":
                logs["attack_steps"] = self._train_attack_steps
            logs |= self._pop_adversarial_accuracy()
        super().log(logs, start_time)
