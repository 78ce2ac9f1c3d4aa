"""The evaluation of `RobustTrainer`: every example is attacked over the whole grid of epsilons.

The parent's loop, gathering over processes included, stays; what it predicts (`prediction_step`) and what becomes of
the predictions (`evaluation_loop`, `_compute_metrics`) is added to.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from transformers import EvalPrediction, PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from .attacks import Attack
from .attacks.base import Passes
from .evaluation.counting import CountedForward
from .evaluation.metrics import robust_metrics
from .evaluation.provenance import describe_dataset, describe_model, describe_normalization, versions
from .evaluation.report import RobustnessReport
from .evaluation.search import find_breaking_points
from .evaluation.tiers import make_tier
from .model_state import under_attack
from .pixel_space import PixelNormalization
from .threat_model import ThreatModel
from .training_args import RobustTrainingArguments


class EvaluationMixin(Trainer):
    """The part of [`RobustTrainer`] that measures robustness."""

    args: RobustTrainingArguments
    model: PreTrainedModel
    threat_model: ThreatModel
    pixel_normalization: PixelNormalization
    robustness_report: RobustnessReport | None = None
    _forward: Callable[..., torch.Tensor]
    _is_sharded: bool

    def __init__(self, model=None, args=None, *trainer_args, eval_attack: Attack | None = None, **trainer_kwargs):
        super().__init__(model, args, *trainer_args, **trainer_kwargs)
        self.eval_tier = make_tier([(eval_attack or self.args.eval_attack, self.args.eval_attack_steps)])
        # A user's function sees what it would see in a plain Trainer: the clean logits.
        self._user_compute_metrics, self.compute_metrics = self.compute_metrics, self._compute_metrics
        if self.preprocess_logits_for_metrics is not None:
            self.preprocess_logits_for_metrics = partial(_preprocess_clean, self.preprocess_logits_for_metrics)
        self._eval_batch, self._eval_passes = 0, Passes(0, 0)  # within the evaluation

    def evaluation_loop(self, dataloader, *args, **kwargs):
        self._eval_batch, self._eval_passes = 0, Passes(0, 0)
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        self._keep_report(output, dataloader.dataset)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Adds to the parent's logits the predicted label at each epsilon, and the distance at which each breaks."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if prediction_loss_only or logits is None or labels is None:
            return loss, logits, labels
        logits = logits[0] if isinstance(logits, tuple) else logits
        inputs = self._prepare_inputs(dict(inputs))
        pixel_values, _ = inputs.pop("pixel_values"), inputs.pop("labels")
        first = (self._eval_batch * self.args.world_size + self.args.process_index) * self.args.eval_batch_size
        self._eval_batch += 1
        epsilons = self._evaluated_epsilons
        forward = CountedForward(partial(self._forward, **inputs))
        with under_attack(self.model, training=False):
            broken = find_breaking_points(
                forward,
                self.pixel_normalization.to_pixels(pixel_values),
                labels,
                norm=self.args.norm,
                epsilons=epsilons,
                tier=self.eval_tier,
                seed=self.args.seed,
                positions=range(first, first + len(labels)),
                clean_predictions=logits.argmax(dim=1),
            )
        total, of_batch = self._eval_passes, forward.passes  # without the parent's clean pass
        self._eval_passes = Passes(total.forward + len(labels) + of_batch.forward, total.backward + of_batch.backward)
        return loss, (logits, broken.predictions(len(epsilons)), broken.distances), labels

    @property
    def _evaluated_epsilons(self) -> list[Fraction]:
        if self.is_in_train and not self.args.eval_attack_during_training:
            return [Fraction(0)]
        return self.args.epsilon_grid

    def _compute_metrics(self, evaluation: EvalPrediction) -> dict[str, float]:
        logits, predictions, _ = cast(tuple[np.ndarray, np.ndarray, np.ndarray], evaluation.predictions)
        metrics = {}
        if self._user_compute_metrics is not None:
            of_clean_logits = EvalPrediction(logits, evaluation.label_ids, evaluation.inputs, evaluation.losses)
            metrics.update(self._user_compute_metrics(of_clean_logits))
        metrics.update(robust_metrics(predictions, evaluation.label_ids, self._evaluated_epsilons, self.threat_model))
        return metrics

    def _keep_report(self, output: EvalLoopOutput, dataset: Any) -> None:
        is_attacked = isinstance(output.predictions, tuple) and len(self._evaluated_epsilons) > 1
        # Weights that are divided over processes have no hash on any of them.
        if not is_attacked or output.num_samples == 0 or self._is_sharded:
            return
        _, predictions, distances = cast(tuple[np.ndarray, np.ndarray, np.ndarray], output.predictions)
        passes = torch.tensor([*self._eval_passes], device=self.args.device)
        passes = cast(torch.Tensor, self.accelerator.reduce(passes, "sum"))
        self.robustness_report = RobustnessReport.from_predictions(
            predictions,
            cast(np.ndarray, output.label_ids),
            distances,
            norm=self.args.norm,
            epsilons=self._evaluated_epsilons,
            passes=Passes(*passes.tolist()),
            settings={
                "model": describe_model(self.model),
                "dataset": {**describe_dataset(dataset), "sha256": None},
                "processor": describe_normalization(self.pixel_normalization),
                **self.evaluation_settings(),
                "batch_size": self.args.eval_batch_size,
            },
        )

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


def _preprocess_clean(preprocess: Callable, logits: Any, labels: torch.Tensor | None) -> Any:
    """Apply a user's `preprocess_logits_for_metrics` to the clean logits only."""
    if labels is None:  # nothing was attacked
        return preprocess(logits, labels)
    return preprocess(logits[0], labels), *logits[1:]
