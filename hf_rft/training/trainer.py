"""`RobustTrainer`: a `Trainer` that learns from adversarial examples and measures robustness.

This file holds the overrides of `Trainer`. The work is done by the adversary, the schedule of epsilon, the evaluator,
the alarms (alarm_callback.py), resuming.py, card.py and sharing.py.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial, wraps
from typing import Any, cast

import torch
from accelerate.utils import find_batch_size, recursively_apply
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import TrainOutput

from ..attacks import Attack
from ..evaluation.evaluator import AttackedBatch, Evaluator
from ..evaluation.report import RobustnessReport
from ..evaluation.tiers import make_tier
from ..hub.pushing import PushError
from ..losses import LOSSES, RobustLoss
from ..models.adapters import saved_with_config
from ..models.classifier import PixelClassifier, batch_norm_frozen, check_batch
from ..models.pixel_space import PixelNormalization
from ..schedules import EpsilonSchedule, EpsilonScheduleCallback
from ..threat_model import ThreatModel
from . import sharing
from .adversary import AdversarialAccuracy, Adversary
from .arguments import RobustTrainingArguments
from .averaging import averaged, restore_trained_weights
from .callbacks import callbacks_of, notify
from .card import write_card
from .checkpoints import restore_weights
from .checks import check_loss, check_setup
from .distributed import (
    OptimizerStep,
    check_finite,
    completed,
    filled_up,
    first_examples,
    is_sharded,
    over_processes,
    own_real_examples,
    prepare_processes,
    with_real_examples,
)
from .evaluation import check_can_evaluate, make_report, on_clean_logits, with_robust_metrics
from .interruption import InterruptionCallback, preemption_requests, with_workers_in_own_group
from .mixing import mixed
from .parameter_groups import set_learning_rates
from .resuming import accuracy_since_log, checkpoint_to_resume, saved_whole, stream_position
from .weight_perturbation import weights_restored


class RobustTrainer(Trainer):
    """Robust fine-tuning of an image classifier.

    The data pipeline is that of image classification with [`~transformers.Trainer`]: batches hold `pixel_values`, as
    the image processor returns them, and `labels`. Saved models are ordinary transformers checkpoints.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class, ... :
            As in [`~transformers.Trainer`]. `args` must be [`RobustTrainingArguments`], and `processing_class` the
            model's image processor, which defines how pixels are normalised.
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
    `eval_expected_robustness`, `eval_accuracy_at_<epsilon>` for each epsilon of the grid, and
    `eval_majority_class_share`, the accuracy of always naming the largest class; `predict` returns
    (clean logits, predicted label at each epsilon, size of the smallest perturbation found that fools the model), or
    only the logits if the dataset has no labels. `compute_metrics` gets the clean logits.

    `robustness_report` is the report of the last such evaluation, which the model card and `push_to_hub` publish. You
    may replace it with your own from [`evaluate_robustness`].
    """

    args: RobustTrainingArguments
    model: PreTrainedModel
    # `compute_loss` divides by the number of examples of the whole optimizer step, not of the micro-batch.
    loss_is_scaled_for_ga = True
    robustness_report: RobustnessReport | None = None
    command: str | None = None  # the command that started training, for the card

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
        args = RobustTrainingArguments(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, RobustTrainingArguments):
            raise ValueError(f"`args` must be RobustTrainingArguments, got {type(args).__name__}.")
        super().__init__(model, args, *trainer_args, **trainer_kwargs)
        check_setup(self)
        robust_loss = robust_loss or LOSSES[args.robust_loss]
        self.robust_loss = robust_loss if isinstance(robust_loss, RobustLoss) else RobustLoss(robust_loss)
        check_loss(self.robust_loss, args, attack)
        self.threat_model = ThreatModel(args.norm, args.epsilon)
        self._own_attack = attack
        self._set_up_attack()
        tier = make_tier([(eval_attack or args.eval_attack, args.eval_attack_steps)])
        self.evaluator = Evaluator(args.norm, args.epsilon_grid, tier, args.seed)
        self.compute_metrics = with_robust_metrics(self, self.compute_metrics)
        self.preprocess_logits_for_metrics = on_clean_logits(self.preprocess_logits_for_metrics)

        self.optimizer_step: OptimizerStep | None = None
        self._until_backward_ends: contextlib.ExitStack | None = None
        self._train_accuracy = AdversarialAccuracy()
        self.seconds_for_data = 0.0
        self._eval_batches: list[AttackedBatch] = []
        self.has_own_schedule = epsilon_schedule is not None or self.epsilon_callback is not None
        if self.epsilon_callback is None:
            schedule = epsilon_schedule or args.make_epsilon_schedule()
            self.add_callback(EpsilonScheduleCallback(schedule, args.epsilon_schedule_interval))
        elif epsilon_schedule is not None:
            raise ValueError("Give either `epsilon_schedule` or an `EpsilonScheduleCallback`, not both.")
        self.interruption = InterruptionCallback()
        for callback in (*callbacks_of(self), self.interruption):  # last, since others may request a stop
            self.add_callback(callback)

    def _set_up_attack(self) -> None:
        options = {"by_name": True, "divided": self.is_fsdp_enabled, "autocast": self.accelerator.autocast}
        normalization = PixelNormalization.from_processor(self.processing_class)
        self.classifier = PixelClassifier(self.model, normalization, **options)
        options = {"objective": self.robust_loss.attack_objective, **prepare_processes(self)}
        self.adversary = Adversary.from_arguments(self.args, self.classifier, self._own_attack, **options)

    def call_model_init(self, trial=None):
        model = cast(PreTrainedModel, super().call_model_init(trial))
        if hasattr(self, "adversary"):  # `train` begins with a new model
            self.model = model
            self._set_up_attack()
        return model

    def create_optimizer(self, *args, **kwargs):
        is_new, optimizer = self.optimizer is None, super().create_optimizer(*args, **kwargs)
        if is_new:
            set_learning_rates(optimizer, self.model, self.args.head_learning_rate, self.args.layer_decay)
        return optimizer

    # --- Training ---

    def train(self, resume_from_checkpoint=None, *args, **kwargs) -> TrainOutput:
        """As [`~transformers.Trainer.train`]; `resume_from_checkpoint=True` takes the last complete checkpoint.

        Raises:
            TrainingPreempted: after SIGTERM, once the optimizer step in progress is done and a checkpoint written.
            AlarmRaised: with `abort_on_alarm`, once a checkpoint is written.
            NonFiniteError: if a loss or gradient is not finite; the step is not taken.
        """
        checkpoint = checkpoint_to_resume(self, resume_from_checkpoint)
        self._train_accuracy = accuracy_since_log(self, checkpoint)
        self.interruption.reset()
        with preemption_requests(self.interruption), weights_restored(self):
            output = super().train(checkpoint, *args, **kwargs)
        if self.interruption.requested is not None:  # after the last step
            raise self.interruption.requested
        return output

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        start, counts = time.perf_counter(), []
        counted = with_real_examples(epoch_iterator, self.accelerator, counts)
        batches, num_items_in_batch = super().get_batch_samples(counted, num_batches, device)
        self.seconds_for_data += time.perf_counter() - start
        batches, counts = completed(batches, counts, num_batches)
        step = OptimizerStep.of(counts, self.accelerator)
        step.batches = batches if self.args.awp_gamma else []
        if batches:  # at the end of a pass, the log still needs the last step
            self.optimizer_step = step
        return batches, num_items_in_batch

    def training_step(self, model, inputs, num_items_in_batch=None):
        with self.in_micro_batch():
            return super().training_step(model, inputs, num_items_in_batch)

    @contextlib.contextmanager
    def in_micro_batch(self) -> Iterator[None]:
        """Around the loss of one micro-batch and its gradient; then the next one is due."""
        # `compute_loss` freezes BatchNorm until backward ends: activation checkpointing repeats the forward pass.
        try:
            with contextlib.ExitStack() as self._until_backward_ends:
                yield
        finally:
            self._until_backward_ends = None
            if self.optimizer_step is not None:
                self.optimizer_step.micro_batch += 1

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        check_batch(inputs, self.model.config.num_labels, may_be_soft=self.model.training)
        if not self.model.training:  # `Trainer` weights this process's mean loss by its number of examples
            return super().compute_loss(model, inputs, return_outputs)
        inputs = dict(inputs)
        labels, pixel_values = inputs.pop("labels"), inputs.pop("pixel_values")
        step, is_in_loop = self.optimizer_step, self._until_backward_ends is not None
        if step is None or not is_in_loop or step.micro_batch >= len(step.real):  # called outside training
            step = OptimizerStep(len(labels) * self.args.world_size, [len(labels)])
        first = step.micro_batch * over_processes(self.args, self._train_batch_size)
        first += self.args.process_index * len(labels)  # its position in the global batch
        key = (self.args.seed, self.state.global_step, first)
        pixel_values, labels = mixed(pixel_values, labels, self.args, self.model.config.num_labels, key)
        with contextlib.ExitStack() as until_loss_is_computed:
            if self.args.freeze_batch_norm:
                until = self._until_backward_ends or until_loss_is_computed
                until.enter_context(batch_norm_frozen(self.model))
            adversarial_values = self._adversarial_values(pixel_values, labels, step, first, inputs)
            outputs, clean, adversarial = self.robust_loss.logits(model, pixel_values, adversarial_values, **inputs)
            options = {"weight": self.args.robust_loss_weight, "label_smoothing": self.args.label_smoothing_factor}
            real = step.real[step.micro_batch]
            loss = self.robust_loss(clean, adversarial, labels, **options)[:real]
        if is_in_loop:
            when = f"in micro-batch {step.micro_batch + 1} of optimizer step {self.state.global_step + 1}"
            check_finite("loss", loss, when, self.args.world_size)
        if not step.is_ascent:
            self._train_accuracy.add(adversarial[:real], labels[:real])
        # DDP averages gradients over all processes; one without real examples contributes zero.
        loss = loss.sum() * self.args.world_size / step.examples
        return (loss, outputs) if return_outputs else loss

    def _adversarial_values(self, pixel_values, labels, step: OptimizerStep, first: int, inputs: dict[str, Any]):
        """Adversarial examples, normalised as the processor does; None at epsilon 0."""
        pixels, share = self.classifier.normalization.to_pixels(pixel_values), self.share_of_epsilon
        threat_model, step.attack_steps = self.adversary.strength(share)
        step.epsilon = float(threat_model.epsilon)
        if threat_model.is_trivial:
            return None
        if (crafted := step.crafted.pop(step.micro_batch, None)) is not None:
            return crafted
        position = {"optimizer_step": self.state.global_step, "first": first}
        adversarial = self.adversary(pixels, labels, share, **position, **inputs)
        notify(self, "on_adversarial_batch", pixels=pixels, adversarial=adversarial, labels=labels)
        values = self.classifier.normalization.from_pixels(adversarial)
        # Bytes (from a processor that does nothing) cannot represent a perturbation: the result stays float.
        values = values.to(pixel_values.dtype) if pixel_values.is_floating_point() else values
        if step.is_ascent:
            step.crafted[step.micro_batch] = values
        return values

    @property
    def share_of_epsilon(self) -> float:
        """Share of epsilon for the next training step; 0 for a loss that needs no adversarial examples."""
        if not self.robust_loss.needs_adversarial:
            return 0.0
        callback = self.epsilon_callback
        return 1.0 if callback is None else callback.share(self.state)

    @property
    def epsilon_callback(self) -> EpsilonScheduleCallback | None:
        # Looked up each time: resuming may replace callback objects.
        return next((one for one in self.callback_handler.callbacks if isinstance(one, EpsilonScheduleCallback)), None)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # With loss scaling (fp16), infinite gradients are normal now and then: the scaler skips the step.
        if self.accelerator.scaler is None and not self.is_deepspeed_enabled:
            when = f"before optimizer step {self.state.global_step + 1}, though the loss is"
            check_finite("gradient", torch.as_tensor(grad_norm), when)  # the same on all processes
        return grad_norm

    def _determine_best_metric(self, metrics, trial):
        # Models trained at different epsilons are not comparable. Early stopping waits for the first best model.
        callback, any_epsilon = self.epsilon_callback, self.args.best_model_at_any_epsilon
        is_comparable = callback is None or not self.robust_loss.needs_adversarial or callback.is_final(self.state)
        return (any_epsilon or is_comparable) and super()._determine_best_metric(metrics, trial)

    def log(self, logs, start_time=None):
        if "loss" in logs and self.optimizer_step is not None and self.optimizer_step.epsilon is not None:
            logs = {**logs, "epsilon": self.optimizer_step.epsilon}
            if self.args.attack_steps_schedule != "constant":
                logs["attack_steps"] = self.optimizer_step.attack_steps
            logs |= self._train_accuracy.pop(self.accelerator)
        super().log(logs, start_time)

    # --- Evaluation: every example is attacked over the whole grid of epsilons ---

    def evaluation_loop(self, dataloader, *args, **kwargs):
        check_can_evaluate(self)
        self._eval_batches = []
        with averaged(self):
            output = super().evaluation_loop(dataloader, *args, **kwargs)
            self.robustness_report = make_report(self, output, dataloader.dataset, self._eval_batches)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Adds to the logits the predicted label at each epsilon, and the size of the smallest perturbation found.

        The examples that pad the last batch are not attacked; zeros replace their results, so that all processes
        exchange results of the same shape.
        """
        size, state, process = find_batch_size(inputs), self.accelerator.gradient_state, self.args.process_index
        real = own_real_examples(state.remainder, size, process) if state.end_of_dataloader else size
        before = len(self._eval_batches) * over_processes(self.args, self.args.eval_batch_size) + process * size
        if real < size:  # the model needs at least one
            inputs = first_examples(inputs, max(real, 1))
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        attacked = AttackedBatch()
        if not prediction_loss_only and logits is not None and labels is not None:
            logits = logits[0] if isinstance(logits, tuple) else logits
            evaluator, positions = self.current_evaluator, range(before, before + real)
            inputs = self._prepare_inputs(dict(inputs))
            broken, attacked = evaluator.attack_inputs(self.classifier, inputs, logits[:real], positions)
            logits = (logits, broken.predictions(len(evaluator.epsilons)), broken.distances)
        self._eval_batches.append(attacked)
        return loss, *recursively_apply(partial(filled_up, batch_size=size), (logits, labels))

    @property
    def current_evaluator(self) -> Evaluator:
        is_attacked = self.args.eval_attack_during_training or not self.is_in_train
        return self.evaluator if is_attacked else replace(self.evaluator, epsilons=[Fraction(0)])

    # --- Checkpoints ---

    def _get_dataloader(self, *args, **kwargs):
        return with_workers_in_own_group(super()._get_dataloader(*args, **kwargs))

    def _init_training_state(self, max_steps, steps_per_epoch, num_train_epochs, checkpoint, trial):
        position = super()._init_training_state(max_steps, steps_per_epoch, num_train_epochs, checkpoint, trial)
        return stream_position(self, checkpoint, max_steps, num_train_epochs) or position

    def _save_checkpoint(self, model, trial):
        with saved_whole(self, trial, self.interruption, self._train_accuracy):
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not restore_weights(model or self.model, resume_from_checkpoint, sharded=is_sharded(self)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore_trained_weights(self, resume_from_checkpoint)

    def _load_best_model(self):
        if not restore_weights(self.model, self.state.best_model_checkpoint, sharded=is_sharded(self)):
            super()._load_best_model()

    # --- Sharing ---

    @wraps(Trainer.create_model_card)
    def create_model_card(self, *args, **kwargs):
        if self.is_world_process_zero():
            write_card(self, *args, **kwargs)

    init_hf_repo = sharing.init_hf_repo
    push_to_hub = sharing.push_to_hub  # pyright: ignore[reportAssignmentType] (may return a Future)
    _push_from_checkpoint = sharing.push_from_checkpoint

    def _save(self, output_dir=None, state_dict=None):
        with averaged(self), saved_with_config(self.model, output_dir or self.args.output_dir):
            super()._save(output_dir, state_dict)
        sharing.save_arguments_without_tokens(self.args, output_dir)

    def save_model(self, output_dir=None, _internal_call=False):
        try:
            super().save_model(output_dir, _internal_call)
        except PushError as error:  # with `args.push_to_hub`, `Trainer` pushes the saved model; training must go on
            sharing.logger.error("The model is saved. %s", error)
