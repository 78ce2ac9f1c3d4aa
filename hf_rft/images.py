"""Images of a dataset, of which a small file may claim to be huge."""

import contextlib
import warnings
from typing import Any

import datasets
from PIL import Image


def read_example(dataset: Any, index: int) -> Any:
    """`dataset[index]`; images above Pillow's limit (about 89 million pixels) are refused before they are decoded.

    Pillow itself only warns, up to twice as many. The filter is the process's: while several threads read, it may stay
    an error.

    Raises:
        ValueError: naming the example and, if it has one, the file.
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
    """Where the images of an example were read from, as far as the dataset knows it."""
    if not isinstance(dataset, datasets.Dataset):
        return ""
    with contextlib.suppress(Exception):  # it only completes a message
        undecoded = dataset.with_format(None)
        for column, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):
                undecoded = undecoded.cast_column(column, datasets.Image(decode=False))
                if path := undecoded[index][column]["path"]:
                    return f" ({path})"
    return ""
