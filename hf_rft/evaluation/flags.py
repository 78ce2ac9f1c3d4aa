"""Trust checks: signs that an accuracy is high because the attacks fail, not because the model is robust.

After Athalye et al. 2018, "Obfuscated gradients give a false sense of security"
(https://huggingface.co/papers/1802.00420), Carlini et al. 2019, "On evaluating adversarial robustness"
(https://huggingface.co/papers/1902.06705), and the warnings of AutoAttack. A few examples are enough, since a defence
that masks gradients does so for most examples.
"""

from collections.abc import Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F

from ..attacks import apgd, fgsm, square
from ..attacks.base import (
    ZERO_GRADIENT_SHARE,
    Forward,
    evaluate,
    has_zero_gradient,
    log_odds,
    margin,
    select_generators,
)
from ..threat_model import ThreatModel, format_epsilon
from ..utils.noise import EVALUATION_ATTACK, example_generators


CHECKED_EXAMPLES = 32
SQUARE_STEPS = 200
# A sign counts above these shares of the examples. A weaker attack sometimes succeeds by luck, so its share must
# exceed the bound significantly, by a one-sided binomial test at this level.
STANDING_SHARE, WEAKER_SHARE = 0.1, 0.05
SIGNIFICANCE = 0.05
# The mean margin must rise at least this fast, relative to the slope that would make it 0 at the huge epsilon.
LEAST_RISE = 0.1


def drawn_examples(is_right: torch.Tensor, seed: int) -> list[int]:
    """Sorted positions of the examples to check, drawn at random since a dataset may be sorted by class."""
    right = is_right.nonzero().flatten().cpu()
    drawn = torch.randperm(len(right), generator=torch.Generator().manual_seed(seed))[:CHECKED_EXAMPLES]
    return right[drawn].sort().values.tolist()


def trust_flags(
    forward: Forward,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    *,
    norm: str,
    epsilons: Sequence[Fraction],
    tier: str,
    broken_at: torch.Tensor,
    seed: int,
    was_training: bool,
) -> dict[str, str]:
    """Look for signs that robustness is overestimated.

    Args:
        forward (`Callable`):
            Maps pixels to logits.
        pixels (`torch.Tensor` of shape `(batch, channels, height, width)`):
            Clean images that the model classifies correctly, pixels in [0, 1].
        labels (`torch.Tensor` of shape `(batch,)`):
            True classes.
        norm (`str`), epsilons (`Sequence[Fraction]`), tier (`str`):
            The evaluation's norm, epsilons and tier.
        broken_at (`torch.Tensor` of shape `(batch,)`):
            The evaluation's result: index of the smallest epsilon that breaks the example, `len(epsilons)` if none.
        seed (`int`):
            The seed of the checks' attacks.
        was_training (`bool`):
            Whether any module was in training mode when the evaluation was called.

    Returns:
        `dict[str, str]`: the name of each sign found -> the suspicion and what to do about it.
    """
    flags = {}
    if was_training:
        flags["train_mode"] = (
            "The model was passed in training mode but measured in evaluation mode; call `model.eval()` first in case "
            "anything else depends on the mode."
        )
    if len(pixels) == 0:
        return flags
    flags |= _range_flags(pixels) | _output_flags(forward, pixels) | _gradient_flags(forward, pixels, labels)
    generators = example_generators(pixels.device, range(len(pixels)), EVALUATION_ATTACK, seed, len(epsilons))
    largest = epsilons[-1]
    flags |= _loss_flags(forward, pixels, labels, norm, largest, generators)
    flags |= _huge_epsilon_flags(forward, pixels, labels, norm, generators)
    return flags | _weaker_attack_flags(forward, pixels, labels, norm, epsilons, tier, broken_at, generators)


def _range_flags(pixels: torch.Tensor) -> dict[str, str]:
    lowest, highest = (value.item() for value in torch.aminmax(pixels))
    if highest - lowest >= 0.1:
        return {}
    return {
        "pixel_range": (
            f"All pixels lie in [{lowest:.3g}, {highest:.3g}] of the possible [0, 1]: the images seem to have been "
            "scaled twice, which changes the meaning of epsilon. Check the processor's `do_rescale`."
        )
    }


@torch.no_grad()
def _output_flags(forward: Forward, pixels: torch.Tensor) -> dict[str, str]:
    flags = {}
    logits, again = forward(pixels).float(), forward(pixels).float()
    if not torch.allclose(logits, again, rtol=1e-3, atol=1e-3 * logits.std().item()):
        flags["random_outputs"] = (
            "Two passes of the same images gave different outputs: the model is randomised, and an attack that sees "
            "one draw is weak. Remove the randomness, or attack its average (expectation over transformation)."
        )
    if logits.min() >= -1e-5 and (logits.sum(dim=1) - 1).abs().max() < 1e-4:
        flags["softmax_outputs"] = (
            "The outputs are probabilities: a softmax before the attack's loss hides gradients. Let the model return "
            "logits."
        )
    others = F.softmax(logits, dim=1).sort(dim=1).values[:, :-1]
    saturated = (others.amax(dim=1) == 0).float().mean().item()
    if saturated > ZERO_GRADIENT_SHARE:
        flags["saturated_softmax"] = (
            f"For {saturated:.0%} of the images the softmax is exactly 0 or 1 in float32: the logits' scale makes the "
            "gradient of cross-entropy vanish in other tools. hf_rft's attacks do not depend on the scale; distrust "
            "results of attacks that do."
        )
    return flags


