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
from accelerate.utils import find_batch_size, recursively_apply
from torch.distributed.fsdp import FSDPModule
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from .attacks import Attack
from .attacks.base import Passes
from .evaluation.counting import CountedForward
from .evaluation.metrics import robust_metrics
from .evaluation.provenance import describe_dataset, describe_model, describe_normalization, versions
from .evaluation.report import RobustnessReport
from .evaluation.search import BreakingPoints, find_breaking_points
from .evaluation.tiers import make_tier
from .threat_model import ThreatModel
from .trainer_distributed import DistributedMixin
from .uneven_batches import filled_up, first_examples, own_real_examples


class EvaluationMixin(DistributedMixin):
    """The part of [`RobustTrainer`] that measures robustness."""

    threat_model: ThreatModel
    robustness_report: RobustnessReport | None = None

    def __init__(self, model=None, args=None, *trainer_args, eval_attack: Attack | None = None, **trainer_kwargs):
        super().__init__(model, args, *trainer_args, **trainer_kwargs)
        self.eval_tier = make_tier([(eval_attack or self.args.eval_attack, self.args.eval_attack_steps)])
        # A user's function sees what it would see in a plain Trainer: the clean logits.
        self._user_compute_metrics, self.compute_metrics = self.compute_metrics, self._compute_metrics
        if self.preprocess_logits_for_metrics is not None:
            self.preprocess_logits_for_metrics = partial(_preprocess_clean, self.preprocess_logits_for_metrics)
        self._eval_batch, self._eval_passes = 0, Passes(0, 0)  # within the evaluation

    def evaluation_loop(self, dataloader, *args, **kwargs):
        if self.is_fsdp_enabled and not isinstance(self.model, FSDPModule):
            raise ValueError(
                "FSDP2 can evaluate only a model that it has trained: accelerate divides a model together with its "
                "optimizer. Call `evaluate` after `train`, or start the processes without FSDP."
            )
        self._eval_batch, self._eval_passes = 0, Passes(0, 0)
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        self._keep_report(output, dataloader.dataset)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Adds to the parent's logits the predicted label at each epsilon, and the distance at which each breaks.

        Examples that only complete the last batch are left out. Zeros stand in their place: the processes exchange
        results of one shape, and the parent then cuts them off.
        """
        size = find_batch_size(inputs)
        state = self.accelerator.gradient_state
        real = own_real_examples(state.remainder, size, self.args.process_index) if state.end_of_dataloader else size
        first = self._eval_batch * self._over_processes(self.args.eval_batch_size) + self.args.process_index * size
        self._eval_batch += 1
        if real < size:  # at least one is kept: the model cannot be asked about nothing
            inputs = first_examples(inputs, max(real, 1))
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if not prediction_loss_only and logits is not None and labels is not None:
            logits = logits[0] if isinstance(logits, tuple) else logits
            broken = self._attack(inputs, logits, range(first, first + real))
            logits = (logits, broken.predictions(len(self._evaluated_epsilons)), broken.distances)
        return loss, *recursively_apply(partial(filled_up, batch_size=size), (logits, labels))

    def _attack(self, inputs: dict[str, Any], logits: torch.Tensor, positions: range) -> BreakingPoints:
        """Attack the first examples of a batch, as many as `positions`, whose clean logits are known.

        Adds up the passes, that which made the logits included.
        """
        inputs, count = self._prepare_inputs(dict(inputs)), len(positions)
        pixels = self.pixel_normalization.to_pixels(inputs.pop("pixel_values"))[:count]
        labels = inputs.pop("labels")[:count]
        forward = CountedForward(partial(self._forward, **inputs))
        with self._under_attack(training=False):
            broken = find_breaking_points(
                forward,
                pixels,
                labels,
                norm=self.args.norm,
                epsilons=self._evaluated_epsilons,
                tier=self.eval_tier,
                seed=self.args.seed,
                positions=positions,
                clean_predictions=logits[:count].argmax(dim=1),
            )
        total, of_batch = self._eval_passes, forward.passes
        self._eval_passes = Passes(total.forward + count + of_batch.forward, total.backward + of_batch.backward)
        return broken

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
        if not is_attacked or output.num_samples == 0:
            return
        _, predictions, distances = cast(tuple[np.ndarray, np.ndarray, np.ndarray], output.predictions)
        passes = torch.tensor([*self._eval_passes], device=self.args.device)
        passes = cast(torch.Tensor, self.accelerator.reduce(passes, "sum"))
        with self._whole_weights() as model:
            described_model = describe_model(model)
        self.robustness_report = RobustnessReport.from_predictions(
            predictions,
            cast(np.ndarray, output.label_ids),
            distances,
            norm=self.args.norm,
            epsilons=self._evaluated_epsilons,
            passes=Passes(*passes.tolist()),
            settings={
                "model": described_model,
                "dataset": {**describe_dataset(dataset), "sha256": None},
                "processor": describe_normalization(self.pixel_normalization),
                **self.evaluation_settings(),
                "batch_size": self._over_processes(self.args.eval_batch_size),  # of all processes
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
