"""From a dataset of any usual form to batches of `pixel_values` and labels."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..checks import LABEL_COLUMNS
from ..images import read_example


IMAGE_COLUMNS = ("image", "img")


class Examples:
    """Examples of a dataset with `__len__` and `__getitem__`, as the model takes them.

    An example is a dictionary with `pixel_values`, as the processor returned them, or an image that is yet to be
    processed; and with its label.

    Args:
        dataset:
            For example a `datasets.Dataset`, with or without a transform, or a `torch.utils.data.Dataset`.
        processor:
            The model's image processor.
        num_channels (`int`):
            1 turns images to grey values, any other number to RGB.
        image_column, label_column (`str`, *optional*):
            Default to the usual names: `image` or `img`, `labels` or `label`.

    Raises:
        ValueError: if the dataset is empty or cannot be indexed, or its examples lack image or label.
    """

    def __init__(
        self,
        dataset: Any,
        processor: Any,
        *,
        num_channels: int = 3,
        image_column: str | None = None,
        label_column: str | None = None,
    ):
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ValueError(
                f"`dataset` is {type(dataset).__name__}, which cannot be indexed; results are kept by position. Give "
                "a `datasets.Dataset` (not streaming) or any dataset with `__len__` and `__getitem__`."
            )
        if len(dataset) == 0:
            raise ValueError("`dataset` is empty; robustness needs at least one example.")
        self.dataset, self.processor = dataset, processor
        self.mode = "L" if num_channels == 1 else "RGB"
        example = read_example(dataset, 0)
        if not isinstance(example, Mapping):
            raise ValueError(
                f"`dataset` returns {type(example).__name__} objects; an example must be a dictionary with an image, "
                "or `pixel_values`, and a label."
            )
        self.label_column = _column("label_column", label_column, LABEL_COLUMNS, example)
        self.image_column = "pixel_values"
        if image_column is not None or "pixel_values" not in example:
            self.image_column = _column("image_column", image_column, IMAGE_COLUMNS, example)

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, positions: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """`pixel_values` of shape `(batch, channels, height, width)` and labels of shape `(batch,)`."""
        examples = [read_example(self.dataset, position) for position in positions]
        labels = [example[self.label_column] for example in examples]
        requirement = f"The column {self.label_column!r} must hold one class index per image"
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{requirement}, got {labels[0]!r} and others.") from error
        if labels.is_floating_point() or labels.dim() != 1:
            raise ValueError(f"{requirement}, got {labels.dtype} of shape {tuple(labels.shape)}.")
        images = [example[self.image_column] for example in examples]
        if self.image_column == "pixel_values":
            return torch.stack([torch.as_tensor(image) for image in images]), labels
        images = [image.convert(self.mode) if hasattr(image, "convert") else image for image in images]
        return self.processor(images, return_tensors="pt")["pixel_values"], labels


def num_image_channels(config: Any) -> int:
    """How many channels a model takes, from its configuration (timm's wrapper keeps it elsewhere); 3 if unsaid."""
    pretrained_cfg = getattr(config, "pretrained_cfg", None) or {}
    return getattr(config, "num_channels", None) or pretrained_cfg.get("input_size", [3])[0]


def _column(argument: str, given: str | None, usual: Sequence[str], example: Mapping) -> str:
    if given is not None:
        if given not in example:
            raise ValueError(f"`{argument}={given!r}` is not in the dataset's examples; they hold {sorted(example)}.")
        return given
    for name in usual:
        if name in example:
            return name
    raise ValueError(
        f"The dataset's examples hold {sorted(example)}, none of {list(usual)}; name the column with `{argument}`."
    )
