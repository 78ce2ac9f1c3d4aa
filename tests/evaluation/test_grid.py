from fractions import Fraction

import pytest
import torch
from torch import nn

from hf_rft.attacks import apgd, fgsm, pgd
from hf_rft.evaluation import adversarial_predictions
from hf_rft.threat_model import NORMS


GRIDS = {
    "linf": [Fraction(0), Fraction(1, 50), Fraction(1, 10), Fraction(3, 10)],
    "l2": [Fraction(0), Fraction(1, 5), Fraction(1), Fraction(2)],
    "l1": [Fraction(0), Fraction(1), Fraction(5), Fraction(12)],
}
COUNT = 14


@pytest.fixture
def problem():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(60, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    pixels = torch.rand((COUNT, 3, 4, 5), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = model(pixels).argmax(dim=1)
    labels[::5] = (labels[::5] + 1) % 4  # wrong without any attack
    return model, pixels, labels


def predict(problem, norm="linf", attack=apgd, batch_size=COUNT, seed=3, epsilons=None):
    model, pixels, labels = problem
    return torch.cat(
        [
            adversarial_predictions(
                model,
                pixels[first : first + batch_size],
                labels[first : first + batch_size],
                clean_predictions=model(pixels[first : first + batch_size]).argmax(dim=1),
                norm=norm,
                epsilons=epsilons or GRIDS[norm],
                attack=attack,
                steps=1 if attack is fgsm else 11,
                seed=seed,
                first=first,
            )
            for first in range(0, COUNT, batch_size)
        ]
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", [fgsm, pgd, apgd])
def test_accuracy_starts_clean_and_never_rises(problem, norm, attack):
    model, pixels, labels = problem
    predictions = predict(problem, norm, attack)
    assert predictions.shape == (COUNT, 4) and not predictions.is_floating_point()
    assert torch.equal(predictions[:, 0], model(pixels).argmax(dim=1))
    right = predictions == labels.unsqueeze(1)
    assert (right[:, 1:] <= right[:, :-1]).all()
    assert right[:, 0].sum() > right[:, -1].sum()


@pytest.mark.parametrize("norm", NORMS)
def test_fooled_example_keeps_its_prediction(problem, norm):
    labels = problem[2]
    for row, label in zip(predict(problem, norm).tolist(), labels.tolist(), strict=True):
        wrong = [prediction for prediction in row if prediction != label]
        assert wrong == row[len(row) - len(wrong) :] and len(set(wrong)) <= 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("batch_size", [1, 4, 13])
def test_predictions_do_not_depend_on_the_batch_size(problem, norm, batch_size):
    assert torch.equal(predict(problem, norm, batch_size=batch_size), predict(problem, norm))


def test_only_examples_that_still_stand_are_attacked(problem):
    model, _, _ = problem
    attacked = []

    def attack(forward, pixels, labels, *, threat_model, steps, generator):
        attacked.append((threat_model.epsilon, len(pixels), len(generator)))
        assert forward is model and threat_model.norm == "linf" and steps == 11
        assert (model(pixels).argmax(dim=1) == labels).all()
        return apgd(forward, pixels, labels, threat_model=threat_model, steps=steps, generator=generator)

    predictions = predict(problem, attack=attack)
    standing = (predictions == problem[2].unsqueeze(1)).sum(dim=0).tolist()
    expected = [
        (epsilon, count, count) for epsilon, count in zip(GRIDS["linf"][1:], standing, strict=False) if count > 0
    ]
    assert attacked == expected


def test_noise_depends_on_seed_and_position(problem):
    seen = []

    def attack(forward, pixels, labels, *, threat_model, steps, generator):
        seen.append([torch.rand((), generator=one).item() for one in generator])
        return pixels

    epsilons = GRIDS["linf"][:2]
    for seed, batch_size in ((0, COUNT), (0, 3), (1, COUNT)):
        predict(problem, attack=attack, seed=seed, batch_size=batch_size, epsilons=epsilons)
    first, second, parts = seen[0], seen[-1], [value for part in seen[1:-1] for value in part]
    assert first == parts
    assert len({*first, *second}) == len(first) + len(second)


def test_epsilon_zero_alone_attacks_nothing(problem):
    def attack(*args, **kwargs):
        raise AssertionError("called")

    model, pixels, _ = problem
    predictions = predict(problem, attack=attack, epsilons=[Fraction(0)])
    assert torch.equal(predictions, model(pixels).argmax(dim=1, keepdim=True))
