"""What all attacks share: their signature, the input gradient, and the care they take of the model's inputs."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from ..noise import Generators
from ..threat_model import ThreatModel
from .objectives import Objective, at_least_float32


Forward = Callable[[torch.Tensor], torch.Tensor]


class Attack(Protocol):
    """A pure function from images to adversarial images; any callable with these arguments is an attack.

    Args:
        forward (`Callable`):
            Maps pixels in [0, 1] of shape `(batch, channels, height, width)` to logits `(batch, classes)`.
        pixels (`torch.Tensor` of shape `(batch, channels, height, width)`):
            Clean images, pixels in [0, 1].
        labels (`torch.Tensor` of shape `(batch,)`):
            True classes.
        threat_model ([`ThreatModel`]):
            Norm and epsilon; epsilon may be one number or one per example.
        steps (`int`):
            Number of gradient evaluations.
        generator (`torch.Generator`, or a list of them, one per example, *optional*):
            Source of the random start. None draws from a generator seeded with 0, never from the global one.
        objective (`Callable`):
            Only for losses that choose what their attack increases (TRADES): maps logits and labels to the values, one
            an example, to be increased.

    Returns:
        `torch.Tensor`: adversarial pixels, inside the ball and inside [0, 1].
    """

    def __call__(
        self,
        forward: Forward,
        pixels: torch.Tensor,
        labels: torch.Tensor,
        *,
        threat_model: ThreatModel,
        steps: int,
        generator: Generators = None,
    ) -> torch.Tensor: ...


def takes(attack: Callable, argument: str) -> bool:
    """Whether an attack accepts a keyword argument."""
    parameters = inspect.signature(attack).parameters
    return argument in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def checked(attack: Attack) -> Attack:
    """A user's attack, whose results are refused if they leave the ball or the box.

    Raises:
        ValueError: if the attack cannot be called as [`Attack`] says.
    """
    _check_signature(attack)

    @functools.wraps(attack, updated=())
    def wrapper(forward, pixels, labels, *, threat_model, **options):
        adversarial = attack(forward, pixels, labels, threat_model=threat_model, **options)
        radius = threat_model.radius(pixels).flatten()
        excess = threat_model.distance(adversarial, pixels) - radius
        # Adding a perturbation to float32 pixels rounds each of them by up to half this; errors of both signs add up
        # like a random walk in L1 and L2.
        rounding = torch.finfo(torch.float32).eps * (1 if threat_model.norm == "linf" else pixels[0].numel() ** 0.5)
        lowest, highest = adversarial.aminmax()
        if not ((excess <= 1e-4 * radius + rounding).all() and lowest >= 0 and highest <= 1):
            raise ValueError(
                f"`attack={attack!r}` returned images in [{lowest:.4g}, {highest:.4g}], up to {excess.max():.4g} "
                f"outside the {threat_model.norm} ball of radius {threat_model.epsilon}; end it with "
                "`threat_model.project`."
            )
        return adversarial

    return wrapper


def _check_signature(attack: Attack) -> None:
    try:
        signature = inspect.signature(attack)
    except (TypeError, ValueError):
        return  # not callable, which the caller refuses, or compiled code that does not tell
    try:
        signature.bind(None, None, None, threat_model=None, steps=1, generator=None)
    except TypeError as error:
        raise ValueError(
            f"`attack={attack!r}` takes {signature}, but is called as attack(forward, pixels, labels, "
            f"threat_model=..., steps=..., generator=...): {error}. Give it the signature "
            "(forward, pixels, labels, *, threat_model, steps, generator=None)."
        ) from error


class Passes(NamedTuple):
    """Forward and backward passes through the model that an attack spends on each example at the most."""

    forward: int
    backward: int


def states_passes(passes: Callable[..., Passes]):
    """Give an attack a `.passes(steps, norm)` that states its cost."""

    def decorate(attack):
        attack.passes = passes
        return attack

    return decorate


class Evaluation(NamedTuple):
    """The model at one point of the attack: objective and its gradient, predicted class, and whether it is wrong."""

    objective: torch.Tensor  # (batch,)
    gradient: Any  # like pixels; None if it was not asked for
    prediction: torch.Tensor  # (batch,)
    fooled: torch.Tensor  # (batch,), bool


def evaluate(
    forward: Forward,
    adversarial: torch.Tensor,
    labels: torch.Tensor,
    objective: Objective,
    *,
    gradient: bool = True,
    standing: torch.Tensor | None = None,
) -> Evaluation:
    """One pass through the model. Only the input gets a gradient; no `.grad` field is touched.

    With `standing`, the indices of the examples still of interest, only those pass through the model; what is returned
    for the others means nothing.

    The gradient has the right direction for each example, not the right length: that of the logits is scaled to 1
    before it goes back through the model, or it would underflow there in half precision once the model is confident.
    """
    with torch.set_grad_enabled(gradient):
        adversarial = adversarial.detach().requires_grad_(gradient)
        if standing is None or len(standing) == len(adversarial):
            logits = forward(adversarial)
        else:
            of_standing = forward(adversarial[standing])
            logits = of_standing.new_zeros(len(adversarial), of_standing.shape[1]).index_copy(0, standing, of_standing)
    if not gradient:
        values, input_gradient = objective(logits, labels), None
    else:
        with torch.enable_grad():
            leaf = at_least_float32(logits.detach()).requires_grad_()
            values = objective(leaf, labels)
            # The sum, not the mean: an example's gradient must not depend on the size of its batch.
            of_logits = torch.autograd.grad(values.sum(), leaf)[0]
        largest = of_logits.abs().amax(dim=1, keepdim=True)
        of_logits = of_logits / largest.clamp_min(torch.finfo(of_logits.dtype).tiny)
        input_gradient = torch.autograd.grad(logits, adversarial, of_logits.to(logits.dtype))[0]
        # A step along NaN would leave the ball; where the model gives no direction, the image stays.
        input_gradient = input_gradient.nan_to_num()
    prediction = logits.detach().argmax(dim=1)
    return Evaluation(values.detach(), input_gradient, prediction, prediction != labels)


def check_inputs(pixels: torch.Tensor, labels: torch.Tensor, steps: int) -> torch.Tensor:
    """Refuse what no attack can work with; return the pixels in float32 or wider, where steps of 1/255 are exact."""
    if steps < 1:
        raise ValueError(f"`steps={steps}` must be at least 1.")
    if pixels.dim() != 4 or len(pixels) != len(labels):
        raise ValueError(
            "An attack takes pixels of shape (batch, channels, height, width) and one label per image; got "
            f"{tuple(pixels.shape)} and {tuple(labels.shape)}."
        )
    return at_least_float32(pixels.detach())


def select_generators(generator: Generators, indices: torch.Tensor) -> Generators:
    """The generators of some of the examples; a single generator serves any of them."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    return [generator[index] for index in indices.tolist()]


def per_example(values: torch.Tensor) -> torch.Tensor:
    """Reshape `(batch,)` so that it broadcasts against images."""
    return values.reshape(-1, 1, 1, 1)


def where(mask: torch.Tensor, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """`images` for the examples of a mask of shape `(batch,)`, `others` for the rest."""
    return torch.where(per_example(mask), images, others)
