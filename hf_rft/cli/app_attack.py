"""The part of `app.py` that knows nothing of its page: anyone's image, an attack that can be stopped, its result."""

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from PIL import Image, ImageOps
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..attacks.apgd import apgd, apgd_passes
from ..attacks.base import log_odds, margin
from ..data.examples import Examples, num_image_channels
from ..data.images import explain, to_mode
from ..evaluation.report import RobustnessReport
from ..models.classifier import PixelClassifier
from ..models.pixel_space import PixelNormalization
from ..threat_model import ThreatModel


# Of the attack's random start: who asks twice gets the same answer twice.
SEED = 0

MAX_FILE_BYTES = 10 * 2**20
MAX_MEGAPIXELS = 40
# Processors often resize to a fixed shortest side: what is one pixel wide would become hundreds of times larger.
MAX_ASPECT_RATIO = 20
# Pillow reads many more formats, some with decoders hardly anybody looks after, and one by starting Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

Result = TypeVar("Result")


# --- Images from strangers ---


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB, upright. Nothing is decoded before the file's size and the image's are known.

    Raises:
        ValueError: if it is not an image, damaged, or too large; the message is for the person who sent it.
    """
    size = Path(path).stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"The file has {size / 2**20:.1f} MB; at most {MAX_FILE_BYTES / 2**20:.0f} MB are accepted.")
    limit = f"{MAX_MEGAPIXELS} million"
    try:
        image = Image.open(path, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:  # Pillow's own limit, while it reads the header
        raise ValueError(f"The image has far more pixels than the {limit} accepted. Scale it down first.") from error
    except Exception as error:  # on damaged files, decoders raise whatever they come across
        raise ValueError(f"The file is not an image that can be read; give a {', '.join(IMAGE_FORMATS)}.") from error
    with image:
        width, height = image.size
        shape = f"The image has {width} x {height} pixels"
        if width * height > 1e6 * MAX_MEGAPIXELS:
            raise ValueError(f"{shape}; at most {limit} are accepted. Scale it down first.")
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise ValueError(f"{shape}; its long side may be at most {MAX_ASPECT_RATIO} times the short one.")
        try:
            return to_mode(ImageOps.exif_transpose(image), "RGB")
        except Exception as error:
            raise ValueError(f"The image is damaged or cannot be shown: {explain(error)}.") from error


def to_image(pixels: torch.Tensor) -> Image.Image:
    """Pixels in [0, 1] of shape `(channels, height, width)` as an 8-bit image."""
    levels = (255 * pixels.clamp(0, 1)).round().byte().movedim(0, -1).cpu().numpy()
    return Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)


# --- Epsilon ---


class EpsilonScale(NamedTuple):
    """The positions of the epsilon slider for one norm: 0, `step`, ..., `count * step`, exactly."""

    step: Fraction
    count: int
    unit: Fraction  # what the slider counts in: 1/255 for L-inf

    def epsilon(self, position: float) -> Fraction:
        """The epsilon nearest to what the slider shows; the slider itself knows floats only."""
        return min(max(round(Fraction(position) * self.unit / self.step), 0), self.count) * self.step

    def position(self, epsilon: Fraction) -> float:
        return float(epsilon / self.unit)


def epsilon_scale(norm: str, report: RobustnessReport, num_values: int) -> EpsilonScale:
    """Up to twice the report's largest epsilon, such that the report's grid is among the positions.

    For another norm, nothing is known about the model; there the range is that of what others measure (8/255, 0.5 and
    12 for 32 x 32 pixels in RobustBench and its literature), for the same change of each value: an L2 norm grows with
    the root of the number of values, an L1 norm with the number.
    """
    unit = Fraction(1, 255) if norm == "linf" else Fraction(1)
    if norm != report.norm:
        growth = num_values / (3 * 32 * 32)
        usual, divisions = {"linf": (8.0, 8), "l2": (0.5 * math.sqrt(growth), 10), "l1": (12 * growth, 10)}[norm]
        largest = Fraction(f"{usual:.0e}") * unit  # one digit
        return EpsilonScale(largest / divisions, 2 * divisions, unit)
    denominator = math.lcm(unit.denominator, *(epsilon.denominator for epsilon in report.epsilons))
    numerators = (int(epsilon * denominator) for epsilon in (unit, *report.epsilons))
    step, largest = Fraction(math.gcd(*numerators), denominator), report.epsilons[-1]
    while 2 * largest / step < 8:
        step /= 2
    highest = min(2 * largest, Fraction(1)) if norm == "linf" else 2 * largest
    return EpsilonScale(step, int(highest / step), unit)


# --- Models ---


class Classifier:
    """A model that visitors attack, with its name and the names of its classes.

    The model is put into evaluation mode and its parameters are frozen, for good: visitors' threads share it, and one
    that gave it back as it was would do so under the feet of another.
    """

    def __init__(self, name: str, model: PreTrainedModel, processor: BaseImageProcessor):
        self.name, self.processor, self.config = name, processor, model.config
        model.eval().requires_grad_(False)
        self.pixels_to_logits = PixelClassifier(model, PixelNormalization.from_processor(processor))
        self.classes = distinct_names([str(name) for _, name in sorted((self.config.id2label or {}).items())])

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """The image as the model sees it, prepared as for an evaluation: shape `(1, channels, height, width)`."""
        example = {"image": image, "label": 0}
        examples = Examples([example], self.processor, num_channels=num_image_channels(self.config))
        return self.pixels_to_logits.load(examples, [0])[0]

    @torch.no_grad()
    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.pixels_to_logits.forward_in(None)(pixels)[0].float().cpu()


def distinct_names(names: list[str]) -> list[str]:
    """Class names, with the number added where two classes share one (ImageNet has two cranes)."""
    counts = Counter(names)
    return [f"{name} ({number})" if counts[name] > 1 else name for number, name in enumerate(names)]


# --- The attack ---


class AttackResult(NamedTuple):
    """What an attack on one image came to. Tensors are on the CPU."""

    threat_model: ThreatModel
    steps: int
    label: int  # the class that the attack leads away from
    pixels: torch.Tensor  # (channels, height, width)
    adversarial: torch.Tensor  # likewise
    logits: torch.Tensor  # (classes,)
    adversarial_logits: torch.Tensor
    rounded_logits: torch.Tensor  # of the adversarial image rounded to 8 bits

    @property
    def distance(self) -> float:
        """Size of the perturbation in the norm."""
        return self.threat_model.distance(self.adversarial.unsqueeze(0), self.pixels.unsqueeze(0)).item()

    @property
    def errs_already(self) -> bool:
        """Whether the model is wrong without any perturbation."""
        return self.logits.argmax().item() != self.label

    @property
    def is_fooled(self) -> bool:
        return self.adversarial_logits.argmax().item() != self.label


def fooling_first(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[`log_odds`], and misclassified images ahead of all others: of what it met, APGD then returns one that fools.

    The ascent is the same, for the lead is constant. With log-odds alone APGD may return an image of which the true
    class is likely as little as that, but still likelier than any other, and forget one that fooled.
    """
    return log_odds(logits, labels) + 1e4 * (margin(logits, labels) > 0)


