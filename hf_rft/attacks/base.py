"""What all attacks share: the signature, the objectives, and the gradient of an objective."""

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

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
            True classes; in training also soft labels, probabilities of shape `(batch, classes)`.
        threat_model ([`ThreatModel`]):
            Norm and epsilon; epsilon may be a single number or one per example.
        steps (`int`):
            Number of gradient evaluations.
        generator (`torch.Generator`, or a list of them, one per example, *optional*):
            Source of all randomness. None means a generator seeded with 0, never the global one.
        objective (`Callable`):
            Needed only for losses that choose what their attack increases (TRADES): maps logits and labels to the
            value to increase, per example.

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
        ValueError: if the attack does not have the signature of [`Attack`].
    """
    _check_signature(attack)

    @functools.wraps(attack, updated=())
    def wrapper(forward, pixels, labels, *, threat_model, **options):
        adversarial = attack(forward, pixels, labels, threat_model=threat_model, **options)
        radius = threat_model.radius(pixels).flatten()
        excess = threat_model.distance(adversarial, pixels) - radius
        # Adding a perturbation to a float32 pixel rounds it by up to half this; in L1 and L2 the errors add up like a
        # random walk.
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
        return  # not callable (the caller refuses it), or compiled code without a signature
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
    """Upper bound on the forward and backward passes an attack spends per example."""

    forward: int
    backward: int


def states_passes(passes: Callable[..., Passes]):
    """Give an attack a `.passes(steps, norm)` that states its cost."""

    def decorate(attack):
        attack.passes = passes
        return attack

    return decorate


class PerNorm(dict):
    """What an attack needs to know about each norm; `where` is its module and name, for the error."""

    def __init__(self, where: str, rows: dict[str, Any]):
        super().__init__(rows)
        self.where = where

    def __missing__(self, norm: str):
        attack, table = self.where.split(".")
        raise ValueError(
            f"The attack {attack!r} has no rule for `norm={norm!r}`, only for {list(self)}; add a row to `{table}` in "
            f"hf_rft/attacks/{attack}.py."
        )


# --- Objectives: `(logits, labels) -> (batch,)`, in float32 or wider: autocast must not round a margin to zero ---


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def classes_of(labels: torch.Tensor) -> torch.Tensor:
    """The class of each example, shape `(batch,)`; of soft labels `(batch, classes)` the most probable one."""
    return labels if labels.dim() == 1 else labels.argmax(dim=1)


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(at_least_float32(logits), dim=1)


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """`KL(p || q)` per example."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def _true_and_other_logits(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The true class's logit, and all logits with that one at minus infinity."""
    if labels.dim() > 1:
        raise ValueError(
            "Soft labels are defined for the cross-entropy and the divergence of TRADES only; set `attack='pgd'` or "
            "another attack that does not compare two classes, or give one class per image."
        )
    logits = at_least_float32(logits)
    labels = labels.unsqueeze(1)
    # Not `F.one_hot`: it reads the largest label, so the CPU would wait for the device in every step.
    return logits.gather(1, labels).squeeze(1), logits.scatter(1, labels, -torch.inf)


