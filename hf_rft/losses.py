"""Robust training losses: pure functions of logits, one value per example; the caller takes the mean.

Shapes are `(batch, classes)` for logits and `(batch,)` for labels and results. Labels may also be soft (not for MART):
probabilities of shape `(batch, classes)`. Everything is computed in float32 or wider, with a log-softmax on both sides
of a Kullback-Leibler divergence, so that zero probabilities cause no NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from .attacks.base import at_least_float32, kl_divergence, log_softmax


# The published values, for training from scratch on CIFAR-10.
TRADES_WEIGHT = 6.0
MART_WEIGHT = 6.0


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    logits = at_least_float32(logits)
    labels = labels.to(logits.dtype) if labels.is_floating_point() else labels
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def standard_loss(
    clean_logits: torch.Tensor,
    adversarial_logits: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    weight: float | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Plain fine-tuning: the cross-entropy of the clean examples. `adversarial_logits` and `weight` are not used."""
    return _cross_entropy(clean_logits, labels, label_smoothing)


def at_loss(
    clean_logits: torch.Tensor | None,
    adversarial_logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    weight: float | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Adversarial training: the cross-entropy of the adversarial examples (Madry et al. 2018,
    https://huggingface.co/papers/1706.06083, eq. 2.1). `clean_logits` and `weight` are not used.
    """
    return _cross_entropy(adversarial_logits, labels, label_smoothing)


def trades_loss(
    clean_logits: torch.Tensor,
    adversarial_logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    weight: float | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """`CE(clean) + weight * KL(p(clean) || p(adversarial))` (Zhang et al. 2019, https://huggingface.co/papers/1901.08573,
    eq. 5). Its attack increases the same divergence.

    Args:
        weight (`float`, *optional*):
            The paper's `1 / lambda`; 1 favours clean accuracy. Defaults to the published 6.
        label_smoothing (`float`, *optional*, defaults to 0):
            Label smoothing of the clean cross-entropy, as in `torch.nn.functional.cross_entropy`.
    """
    weight = TRADES_WEIGHT if weight is None else weight
    clean = standard_loss(clean_logits, None, labels, label_smoothing=label_smoothing)
    return clean + weight * kl_divergence(log_softmax(clean_logits), log_softmax(adversarial_logits))


def mart_loss(
    clean_logits: torch.Tensor,
    adversarial_logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    weight: float | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Misclassification-aware training (Wang et al. 2020, "Improving adversarial robustness requires revisiting
    misclassified examples", eq. 11): boosted cross-entropy of the adversarial example, plus the divergence between
    clean and adversarial prediction, weighted by how unsure the clean one is:

    `CE(adv) - log(1.0001 - max_{k != y} p_k(adv)) + weight * KL(p(clean) || p(adv)) * (1 - p_y(clean))`

    Args:
        weight (`float`, *optional*):
            The paper's `lambda`. Defaults to the published 6.

    Raises:
        ValueError: if `label_smoothing` is not 0 or labels are soft: the boosted cross-entropy defines neither.
    """
    if labels.is_floating_point():
        raise ValueError("`robust_loss='mart'` does not define soft labels; give one class per image.")
    if label_smoothing:
        raise ValueError(
            f"`robust_loss='mart'` does not define `label_smoothing_factor={label_smoothing}`; set it to 0."
        )
    weight = MART_WEIGHT if weight is None else weight
    log_clean, log_adversarial = log_softmax(clean_logits), log_softmax(adversarial_logits)
    others = log_adversarial.scatter(1, labels.unsqueeze(1), -torch.inf)
    strongest_wrong = others.amax(dim=1).exp()
    boosted = F.nll_loss(log_adversarial, labels, reduction="none") - torch.log(1.0001 - strongest_wrong)
    unsure = 1 - log_clean.gather(1, labels.unsqueeze(1)).squeeze(1).exp()
    return boosted + weight * kl_divergence(log_clean, log_adversarial) * unsure


@dataclass(frozen=True)
class RobustLoss:
    """A loss together with the inputs it needs.

    Args:
        function (`Callable`):
            `(clean_logits, adversarial_logits, labels, *, weight, label_smoothing) -> (batch,)`.
        needs_clean (`bool`):
            Whether it uses the clean logits.
        needs_adversarial (`bool`):
            Whether it uses the adversarial logits; if not, no attack runs.
        attack_objective (`"cross_entropy"` or `"kl"`):
            What its attack increases: the cross-entropy of the true class, or the divergence from the clean
            prediction.
        weight (`float`, *optional*):
            The published weight of its regulariser; None if it has none.
    """

    function: Callable[..., torch.Tensor]
    needs_clean: bool = True
    needs_adversarial: bool = True
    attack_objective: Literal["cross_entropy", "kl"] = "cross_entropy"
    weight: float | None = None

    def __call__(
        self,
        clean_logits: torch.Tensor | None,
        adversarial_logits: torch.Tensor,
        labels: torch.Tensor,
        *,
        weight: float | None = None,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Loss per example; `weight` defaults to the published one."""
        weight = self.weight if weight is None else weight
        return self.function(clean_logits, adversarial_logits, labels, weight=weight, label_smoothing=label_smoothing)

    def logits(
        self, model: Callable, pixel_values: torch.Tensor, adversarial_values: torch.Tensor | None, **inputs
    ) -> tuple[Any, torch.Tensor | None, torch.Tensor]:
        """The outputs of `model` and the clean and adversarial logits, from the single forward pass that DDP expects.

        Args:
            model (`Callable`):
                A transformers image classifier, possibly wrapped.
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`):
                The clean images.
            adversarial_values (`torch.Tensor`, *optional*):
                The adversarial images, of the same shape; None at epsilon 0, where the two coincide.
        """
        if adversarial_values is None:
            outputs = model(pixel_values=pixel_values, **inputs)
            return outputs, outputs.logits, outputs.logits
        if self.needs_clean:
            outputs = model(pixel_values=torch.cat([pixel_values, adversarial_values]), **inputs)
            return outputs, *outputs.logits.chunk(2)
        outputs = model(pixel_values=adversarial_values, **inputs)
        return outputs, None, outputs.logits


# Names for the command line. In Python, a `RobustLoss` or any function with the same arguments will do.
LOSSES = {
    "standard": RobustLoss(standard_loss, needs_adversarial=False),
    "at": RobustLoss(at_loss, needs_clean=False),
    "trades": RobustLoss(trades_loss, attack_objective="kl", weight=TRADES_WEIGHT),
    "mart": RobustLoss(mart_loss, weight=MART_WEIGHT),
}
