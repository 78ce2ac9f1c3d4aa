"""What `RobustTrainer` measures for its alarms (alarms.py) while it trains."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import torch
from transformers import PreTrainedModel, Trainer

from .alarms import AlarmCallback
from .callbacks import EpsilonScheduleCallback
from .interruption import InterruptionCallback
from .losses import RobustLoss
from .noise import PROBE, example_generators
from .pixel_space import PixelNormalization
from .probe import probe, probe_examples
from .threat_model import ThreatModel
from .training_args import RobustTrainingArguments


class AlarmsMixin(Trainer):
    """The part of [`RobustTrainer`] that notices when a run is failing."""

    args: RobustTrainingArguments
    model: PreTrainedModel
    pixel_normalization: PixelNormalization
    robust_loss: RobustLoss
    interruption: InterruptionCallback
    _forward: Callable[..., torch.Tensor]
    _under_attack: Callable[..., AbstractContextManager]
    _folded: Callable[[], AbstractContextManager]
    _loss_weight: float | None
    _scheduled_threat_model: ThreatModel
    _epsilon_callback: EpsilonScheduleCallback | None
    _probed_batches: list[dict[str, Any]] | None = None
    # Of the adversarial training examples since the last log: how many were classified right, of how many. The first
    # is a tensor on the device once training has begun, looked at only when something is logged.
    _train_right: Any = 0
    _train_seen: int = 0

    def _make_alarm_callback(self) -> AlarmCallback:
        dataset = self.eval_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()), None)
        return AlarmCallback(
            num_classes=self.model.config.num_labels,
            chance_loss=self._chance_loss,
            probe=self._probe,
            record=self._record,
            interrupt=lambda error: self.interruption.request(error),
            num_eval_examples=len(dataset) if hasattr(dataset, "__len__") else None,  # pyright: ignore[reportArgumentType]
            prefix=self._eval_prefix,
            epsilon_grows=lambda: self._epsilon_callback is not None and self._epsilon_callback.grows(self.state),
        )

    @property
    def _eval_prefix(self) -> str:
        """Of the metrics' names in the log; of several validation sets the first counts."""
        names = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
        return f"eval_{names[0]}" if names else "eval"

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self._train_right, self._train_seen = 0, 0  # an earlier training may have ended between two logs
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @torch.no_grad()
    def _chance_loss(self) -> float:
        """Training loss of a model that gives all classes the same probability."""
        num_classes = self.model.config.num_labels
        labels = torch.arange(min(num_classes, 32), device=self.args.device)
        logits = torch.zeros(len(labels), num_classes, device=self.args.device)
        loss = self.robust_loss.function(
            logits, logits, labels, weight=self._loss_weight, label_smoothing=self.args.label_smoothing_factor
        )
        return loss.mean().item()

    def _record(self, metrics: dict[str, float], message: str | None = None) -> None:
        """Log numbers; a text is kept in the history only, for tools that read logs want numbers."""
        position, should_log = len(self.state.log_history), self.control.should_log
        self.log(metrics)
        self.control.should_log = should_log  # the log that is due is another one
        if message is not None:
            self.state.log_history[position]["message"] = message

    # --- Training accuracy ---

    def _count_right(self, adversarial_logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Remember how many of a micro-batch are classified right, without waiting for the device."""
        self._train_right = self._train_right + (adversarial_logits.detach().argmax(dim=1) == labels).sum()
        self._train_seen += len(labels)

    def _pop_adversarial_accuracy(self) -> dict[str, float]:
        """Share classified right since the last log, over all processes; empty if there was no training step."""
        right, seen = self._train_right, self._train_seen
        if not isinstance(right, torch.Tensor):
            return {}
        self._train_right, self._train_seen = 0, 0
        counts = torch.stack([right, torch.full_like(right, seen)])
        right, seen = cast(torch.Tensor, self.accelerator.reduce(counts, "sum")).tolist()
        return {"adversarial_accuracy": right / seen}

    # --- Probe ---

    def _probe(self) -> dict[str, float]:
        """[`probe`] at the current epsilon; every process looks at the same examples, and all get the same shares."""
        if self._probed_batches is None:
            self._probed_batches = self._make_probed_batches()
        threat_model = self._scheduled_threat_model
        found: dict[str, list[torch.Tensor]] = {}
        first = 0
        for batch in self._probed_batches:
            inputs = self._prepare_inputs(dict(batch))
            pixels, labels = self.pixel_normalization.to_pixels(inputs.pop("pixel_values")), inputs.pop("labels")
            generator = example_generators(pixels.device, range(first, first + len(labels)), PROBE, self.args.seed)
            first += len(labels)
            with self._under_attack(training=False), self._folded():
                of_batch = probe(
                    partial(self._forward, **inputs),
                    pixels,
                    labels,
                    threat_model=threat_model,
                    random_start=self.args.attack_random_start,
                    generator=generator,
                )
            for name, values in of_batch.items():
                found.setdefault(name, []).append(values)
        if not found:
            return {}
        # Rounding may differ between devices; the mean over processes is the same number on all of them.
        shares = torch.stack([torch.cat(values).double().mean() for values in found.values()]).float()
        shares = cast(torch.Tensor, self.accelerator.reduce(shares, "mean")).tolist()
        return {
            "probe_epsilon": float(threat_model.epsilon),
            **{f"probe_{name}": share for name, share in zip(found, shares, strict=True)},
        }

    def _make_probed_batches(self) -> list[dict[str, Any]]:
        examples = probe_examples(self.train_dataset, self.args.seed)
        collate = self._get_collator_with_removed_columns(self.data_collator, description="probe")
        size = self._train_batch_size
        return [collate(examples[start : start + size]) for start in range(0, len(examples), size)]
