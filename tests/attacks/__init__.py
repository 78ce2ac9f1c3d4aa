"""Problems whose solution is known, for the tests of all attacks."""

from typing import NamedTuple

import torch


class LinearProblem(NamedTuple):
    forward: object
    pixels: torch.Tensor
    labels: torch.Tensor
    distances: torch.Tensor


def linear_problem(norm: str, seed: int, shape=(3, 5, 7), count: int = 8, scale: float = 1.0) -> LinearProblem:
    """Two classes divided by a plane, and examples of both at different known distances from it.

    The distance is the margin over the dual norm of the plane's normal. Pixels stay far from 0 and 1.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(torch.Size(shape).numel(), generator=generator, dtype=torch.float64)
    normal /= torch.linalg.vector_norm(normal, ord={"linf": 1, "l2": 2, "l1": torch.inf}[norm])
    common = torch.randn(
        len(normal), generator=generator, dtype=torch.float64
    )  # of both logits: changes no prediction
    offset = -normal.sum() / 2
    labels = torch.arange(count) % 2
    distances = torch.linspace(0.02, 0.12, count, dtype=torch.float64)
    flat = 0.45 + 0.1 * torch.rand((count, len(normal)), generator=generator, dtype=torch.float64)
    along = normal.sign() if norm == "linf" else normal
    margins = (2 * labels - 1) * distances
    flat += ((margins - flat @ normal - offset) / (normal @ along)).unsqueeze(1) * along
    assert flat.min() > 0.1 and flat.max() < 0.9

    def forward(pixels):
        flat = scale * pixels.flatten(1)
        logit = flat @ (normal + common).to(pixels) + scale * offset
        return torch.stack([flat @ common.to(pixels), logit], dim=1)

    return LinearProblem(forward, flat.reshape(count, *shape), labels, distances)


def linear_classifier(classes: int, norm: str, count: int = 8, shape=(3, 5, 7)) -> LinearProblem:
    """Several classes; the distance to the nearest of the planes that divide the true class from another."""
    generator = torch.Generator().manual_seed(classes)
    pixels = 0.4 + 0.2 * torch.rand((count, *shape), generator=generator, dtype=torch.float64)
    weight = torch.randn((classes, pixels[0].numel()), generator=generator, dtype=torch.float64)
    bias = -(pixels.flatten(1) @ weight.T).mean(dim=0)

    def forward(images):
        return images.flatten(1) @ weight.to(images).T + bias.to(images)

    logits = forward(pixels)
    labels = logits.argmax(dim=1)
    lead = logits.gather(1, labels.unsqueeze(1)) - logits
    dual = {"linf": 1, "l2": 2, "l1": torch.inf}[norm]
    slope = torch.linalg.vector_norm(weight[labels].unsqueeze(1) - weight, ord=dual, dim=2)
    distances = (lead / slope.clamp_min(1e-12)).scatter(1, labels.unsqueeze(1), torch.inf).amin(dim=1)
    return LinearProblem(forward, pixels, labels, distances)


def fools(problem: LinearProblem, adversarial: torch.Tensor) -> torch.Tensor:
    """Which adversarial examples are misclassified, in float64."""
    return problem.forward(adversarial.double()).argmax(dim=1) != problem.labels
