"""How many passes through the model something costs."""

import torch

from ..attacks.base import Forward, Passes


class CountedForward:
    """A `forward` that counts each image it is called with, and each image a gradient comes back for."""

    def __init__(self, forward: Forward):
        self.forward = forward
        self.forward_count = self.backward_count = 0

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        logits = self.forward(pixels)
        self.forward_count += len(pixels)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        return logits

    def _count_backward(self, gradient: torch.Tensor) -> None:
        self.backward_count += len(gradient)

    @property
    def passes(self) -> Passes:
        """Sums over examples."""
        return Passes(self.forward_count, self.backward_count)
