"""Common corruptions: 15 kinds, each at 5 severities.

Hendrycks and Dietterich 2019, "Benchmarking neural network robustness to common corruptions and perturbations"
(https://huggingface.co/papers/1903.12261), with the parameters for ImageNet. The images are made by the package
`imagecorruptions-imaug`, the maintained copy of `imagecorruptions`.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
import torch.nn.functional as F

from ..utils.noise import CORRUPTION, mix_seed


# By group, in the order of the paper.
KINDS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
SEVERITIES = (1, 2, 3, 4, 5)
PACKAGE = "imagecorruptions-imaug"
# The package takes no smaller images.
SMALLEST = 32


def check_installed() -> None:
    """Refuse a missing package, and the older one, which has the same module."""
    try:
        version(PACKAGE)
    except PackageNotFoundError as error:
        raise ImportError('Common corruptions need another package: `pip install "hf_rft[corruptions]"`.') from error


def corrupt(pixels: torch.Tensor, kind: str, severity: int, *, seed: int, positions: Sequence[int]) -> torch.Tensor:
    """Corrupted images, in steps of 1/255.

    The parameters are lengths in pixels, so small images suffer more: compare models at one size. Sides shorter than
    32 are filled up with their borders for the corruption.

    Args:
        pixels (`torch.Tensor` of shape `(batch, channels, height, width)`):
            Images with one or three channels, pixels in [0, 1].
        kind (`str`), severity (`int`):
            From `KINDS` and `SEVERITIES`.
        seed, positions:
            An image's noise depends on the seed, kind, severity and its position in the dataset.
    """
    number = [each for kinds in KINDS.values() for each in kinds].index(kind)
    height, width = pixels.shape[-2:]
    below, right = max(SMALLEST - height, 0), max(SMALLEST - width, 0)
    images = F.pad(pixels.float().cpu(), (0, right, 0, below), mode="replicate")
    levels = (255 * images).round().to(torch.uint8).movedim(1, -1).numpy()
    corrupted = np.stack(
        [
            _corrupted(image, kind, severity, mix_seed(CORRUPTION, seed, number, severity, position) % 2**32)
            for image, position in zip(levels, positions, strict=True)
        ]
    )
    if pixels.shape[1] == 1:  # the package returns three channels
        corrupted = np.rint(corrupted.mean(axis=-1, keepdims=True))
    result = torch.from_numpy(corrupted).movedim(-1, 1)[..., :height, :width]
    return (result.float() / 255).to(pixels)


def _corrupted(image: np.ndarray, kind: str, severity: int, seed: int) -> np.ndarray:
    import imagecorruptions  # slow to import

    own_seed = {"seed": seed} if kind in ("impulse_noise", "glass_blur") else {}
    with _numpy_seeded(seed), contextlib.redirect_stdout(io.StringIO()):  # it prints what it rounds
        return imagecorruptions.corrupt(image, severity, kind, **own_seed)


@contextlib.contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """The package draws from numpy's global generator, which is left as it was."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
