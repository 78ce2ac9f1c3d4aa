"""Between a processor's normalised `pixel_values` and pixels in [0, 1], where perturbations are measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torchvision.transforms.v2 import functional as F
from transformers.image_processing_utils import BaseImageProcessor


# Allows for rounding in resizing and half precision; anything further out means a wrong processor.
RANGE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class PixelNormalization:
    """The affine map `pixel_values = (pixels - mean) / std` of an image processor, in pixels scaled to [0, 1].

    Called with images, it is the simplest such processor. timm's values are the `mean` and `std` of
    `timm.data.resolve_model_data_config(model)`.

    Args:
        mean (`float` or `Sequence[float]`):
            One value per channel, or one for all channels.
        std (`float` or `Sequence[float]`):
            The same for the standard deviation; positive.
        source (`str`):
            The processor's own values, for error messages.
        rescales (`bool`):
            Whether the processor itself divides bytes by 255. If not, a batch without any pixel above 1/255 is
            refused: it was already scaled.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str = field(default="", repr=False)
    rescales: bool = field(default=True, repr=False)
    # Mean and std on each device seen so far: creating them on every call would wait for the device.
    _tensors: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, _per_channel(self, name, getattr(self, name)))
        if not self.source:
            object.__setattr__(self, "source", f"mean={list(self.mean)}, std={list(self.std)}")

    def __call__(self, images: Sequence[Any], return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        """Normalise images of one size, as an image processor that does not resize.

        Args:
            images (`Sequence` of PIL images, arrays or tensors):
                Arrays of shape `(height, width, channels)`, tensors of shape `(channels, height, width)`; bytes, or
                floats in [0, 1].
            return_tensors (`str`, *optional*):
                As for other processors; it is always `"pt"`.

        Returns:
            `dict`: `pixel_values` of shape `(batch, channels, height, width)`, float32.

        Raises:
            ValueError: if the images differ in size.
        """
        pixels = [F.to_dtype(F.to_image(image), torch.float32, scale=True) for image in images]
        shapes = sorted({tuple(image.shape) for image in pixels})
        if len(shapes) > 1:
            raise ValueError(f"the images have the shapes {shapes[:3]}; resize them to one size, that of the model")
        return {"pixel_values": self.from_pixels(torch.stack(pixels))}

    @classmethod
    def from_processor(
        cls, processor: BaseImageProcessor, *, argument: str = "processing_class"
    ) -> "PixelNormalization":
        """Read the map from any transformers image processor, or from timm's wrapper (its `data_config`).

        Args:
            processor:
                The image processor.
            argument (`str`, *optional*):
                Name of the argument that holds it, for messages.

        Raises:
            ValueError: if `processor` is not an image processor, or normalises by unknown values.
        """
        data_config = getattr(processor, "data_config", None)
        if data_config is not None:  # timm: images are scaled to [0, 1] by definition, then normalised
            values = {"mean": data_config.get("mean"), "std": data_config.get("std")}
            mean, std = (_per_channel(processor, name, value) for name, value in values.items())
            return cls(mean, std, source=f"timm data_config mean={values['mean']}, std={values['std']}")
        if not hasattr(processor, "do_rescale") and not hasattr(processor, "do_normalize"):
            raise ValueError(
                f"`{argument}={type(processor).__name__}` is not an image processor, so hf_rft cannot know how "
                "pixels are normalised; pass `AutoImageProcessor.from_pretrained(...)` or, for a model of your own, "
                "for example `ViTImageProcessor(do_resize=False, image_mean=[...], image_std=[...])`."
            )
        # Processors first map a byte b = 255 p to b * rescale_factor + offset, then normalise.
        scale, offset, source = 255.0, 0.0, "do_rescale=False"
        if getattr(processor, "do_rescale", False):
            scale = 255.0 * processor.rescale_factor
            offset = -1.0 if getattr(processor, "rescale_offset", False) else 0.0
            source = f"rescale_factor={processor.rescale_factor}"
        mean, std = (0.0,), (1.0,)
        if getattr(processor, "do_normalize", False):
            mean = _per_channel(processor, "image_mean", getattr(processor, "image_mean", None))
            std = _per_channel(processor, "image_std", getattr(processor, "image_std", None))
            source += f", image_mean={list(mean)}, image_std={list(std)}"
        else:
            source += ", do_normalize=False"
        if getattr(processor, "include_top", False):  # EfficientNet divides by the std once more
            again = _per_channel(processor, "image_std", getattr(processor, "image_std", None))
            mean, std = _broadcast(mean, again), _broadcast(std, again)
            std = tuple(value * more for value, more in zip(std, again, strict=True))
        rescales = bool(getattr(processor, "do_rescale", False))
        return cls(tuple((m - offset) / scale for m in mean), tuple(s / scale for s in std), source, rescales)

    def to_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Undo the normalisation.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`):
                What the processor returned.

        Returns:
            `torch.Tensor`: pixels in [0, 1], float32 or wider.

        Raises:
            ValueError: if the result leaves [0, 1] by more than 1e-3; the message says which processor value is off.
        """
        mean, std = self._mean_and_std(pixel_values)
        pixels = pixel_values.to(mean.dtype) * std + mean
        lowest, highest = torch.stack(torch.aminmax(pixels.detach())).tolist()
        # Half precision rounds pixel values, which may reach (|mean| + 1) / std, by more than the tolerance.
        epsilon = torch.finfo(pixel_values.dtype).eps if pixel_values.is_floating_point() else 0.0
        rounding = epsilon * (max(map(abs, self.mean)) + max(self.std))
        tolerance = max(RANGE_TOLERANCE, rounding)
        in_range = lowest >= -tolerance and highest <= 1 + tolerance  # False for NaN
        if not in_range or (not self.rescales and 0 < highest <= 1.01 / 255):
            raise ValueError(self._out_of_range(pixel_values, lowest, highest))
        return pixels.clamp(0, 1)

    def from_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise `pixels` in [0, 1], shape `(batch, channels, height, width)`, as the processor would."""
        mean, std = self._mean_and_std(pixels)
        return (pixels - mean) / std

    def _mean_and_std(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        channels = images.shape[1]
        if len(self.mean) not in (1, channels) or len(self.std) not in (1, channels):
            raise ValueError(
                f"Images have {channels} channel(s), the processor normalises {max(len(self.mean), len(self.std))} "
                f"({self.source}); convert the images (for example to RGB) or use a processor made for them."
            )
        key = (images.device, torch.promote_types(images.dtype, torch.float32))
        if key not in self._tensors:
            with torch.inference_mode(False):  # inference tensors could not take part in a later attack
                self._tensors[key] = tuple(
                    torch.tensor(values, device=key[0], dtype=key[1]).reshape(1, -1, 1, 1)
                    for values in (self.mean, self.std)
                )
        return self._tensors[key]

    def _out_of_range(self, pixel_values: torch.Tensor, lowest: float, highest: float) -> str:
        raw_lowest, raw_highest = pixel_values.min().item(), pixel_values.max().item()
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            broken = (~pixel_values.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
            kind = "NaN" if pixel_values.isnan().any() else "infinite"
            hint = f"There are {kind} values in the images {broken[:5]} of this batch; leave them out."
        elif not self.rescales and highest <= 1:
            hint = "With `do_rescale=False` bytes 0..255 are expected; set `do_rescale=True`, or pass bytes."
        elif raw_lowest >= 0 and 2 < raw_highest <= 255:
            hint = "They look like bytes 0..255: the processor's `do_rescale` or `rescale_factor` was not applied."
        elif raw_lowest >= 0 and raw_highest <= 1:
            hint = (
                "They look like pixels in [0, 1] already: apply the processor's normalisation to them, or pass a "
                "processor with `do_normalize=False`."
            )
        else:
            hint = "The data was normalised with another `image_mean`, `image_std` or `rescale_factor` than these."
        return (
            f"`pixel_values` in [{raw_lowest:.4g}, {raw_highest:.4g}] become pixels in [{lowest:.4g}, {highest:.4g}] "
            f"when the processor ({self.source}) is undone, but pixels must lie in [0, 1]. {hint}"
        )


def _broadcast(values: tuple[float, ...], like: tuple[float, ...]) -> tuple[float, ...]:
    return values * len(like) if len(values) == 1 else values


def _per_channel(processor, name: str, value) -> tuple[float, ...]:
    if value is None:
        raise ValueError(
            f"{type(processor).__name__} normalises images but its `{name}` is None; set `{name}` to the values the "
            "model was trained with, or `do_normalize=False` if there was none."
        )
    value = value.tolist() if hasattr(value, "tolist") else value
    try:
        values = tuple(float(v) for v in (value if isinstance(value, (list, tuple)) else [value]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{type(processor).__name__} has `{name}={value}`; give one number per channel.") from error
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"{type(processor).__name__} has `{name}={value}`; give one finite number per channel.")
    if "std" in name and min(values) <= 0:
        raise ValueError(f"{type(processor).__name__} has `{name}={value}`; standard deviations must be positive.")
    return values
