"""Turns the contents of an image file into a classifier's input, or raises an error that names the image.

Decisions:

* Transparent pixels become white, as in a browser (the colours hidden beneath mean nothing).
* 16-bit greyscale is scaled to 8 bits; PIL would clip it.
* Only the first frame of an animation is used, with a warning.
* Pixels without a known white level (32-bit integers, floats) are refused, and so is a small file that claims to be a
  huge image.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
from PIL import Image


logger = logging.getLogger(__name__)

# Images per task of a decoding thread.
CHUNK = 64


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """`image` as `"RGB"` or `"L"`, with 8 bits per channel.

    Raises:
        ValueError: if its pixels have no defined white level, or it cannot be converted to the mode.
    """
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels have the mode {image.mode!r} (32 bits), which does not say which value is white; save it "
            "with 8 or 16 bits per channel"
        )
    try:
        if image.has_transparency_data:
            opaque = Image.new("RGBA", image.size, "white")
            opaque.alpha_composite(image.convert("RGBA"))
            image = opaque
        return image.convert(mode)
    except (ValueError, OSError) as error:
        raise ValueError(f"its mode {image.mode!r} cannot be converted to {mode!r}; save it as RGB") from error


def num_frames(image: Image.Image) -> int:
    """More than 1 for animations and multi-page files. The preview that some cameras append (MPO) does not count."""
    return 1 if getattr(image, "format", None) == "MPO" else getattr(image, "n_frames", 1)


def check_images(where: str, dataset: datasets.Dataset, column: str, positions: Iterable[int]) -> None:
    """Decode images once, to find damaged ones before the work starts rather than halfway through.

    Args:
        where (`str`):
            Prefix of the messages.
        positions (`Iterable[int]`):
            Which images to check.

    Raises:
        ValueError: naming the first image that is missing, damaged or cannot be converted.
    """
    images = dataset.select_columns([column])
    positions = list(positions)
    chunks = [positions[first : first + CHUNK] for first in range(0, len(positions), CHUNK)]
    animated: list[int] = []
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        for found in pool.map(lambda chunk: list(_look_at(where, images, column, chunk)), chunks):
            animated += found
    if animated:
        logger.warning(
            "%s: %d images have several frames (example %d first); only their first frame is used.",
            where,
            len(animated),
            animated[0],
        )


def _look_at(where: str, images: datasets.Dataset, column: str, positions: list[int]) -> Iterator[int]:
    """Yield the positions of animations."""
    for position in positions:
        try:
            image = read_example(images, position)[column]
            if image is None:
                raise ValueError("it is missing")
            frames = num_frames(image)
            to_mode(image, "RGB")
        except Exception as error:  # decoders may raise anything
            raise ValueError(
                f"{where}: example {position}{_file(images, position)} has no usable image in column "
                f"{column!r}: {explain(error)}. Repair it, or leave it out."
            ) from error
        if frames > 1:
            yield position


def read_example(dataset: Any, index: int) -> Any:
    """`dataset[index]`, refusing images above Pillow's limit (about 89 million pixels) before they are decoded.

    Pillow itself only warns up to twice that number. Warning filters belong to the whole process: if several threads
    read at once, the warning may remain an error.

    Raises:
        ValueError: naming the example and, if known, its file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return dataset[index]
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(
                f"Example {index} of the dataset{_file(dataset, index)} is not decoded: {str(error).rstrip('.')}. "
                "Scale the image down or leave it out; if it is meant to be that large, raise "
                "`PIL.Image.MAX_IMAGE_PIXELS`."
            ) from error


def _file(dataset: Any, index: int) -> str:
    """The file an example's image was read from, in parentheses, if the dataset knows it."""
    if not isinstance(dataset, datasets.Dataset):
        return ""
    with contextlib.suppress(Exception):  # only a detail of a message
        undecoded = dataset.with_format(None)
        for column, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):
                undecoded = undecoded.cast_column(column, datasets.Image(decode=False))
                if path := undecoded[index][column]["path"]:
                    return f" ({path})"
    return ""


def explain(error: Exception) -> str:
    """The error's message, prefixed with its type unless it is a `ValueError` that speaks for itself."""
    message = str(error).rstrip(".")
    return message if type(error) is ValueError and message else f"{type(error).__name__}: {message}"
