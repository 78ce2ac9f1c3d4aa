"""What `RobustTrainer` adds to `Trainer`'s evaluation: robust metrics and a report."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.distributed.fsdp import FSDPModule
from transformers import EvalPrediction

from ..attacks.base import Passes
from ..evaluation.cache import hash_json
from ..evaluation.evaluator import AttackedBatch, robust_metrics
from ..evaluation.margins import logit_margins
from ..evaluation.provenance import describe_model
from ..evaluation.report import RobustnessReport
from .distributed import over_processes
from .onset import MAJORITY


def check_can_evaluate(trainer: Any) -> None:
    """Refuse evaluation before training with FSDP2."""
    if trainer.is_fsdp_enabled and not isinstance(trainer.model, FSDPModule):
        raise ValueError(
            "With FSDP2 only a trained model can be evaluated, since accelerate shards a model together with its "
            "optimizer. Call `evaluate` after `train`, or start the processes without FSDP."
        )


def on_clean_logits(preprocess: Callable | None) -> Callable | None:
    """The user's `preprocess_logits_for_metrics`, applied to the clean logits only."""
    if preprocess is None:
        return None

    def preprocess_clean(logits: Any, labels: torch.Tensor | None) -> Any:
        if labels is None:  # nothing was attacked
            return preprocess(logits, labels)
        return preprocess(logits[0], labels), *logits[1:]

    return preprocess_clean


def with_robust_metrics(
    trainer: Any, compute_metrics: Callable | None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` that adds the robust metrics to those of the user's, which gets the clean logits."""

    def compute_all(evaluation: EvalPrediction) -> dict[str, float]:
        logits, predictions, _ = cast(tuple[np.ndarray, np.ndarray, np.ndarray], evaluation.predictions)
        metrics = {}
        if compute_metrics is not None:
            clean = EvalPrediction(logits, evaluation.label_ids, evaluation.inputs, evaluation.losses)
            metrics.update(compute_metrics(clean))
        epsilons, target = trainer.current_evaluator.epsilons, trainer.threat_model.epsilon
        labels = cast(np.ndarray, evaluation.label_ids)
        metrics[MAJORITY] = np.unique(labels, return_counts=True)[1].max() / len(labels)
        return metrics | robust_metrics(predictions, labels, epsilons, target)

    return compute_all


def make_report(trainer: Any, output: Any, dataset: Any, batches: list[AttackedBatch]) -> RobustnessReport | None:
    """The report of what `Trainer`'s evaluation loop returned; the previous report if nothing was attacked."""
    is_attacked = isinstance(output.predictions, tuple) and len(trainer.current_evaluator.epsilons) > 1
    if not is_attacked or output.num_samples == 0:
        return trainer.robustness_report
    logits, predictions, distances = output.predictions
    batches = gather_object(batches)
    hashes = dict(sorted(item for batch in batches for item in (batch.hashes or {}).items()))
    with trainer.classifier.whole_weights() as model:
        described_model = describe_model(model)
    evaluator = trainer.evaluator
    return RobustnessReport.from_predictions(
        predictions,
        output.label_ids,
        distances,
        norm=evaluator.norm,
        epsilons=evaluator.epsilons,
        passes=Passes(*np.sum([batch.passes for batch in batches], axis=0).tolist()),
        settings=evaluator.settings(
            model=described_model,
            dataset=dataset,
            normalization=trainer.classifier.normalization,
            batch_size=over_processes(trainer.args, trainer.args.eval_batch_size),
            sha256=hash_json(list(hashes.values())),
            image_shape=batches[0].image_shape,
        ),
        # A user's `preprocess_logits_for_metrics` may have left something else.
        margins=None if trainer.preprocess_logits_for_metrics else _margins(logits),
    )


def _margins(logits: np.ndarray) -> np.ndarray:
    return logit_margins(torch.from_numpy(logits)).double().numpy()
