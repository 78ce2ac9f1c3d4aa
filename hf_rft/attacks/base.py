"""What all attacks share: their signature, what they increase, and the gradient that says how."""

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from ..losses import at_least_float32, kl_divergence, log_softmax
from ..threat_model import ThreatModel
from ..utils.noise import Generators


Forward = Callable[[torch.Tensor], torch.Tensor]
Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


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


def attack_name(attack: Any) -> str:
    """The function's name, without the arguments bound to it."""
    attack = inspect.unwrap(attack)
    while isinstance(attack, partial):
        attack = inspect.unwrap(attack.func)
    return getattr(attack, "__name__", repr(attack))


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


# --- Objectives: `(logits, labels) -> (batch,)`. In float32 at least: autocast must not round a margin to zero ---


def _true_and_other_logits(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The true class's logit, and all logits with that one at minus infinity."""
    logits = at_least_float32(logits)
    labels = labels.unsqueeze(1)
    # Not by `F.one_hot`, which looks at the largest label: the CPU would wait for the device in every step.
    return logits.gather(1, labels).squeeze(1), logits.scatter(1, labels, -torch.inf)


def log_odds(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-odds that the true class is wrong, `logsumexp of the others - true logit`.

    Cross-entropy is `log(1 + exp(log_odds))`. It rises with the log-odds, so that to increase one is to increase the
    other, and gradients have the same direction. But its own gradient vanishes in float32 once the true class is
    certain (a lead of 100 in the logits), and a confident model looks robust.
    """
    true_logit, others = _true_and_other_logits(logits, labels)
    return others.logsumexp(dim=1) - true_logit


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Largest other logit minus the true one: positive exactly when the example is misclassified."""
    true_logit, others = _true_and_other_logits(logits, labels)
    return others.amax(dim=1) - true_logit


def dlr(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Difference of logits ratio: the margin over the gap between first and third logit (Croce and Hein 2020, eq. 6).

    Blind to the scale of the logits, which log-odds are not. With two classes there is no third logit: the plain
    margin is used.
    """
    if logits.shape[1] < 3:
        return margin(logits, labels)
    top = at_least_float32(logits).topk(3, dim=1).values
    # The bound keeps the gradient of tied logits finite in float16.
    return margin(logits, labels) / (top[:, 0] - top[:, 2]).clamp_min(1e-4)


class Lead:
    """Lead of the logit of a target class over the true one.

    Args:
        targets (`torch.Tensor` of shape `(batch,)`):
            Class that each example shall be taken for.
    """

    def __init__(self, targets: torch.Tensor):
        self.targets = targets

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = at_least_float32(logits)
        return (logits.gather(1, self.targets.unsqueeze(1)) - logits.gather(1, labels.unsqueeze(1))).squeeze(1)


class TargetedDLR(Lead):
    """[`Lead`] over the gap between the first logit and the mean of the third and fourth.

    Croce and Hein 2020, eq. 7. With fewer than four classes there is no fourth logit: the plain lead is used.
    """

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = at_least_float32(logits)
        lead = super().__call__(logits, labels)
        if logits.shape[1] < 4:
            return lead
        top = logits.topk(4, dim=1).values
        return lead / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2).clamp_min(1e-4)


class KLDivergence:
    """`KL(p || softmax(logits))` to a fixed distribution `p`, here the model's own on the clean images (TRADES).

    Args:
        clean_logits (`torch.Tensor` of shape `(batch, classes)`):
            Computed once; the attack's steps all compare with it.
    """

    def __init__(self, clean_logits: torch.Tensor):
        self.log_probabilities = log_softmax(clean_logits.detach())

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return kl_divergence(self.log_probabilities, log_softmax(logits))


# --- One pass through the model ---


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


# Share of examples with a gradient of exactly zero above which gradients count as masked.
ZERO_GRADIENT_SHARE = 0.05


def has_zero_gradient(gradient: torch.Tensor) -> torch.Tensor:
    """Which examples have an input gradient of exactly zero, shape `(batch,)`."""
    return (gradient.flatten(1) == 0).all(dim=1)