def attack_passes(steps: int, norm: str) -> int:
    """How often [`attack_image`] asks the model, at the most."""
    return 1 + apgd_passes(steps, norm).forward + 2


def attack_image(
    classifier: Classifier,
    image: Image.Image,
    label: int | None,
    threat_model: ThreatModel,
    steps: int,
    tick: Callable[[], None] = lambda: None,
) -> AttackResult:
    """Attack one image with APGD, in the model's own pixels.

    Without a `label`, the model is taken at its word: the true class is the one it predicts without a perturbation.
    `tick` is called before each pass through the model; what it raises ends the attack.
    """

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        tick()
        return classifier.pixels_to_logits.forward_in(None)(pixels)

    pixels = classifier.pixels(image)
    with torch.no_grad():
        logits = forward(pixels)
    labels = logits.argmax(dim=1) if label is None else torch.tensor([label], device=pixels.device)
    adversarial = pixels
    if logits.argmax(dim=1) == labels:
        generator = torch.Generator(pixels.device).manual_seed(SEED)
        options = {"threat_model": threat_model, "steps": steps, "generator": generator, "objective": fooling_first}
        adversarial = apgd(forward, pixels, labels, **options)
    with torch.no_grad():
        adversarial_logits, rounded_logits = forward(adversarial), forward((255 * adversarial).round() / 255)
    tensors = (pixels, adversarial, logits, adversarial_logits, rounded_logits)
    return AttackResult(threat_model, steps, int(labels), *(tensor[0].float().cpu() for tensor in tensors))


# --- In the background ---


class _Stopped(Exception):
    """Raised in the background to end the work."""


def run_in_background(
    work: Callable[[Callable[[], None]], Result], interval: float = 0.2
) -> Iterator[tuple[int, Result | None]]:
    """Run `work(tick)` in a thread of its own, and report on it.

    Yields `(ticks so far, None)` every `interval` seconds, and last `(ticks, result)`; an error of the work is raised
    here. Closing the iterator, as happens to one that nobody reads any more, ends the work at its next tick, and
    returns once it has ended.
    """
    stop, future, ticks = threading.Event(), Future(), 0

    def tick() -> None:
        nonlocal ticks
        # The main thread ends first when the program is interrupted, and then waits for this one.
        if stop.is_set() or not threading.main_thread().is_alive():
            raise _Stopped
        ticks += 1

    def run() -> None:
        try:
            future.set_result(work(tick))
        except BaseException as error:
            future.set_exception(error)

    # Not a daemon, as the threads of gradio are that start it: one of those that is in torch when Python ends, aborts.
    thread = threading.Thread(target=run, name="attack", daemon=False)
    thread.start()
    try:
        while not wait([future], timeout=interval).done:
            yield ticks, None
        yield ticks, future.result()
    finally:
        stop.set()
        thread.join()