def log_odds(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-odds that the true class is wrong, `logsumexp of the others - true logit`.

    Cross-entropy is `log(1 + exp(log_odds))`, so the two rise together and their gradients point the same way. But the
    gradient of cross-entropy vanishes in float32 once the true class is certain (a lead of 100 in the logits), which
    makes a confident model look robust.

    Of soft labels `(batch, classes)`, the cross-entropy itself: its gradient vanishes only where the model's
    probabilities equal the labels.
    """
    if labels.dim() > 1:
        return -(labels * log_softmax(logits)).sum(dim=1)
    true_logit, others = _true_and_other_logits(logits, labels)
    return others.logsumexp(dim=1) - true_logit


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Largest other logit minus the true one: positive exactly when the example is misclassified."""
    true_logit, others = _true_and_other_logits(logits, labels)
    return others.amax(dim=1) - true_logit


def dlr(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Difference-of-logits ratio: margin over gap between first and third logit (Croce and Hein 2020, eq. 6).

    Unlike the log-odds, it does not depend on the scale of the logits. Two classes have no third logit, so there it is
    the plain margin.
    """
    if logits.shape[1] < 3:
        return margin(logits, labels)
    top = at_least_float32(logits).topk(3, dim=1).values
    # The bound keeps the gradient of tied logits finite in float16.
    return margin(logits, labels) / (top[:, 0] - top[:, 2]).clamp_min(1e-4)


def lead(logits: torch.Tensor, labels: torch.Tensor, *, targets: torch.Tensor) -> torch.Tensor:
    """Logit of a target class minus the true one; `targets` has shape `(batch,)`."""
    logits = at_least_float32(logits)
    return (logits.gather(1, targets.unsqueeze(1)) - logits.gather(1, labels.unsqueeze(1))).squeeze(1)


def targeted_dlr(logits: torch.Tensor, labels: torch.Tensor, *, targets: torch.Tensor) -> torch.Tensor:
    """[`lead`] divided by the gap between the first logit and the mean of the third and fourth.

    Croce and Hein 2020, eq. 7. Fewer than four classes have no fourth logit, so there it is the plain lead.
    """
    if logits.shape[1] < 4:
        return lead(logits, labels, targets=targets)
    top = at_least_float32(logits).topk(4, dim=1).values
    return lead(logits, labels, targets=targets) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2).clamp_min(1e-4)


class KLDivergence:
    """`KL(p || softmax(logits))` from a fixed `p`: the model's own prediction on the clean images (TRADES).

    Args:
        clean_logits (`torch.Tensor` of shape `(batch, classes)`):
            Computed once, and compared with in every step.
    """

    def __init__(self, clean_logits: torch.Tensor):
        self.log_probabilities = log_softmax(clean_logits.detach())

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return kl_divergence(self.log_probabilities, log_softmax(logits))


# --- One pass through the model ---


class Evaluation(NamedTuple):
    """The model at one point of an attack: objective, its gradient, predicted class, and whether that is wrong."""

    objective: torch.Tensor  # (batch,)
    gradient: Any  # shaped like the pixels; None if not requested
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

    `standing` holds the indices of the examples still of interest. Only those pass through the model; the results for
    the others are meaningless.

    Each example's gradient has the right direction but not the right length: the gradient with respect to the logits
    is scaled to 1 before it is backpropagated, or it would underflow in half precision once the model is confident.
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
            # The sum, not the mean: an example's gradient must not depend on the batch size.
            of_logits = torch.autograd.grad(values.sum(), leaf)[0]
        largest = of_logits.abs().amax(dim=1, keepdim=True)
        of_logits = of_logits / largest.clamp_min(torch.finfo(of_logits.dtype).tiny)
        input_gradient = torch.autograd.grad(logits, adversarial, of_logits.to(logits.dtype))[0]
        # A step along NaN would leave the ball. Without a direction, the image stays put.
        input_gradient = input_gradient.nan_to_num()
    prediction = logits.detach().argmax(dim=1)
    return Evaluation(values.detach(), input_gradient, prediction, prediction != classes_of(labels))


def likeliest_wrong_classes(logits: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """The wrong classes with the largest logits, shape `(batch, count)`; at most the number of classes minus one."""
    wrong = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
    return wrong.topk(min(count, logits.shape[1] - 1), dim=1).indices


def nearest_classes(
    forward: Forward, pixels: torch.Tensor, labels: torch.Tensor, threat_model: ThreatModel, candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Wrong classes, nearest boundary first, and which clean images are misclassified.

    The distance to a class is, to first order, its lead over the dual norm of the lead's gradient: one backward pass
    for each candidate.

    Args:
        candidates (`int`):
            How many classes, in order of their logits, to compare; capped at the number of classes minus one.

    Returns:
        `tuple`: classes of shape `(batch, candidates)`, nearest first, and bools of shape `(batch,)`.
    """
    with torch.enable_grad():
        leaf = pixels.detach().requires_grad_()
        logits = forward(leaf)
        classes = likeliest_wrong_classes(logits.detach(), labels, candidates)
        distances = []
        for target in classes.unbind(dim=1):
            value = lead(logits, labels, targets=target)
            gradient = torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0].nan_to_num()
            slope = threat_model.dual_norm(gradient)
            distances.append(-value.detach() / slope.clamp_min(torch.finfo(slope.dtype).tiny))
    order = torch.stack(distances, dim=1).argsort(dim=1, stable=True)
    return classes.gather(1, order), logits.detach().argmax(dim=1) != labels


def check_inputs(pixels: torch.Tensor, labels: torch.Tensor, steps: int) -> torch.Tensor:
    """Refuse unusable inputs; return the pixels in float32 or wider, where steps of 1/255 are exact."""
    if steps < 1:
        raise ValueError(f"`steps={steps}` must be at least 1.")
    if pixels.dim() != 4 or len(pixels) != len(labels):
        raise ValueError(
            "An attack takes pixels of shape (batch, channels, height, width) and one label per image; got "
            f"{tuple(pixels.shape)} and {tuple(labels.shape)}."
        )
    return at_least_float32(pixels.detach())


def select_generators(generator: Generators, indices: torch.Tensor) -> Generators:
    """The generators of the selected examples; a single generator serves them all."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    return [generator[index] for index in indices.tolist()]


def per_example(values: torch.Tensor) -> torch.Tensor:
    """Reshape `(batch,)` so that it broadcasts against images."""
    return values.reshape(-1, 1, 1, 1)


def where(mask: torch.Tensor, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """`images` where the mask of shape `(batch,)` is true, `others` elsewhere."""
    return torch.where(per_example(mask), images, others)


# Gradients count as masked if they are exactly zero for more than this share of the examples.
ZERO_GRADIENT_SHARE = 0.05


def has_zero_gradient(gradient: torch.Tensor) -> torch.Tensor:
    """Which examples have an input gradient of exactly zero, shape `(batch,)`."""
    return (gradient.flatten(1) == 0).all(dim=1)