def _gradient_flags(forward: Forward, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, str]:
    share = has_zero_gradient(evaluate(forward, pixels, labels, log_odds).gradient).float().mean().item()
    if share <= ZERO_GRADIENT_SHARE:
        return {}
    return {
        "zero_gradients": (
            f"The gradient is exactly zero for {share:.0%} of the images: quantisation, a dead activation or another "
            "operation without a derivative masks it, and no gradient attack can work. Replace that operation with a "
            'differentiable approximation, and run `tier="full"`, whose Square Attack needs no gradient.'
        )
    }


def _loss_flags(forward, pixels, labels, norm, largest, generators) -> dict[str, str]:
    def mean_margin(images: torch.Tensor) -> float:
        return evaluate(forward, images, labels, margin, gradient=False).objective.mean().item()

    means = [mean_margin(pixels)]
    for share in (Fraction(1, 4), Fraction(1, 2), Fraction(1)):
        threat_model = ThreatModel(norm, largest * share)
        adversarial = apgd(
            forward, pixels, labels, threat_model=threat_model, steps=10, generator=generators, objective=margin
        )
        means.append(mean_margin(adversarial))
    least = LEAST_RISE * abs(means[0]) * float(largest) / _huge_epsilon(pixels, norm)
    steps = [after - before for before, after in zip(means, means[1:], strict=False)]
    if means[-1] - means[0] > least and min(steps) > -least:
        return {}
    written = ", ".join(f"{mean:.3g}" for mean in means)
    return {
        "flat_loss": (
            f"The loss does not rise with epsilon (mean margin {written} at 0, 1/4, 1/2 and 1 times "
            f"{format_epsilon(largest)}): the gradient does not point where the model breaks. Look for operations "
            "that shatter gradients."
        )
    }


def _huge_epsilon(pixels: torch.Tensor, norm: str) -> float:
    """Half the range of every pixel, in the norm: enough to turn any image plain grey."""
    change = torch.full((1, *pixels.shape[1:]), 0.5, dtype=torch.float64)
    return ThreatModel(norm, 0).distance(change, torch.zeros_like(change)).item()


def _huge_epsilon_flags(forward, pixels, labels, norm, generators) -> dict[str, str]:
    epsilon = _huge_epsilon(pixels, norm)
    ball = ThreatModel(norm, epsilon)
    adversarial = apgd(forward, pixels, labels, threat_model=ball, steps=20, generator=generators, early_stop=True)
    standing = (~evaluate(forward, adversarial, labels, margin, gradient=False).fooled).float().mean().item()
    if standing <= STANDING_SHARE:
        return {}
    return {
        "unbroken_at_huge_epsilon": (
            f"At epsilon {epsilon:.3g} ({norm}), where any image can become plain grey, {standing:.0%} of the images "
            "still withstand APGD, though nothing is left to recognise: the attack fails, the model is not robust. "
            "Look for masked gradients."
        )
    }


def _weaker_attack_flags(forward, pixels, labels, norm, epsilons, tier, broken_at, generators) -> dict[str, str]:
    """Check whether attacks that should be weaker succeed where the evaluation's attacks failed."""
    standing = (broken_at > 1).nonzero().flatten()
    if len(standing) == 0:
        return {}
    pixels, labels = pixels[standing], labels[standing]
    generators = select_generators(generators, standing)
    grid = torch.tensor([float(epsilon) for epsilon in epsilons], device=pixels.device, dtype=pixels.dtype)
    threat_model = ThreatModel(norm, grid[broken_at[standing] - 1])

    def count_fooled(attack, **options) -> int:
        adversarial = attack(forward, pixels, labels, threat_model=threat_model, generator=generators, **options)
        return int(evaluate(forward, adversarial, labels, margin, gradient=False).fooled.sum())

    flags = {}
    fooled = count_fooled(fgsm, steps=1, random_start=False)
    if _is_too_often(fooled, len(standing)):
        flags["fgsm_stronger"] = (
            f"One step of FGSM fools {fooled / len(standing):.0%} of the images that withstand the evaluation's "
            "attacks at the same epsilon: their many small steps are misled. Add restarts, and look for masked "
            "gradients."
        )
    fooled = count_fooled(square, steps=SQUARE_STEPS)
    if _is_too_often(fooled, len(standing)):
        flags["square_stronger"] = (
            f"Square Attack, which sees no gradient, fools {fooled / len(standing):.0%} of the images that withstand "
            f"the evaluation's attacks at the same epsilon: {_SQUARE_REMEDIES.get(tier, _SQUARE_REMEDIES['fast'])}"
        )
    return flags


# By tier; `lean` and custom lists are treated like the weakest.
_SQUARE_REMEDIES = {
    "fast": (
        'these attacks are too weak, or gradients are masked. Run `tier="standard"` first; if Square Attack still '
        "succeeds there, gradients are masked."
    ),
    "standard": 'gradients are masked. Run `tier="full"`, and an attack made for this model.',
    "full": "gradients are masked. Run an attack made for this model.",
}


def _is_too_often(fooled: int, count: int) -> bool:
    """Whether an attack fools significantly more than the tolerated share of the images."""
    from scipy.stats import binomtest  # imported late: it takes a tenth as long as all of `Trainer`

    return bool(binomtest(fooled, count, WEAKER_SHARE, alternative="greater").pvalue < SIGNIFICANCE)
