import pytest
import torch

from evaluation.test_evaluate import LinearClassifier, evaluate
from hf_rft.attacks import apgd_targeted
from hf_rft.evaluation import estimate
from hf_rft.evaluation.estimate import CostEstimate, describe_cost, passes_to_withstand
from hf_rft.evaluation.evaluator import Evaluator
from hf_rft.evaluation.tiers import TIERS, make_tier
from hf_rft.threat_model import parse_epsilons


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(60, "1 minute"), (95, "2 minutes"), (480, "8 minutes"), (5990, "100 minutes"), (6000, "2 hours")],
)
def test_cost_in_words(seconds, written):
    assert describe_cost(seconds, 10, 9, "full") == f"Up to about {written} left: 10 images x 9 epsilons, tier full"


def own_attack(forward, pixels, labels, *, threat_model, steps, generator=None):
    return pixels


def test_passes_of_an_example_that_withstands_everything():
    own = make_tier([("pgd", 7), ("pgd", 5, 3), (own_attack, 2)])
    assert passes_to_withstand(own, "linf", 10) == 14 + 3 * 10 + 4  # one of each per step
    ten, four = (passes_to_withstand(TIERS["standard"]["linf"], "linf", classes) for classes in (10, 4))
    targeted = [sum(apgd_targeted.passes(100, targets=targets)) for targets in (9, 3)]
    # Forward and backward of the first attack, then of three targets, then of the search; and nine gradients.
    assert passes_to_withstand(TIERS["lean"]["linf"], "linf", 10) == 201 + (1 + 3 * 202 + 9) + 51
    assert ten - four == targeted[0] - targeted[1] + 6  # the minimum-norm search also looks at each class


@pytest.mark.parametrize("tier", TIERS)
def test_a_robust_example_costs_what_is_estimated(tier):
    linear = LinearClassifier()
    tier, grid, right = TIERS[tier]["linf"], parse_epsilons("linf", ["0", "1e-6", "2e-6"]), [1, 2, 3]
    pixels, labels = linear.pixels[right], linear.labels[right]
    found, passes = Evaluator("linf", grid, tier, 0).attack(
        lambda pixels: linear((pixels - 0.5) / 0.5), pixels, labels, right, labels
    )
    assert (found.broken_at == len(grid)).all()  # its margins are far larger
    assert sum(passes) == pytest.approx(3 * passes_to_withstand(tier, "linf", 4), rel=0.05)


def an_estimate(ticks):
    """Of two steps of PGD on ten images, six of them right: 24 passes. The clock shows one tick after the other."""
    said, clock = [], iter(ticks)
    evaluator = Evaluator("linf", parse_epsilons("linf", ["0", "1/255", "2/255"]), make_tier([("pgd", 2)]), 0)
    made = CostEstimate(evaluator, said.append, clock=lambda: next(clock))
    made.left(images=10, num_right=6)
    return made, said


def test_a_long_evaluation_is_announced_once_after_the_trial():
    made, said = an_estimate([0, 1, 30, 30, 31])
    model = torch.nn.Linear(3, 2)
    forward = made.watched(model)
    forward(torch.zeros(2, 3))
    assert said == []
    forward(torch.zeros(2, 3))  # so far two passes in 30 seconds, which leaves 22
    assert said == ["Up to about 6 minutes left: 10 images x 3 epsilons, tier custom"]
    made.make()
    assert len(said) == 1 and made.watched(model) is model


def test_a_batch_that_ends_before_the_trial_is_enough():
    made, said = an_estimate([0, 1, 2, 9])
    forward = made.watched(torch.nn.Linear(3, 2))
    forward(torch.zeros(1, 3))
    forward(torch.zeros(1, 3))
    made.make()  # 9 seconds for two passes leave 99
    assert said == ["Up to about 2 minutes left: 10 images x 3 epsilons, tier custom"]


def test_a_short_evaluation_and_a_batch_without_attacks_are_not_worth_a_word():
    made, said = an_estimate([0, 1, 1, 1, 5])
    made.watched(torch.nn.Linear(3, 2))
    made.make()
    assert not made.is_made
    made.watched(torch.nn.Linear(3, 2))(torch.zeros(12, 3))
    made.make()  # half of the passes in four seconds
    assert made.is_made and said == []


@pytest.mark.parametrize("progress_bar", [True, False])
def test_evaluation_announces_its_cost_above_the_bar(progress_bar, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "WORTH_SAYING", 0)
    linear = LinearClassifier()
    evaluate(linear, batch_size=6, progress_bar=progress_bar, epsilons=["0", "1e-6"], tier=[("pgd", 50)])
    announced = "Up to about 0 minutes left: 12 images x 2 epsilons, tier custom"
    assert capsys.readouterr().err.count(announced) == progress_bar
