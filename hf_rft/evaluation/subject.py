"""The model that is evaluated, as functions from pixels to logits."""

import contextlib
from collections.abc import Mapping, Sequence

import torch

from ..model_state import in_memory_format
from ..pixel_space import PixelNormalization
from .examples import Examples


class Subject:
    """A model with the normalisation of its processor.

    Args:
        model (`torch.nn.Module`):
            Maps `pixel_values` to logits, or to an output or dictionary that holds `logits`.
        normalization ([`PixelNormalization`]):
            Of its processor.
        autocast_dtype (`torch.dtype`, *optional*):
            Precision of [`Subject.crafting`]; None for the model's own.
    """

    def __init__(self, model: torch.nn.Module, normalization: PixelNormalization, autocast_dtype: torch.dtype | None):
        self.model, self.normalization, self.autocast_dtype = model, normalization, autocast_dtype
        parameter = next(model.parameters(), torch.empty(0))
        self.device, self.dtype = parameter.device, parameter.dtype

    def exact(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits in the model's own precision, whatever surrounds the call."""
        with torch.autocast(self.device.type, enabled=False):
            return self._logits(pixels)

    def crafting(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits in the precision that attacks use."""
        with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return self._logits(pixels)

    def load(self, examples: Examples, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels in [0, 1] and labels, on the model's device."""
        pixel_values, labels = examples.batch(positions)
        return self.normalization.to_pixels(pixel_values.to(self.device)), labels.to(self.device)

    def in_fast_format(self, pixels: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """Convolutions in channels_last while they run on a CPU, where it is up to 1.5 times as fast and never slower.

        A rule rather than a measurement: rounding differs between the formats, and a number must depend neither on
        what else the machine was doing, nor on the process, nor on whether the run was resumed. A model whose code
        cannot take channels_last images, as `pixels` show, keeps its format; so do models on other devices.
        """
        if self.device.type != "cpu" or not any(parameter.dim() == 4 for parameter in self.model.parameters()):
            return contextlib.nullcontext()
        try:
            with in_memory_format(self.model, torch.channels_last), torch.enable_grad():
                leaf = pixels.detach().requires_grad_()
                torch.autograd.grad(self.exact(leaf).sum(), leaf)
        except RuntimeError:  # `view`, for one
            return contextlib.nullcontext()
        return in_memory_format(self.model, torch.channels_last)

    def _logits(self, pixels: torch.Tensor) -> torch.Tensor:
        outputs = self.model(self.normalization.from_pixels(pixels).to(self.dtype))
        if isinstance(outputs, Mapping):
            logits = outputs.get("logits")
        else:
            logits = outputs if isinstance(outputs, torch.Tensor) else getattr(outputs, "logits", None)
        if logits is None or logits.dim() != 2 or logits.shape[1] < 2:
            shape = "no `logits`" if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise ValueError(
                f"`model` returned {shape}; an image classifier returns logits of shape (batch, classes), with at "
                "least 2 classes."
            )
        return logits
