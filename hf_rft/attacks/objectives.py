"""What an attack maximises: functions `(logits, labels) -> one value per example`.

Shapes are `(batch, classes)` for logits and `(batch,)` for labels and results. Computed in float32 at least, so that
autocast does not round a margin to zero.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F


Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _true_and_other_logits(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The true class's logit, and all logits with that one at minus infinity."""
    logits = at_least_float32(logits)
    labels = labels.unsqueeze(1)
    # Not by `F.one_hot`, which looks at the largest label: the CPU would wait for the device in every step.
    return logits.gather(1, labels).squeeze(1), logits.scatter(1, labels, -torch.inf)


def log_odds(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-odds that the true class is wrong, `logsumexp of the others - true logit`.

    Cross-entropy is `log(1 + exp(log_odds))`. It rises with the log-odds, so that to increase one is to increase the
    other, and gradients have the same direction. But its own gradient vanishes in float32 once the true class is
    certain (a lead of 100 in the logits), and a confident model looks robust.
    """
    true_logit, others = _true_and_other_logits(logits, labels)
    return others.logsumexp(dim=1) - true_logit


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Largest other logit minus the true one: positive exactly when the example is misclassified."""
    true_logit, others = _true_and_other_logits(logits, labels)
    return others.amax(dim=1) - true_logit


def dlr(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Difference of logits ratio: the margin over the gap between first and third logit (Croce and Hein 2020, eq. 6).

    Blind to the scale of the logits, which log-odds are not. With two classes there is no third logit: the plain
    margin is used.
    """
    if logits.shape[1] < 3:
        return margin(logits, labels)
    top = at_least_float32(logits).topk(3, dim=1).values
    # The bound keeps the gradient of tied logits finite in float16.
    return margin(logits, labels) / (top[:, 0] - top[:, 2]).clamp_min(1e-4)


class Lead:
    """Lead of the logit of a target class over the true one.

    Args:
        targets (`torch.Tensor` of shape `(batch,)`):
            Class that each example shall be taken for.
    """

    def __init__(self, targets: torch.Tensor):
        self.targets = targets

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = at_least_float32(logits)
        return (logits.gather(1, self.targets.unsqueeze(1)) - logits.gather(1, labels.unsqueeze(1))).squeeze(1)


class TargetedDLR(Lead):
    """[`Lead`] over the gap between the first logit and the mean of the third and fourth.

    Croce and Hein 2020, eq. 7. With fewer than four classes there is no fourth logit: the plain lead is used.
    """

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = at_least_float32(logits)
        lead = super().__call__(logits, labels)
        if logits.shape[1] < 4:
            return lead
        top = logits.topk(4, dim=1).values
        return lead / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2).clamp_min(1e-4)


class KLDivergence:
    """`KL(p || softmax(logits))` to a fixed distribution `p`, here the model's own on the clean images (TRADES).

    Args:
        clean_logits (`torch.Tensor` of shape `(batch, classes)`):
            Computed once; the attack's steps all compare with it.
    """

    def __init__(self, clean_logits: torch.Tensor):
        self.log_probabilities = F.log_softmax(at_least_float32(clean_logits.detach()), dim=1)

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        log_probabilities = F.log_softmax(at_least_float32(logits), dim=1)
        return F.kl_div(log_probabilities, self.log_probabilities, reduction="none", log_target=True).sum(dim=1)
