"""Batches of `pixel_values` and labels from datasets of all common kinds."""

import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsInt, cast

import datasets
import torch
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from .images import explain, num_frames, read_example, to_mode
from .labels import LABEL_COLUMNS


logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "img")


class Examples:
    """Examples of a dataset with `__len__` and `__getitem__`, or of a stream, ready for the model.

    An example is a dictionary with a label, and with either `pixel_values` from the processor or an image that is yet
    to be processed.

    Args:
        dataset:
            For example a `datasets.Dataset`, with or without a transform, or a `torch.utils.data.Dataset`. A
            `datasets.IterableDataset` is read once, to its end, into a temporary folder.
        processor:
            The model's image processor.
        num_channels (`int`):
            1 converts images to greyscale, any other number to RGB; see images.py for transparency and 16 bits.
        image_column, label_column (`str`, *optional*):
            Default to the usual names: `image` or `img`, `labels` or `label`.

    Raises:
        ValueError: if the dataset is empty or cannot be indexed, or its examples lack an image or a label.
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
        if isinstance(dataset, datasets.IterableDataset):
            folder = tempfile.mkdtemp(prefix="hf_rft-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            dataset = _stored(dataset, folder)
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ValueError(
                f"`dataset` is {type(dataset).__name__}, which cannot be indexed, but results are kept by position. "
                "Give a dataset or stream of the package `datasets`, or any dataset with `__len__` and `__getitem__`."
            )
        if len(dataset) == 0:
            raise ValueError("`dataset` is empty; robustness needs at least one example.")
        self.dataset, self.processor = dataset, processor
        self.mode = "L" if num_channels == 1 else "RGB"
        self._warned_of_frames = False
        example = self._example(0)
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
        """`pixel_values` of shape `(batch, channels, height, width)` and labels of shape `(batch,)`.

        Raises:
            ValueError: naming the column and the example, if one has no usable image or label.
        """
        positions = list(positions)
        examples = [self._example(position) for position in positions]
        labels = [example[self.label_column] for example in examples]
        requirement = f"The column {self.label_column!r} must hold one class index per image"
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            wrong = next((place for place, label in enumerate(labels) if not isinstance(label, SupportsInt)), 0)
            raise ValueError(f"{requirement}; example {positions[wrong]} has {labels[wrong]!r}.") from error
        if labels.is_floating_point() or labels.dim() != 1:
            raise ValueError(f"{requirement}, got {labels.dtype} of shape {tuple(labels.shape)}.")
        images = [example[self.image_column] for example in examples]
        if self.image_column == "pixel_values":
            return self._stacked(images, positions), labels
        images = [self._converted(image, position) for image, position in zip(images, positions, strict=True)]
        try:
            return self.processor(images, return_tensors="pt")["pixel_values"], labels
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"The processor {type(self.processor).__name__} cannot take the column {self.image_column!r} of the "
                f"examples {positions[0]} to {positions[-1]}: {error}"
            ) from error

    def _example(self, position: int) -> Any:
        try:
            return read_example(self.dataset, position)
        except (OSError, SyntaxError) as error:  # raised when decoding a damaged image
            raise ValueError(
                f"Example {position} of `dataset` cannot be read: {explain(error)}. Repair it, or leave it out."
            ) from error

    def _converted(self, image: Any, position: int) -> Any:
        where = f"Example {position} of `dataset`, column {self.image_column!r}"
        if image is None:
            raise ValueError(f"{where}: the image is missing; leave the example out.")
        if not isinstance(image, Image.Image):
            return image
        if not self._warned_of_frames and num_frames(image) > 1:
            self._warned_of_frames = True
            logger.warning("%s has %d frames; only the first frame of such images is used.", where, num_frames(image))
        try:
            return to_mode(image, self.mode)
        except ValueError as error:
            raise ValueError(f"{where}: {error}.") from error

    def _stacked(self, images: Sequence[Any], positions: Sequence[int]) -> torch.Tensor:
        tensors = []
        for image, position in zip(images, positions, strict=True):
            where = f"Example {position} of `dataset`, column 'pixel_values',"
            try:
                tensor = torch.as_tensor(image)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{where} is not numeric ({error}); give what the processor returns.") from error
            if tensor.dim() != 3 or (tensors and tensor.shape != tensors[0].shape):
                expected = "(channels, height, width)" if not tensors else f"{tuple(tensors[0].shape)} like the others"
                raise ValueError(f"{where} has the shape {tuple(tensor.shape)}, not {expected}.")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"{where} holds NaN or infinite values; repair it, or leave it out.")
            tensors.append(tensor)
        return torch.stack(tensors)


def _stored(stream: datasets.IterableDataset, folder: str) -> datasets.Dataset:
    """The examples of a stream on disk, since attacks and trust checks read them again."""

    def examples() -> Iterator[dict[str, Any]]:
        for example in stream.with_format(None):
            # A copy has forgotten that it was a JPEG file, as which `datasets` would compress it once more.
            yield {name: each.copy() if isinstance(each, Image.Image) else each for name, each in example.items()}

    options = {"features": stream.features, "cache_dir": folder, "fingerprint": "stream"}
    try:
        return cast(datasets.Dataset, datasets.Dataset.from_generator(examples, **options))
    except (DatasetGenerationError, ValueError) as error:  # the former says nothing itself
        raise ValueError(f"`dataset`, a stream, cannot be read: {explain(error.__cause__ or error)}.") from error


def num_image_channels(config: Any) -> int:
    """Number of input channels in a model's configuration (timm's wrapper keeps it elsewhere); 3 by default."""
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
