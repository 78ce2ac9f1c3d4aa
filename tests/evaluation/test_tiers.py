import json
from functools import partial

import pytest
import torch

from hf_rft.attacks import ATTACKS, apgd, apgd_targeted, fmn, malt, pgd, square
from hf_rft.attacks.base import attack_name
from hf_rft.evaluation.tiers import TIERS, AttackRun, Tier, make_tier
from hf_rft.threat_model import NORMS, ThreatModel


def leaves_the_ball(forward, pixels, labels, *, threat_model, steps, generator=None):
    return 1 - pixels


class OwnAttack:
    """An attack with a setting of its own, and no name."""

    def __call__(self, forward, pixels, labels, *, threat_model, steps, generator=None):
        return pixels

    def __repr__(self):
        return "OwnAttack(strength=3)"


@pytest.mark.parametrize(("norm", "starts"), [("linf", 1), ("l2", 1), ("l1", 5)])
def test_named_tiers_grow(norm, starts):
    """As in AutoAttack, with FMN in place of FAB; each but `lean` holds the attacks of the one before."""
    assert list(TIERS) == ["fast", "lean", "standard", "full"]
    runs = {name: make_tier(name, norm).attacks for name in TIERS}
    assert runs["full"] == (
        AttackRun(apgd, 100, starts),
        AttackRun(apgd_targeted, 100, 1),
        AttackRun(fmn, 100, 1),
        AttackRun(square, 5000, 1),
    )
    assert runs["standard"] == runs["full"][:2] and runs["fast"] == runs["full"][:1]
    assert runs["lean"] == (*runs["fast"], AttackRun(malt, 100, 1))
    for name in TIERS:
        tier = make_tier(name, norm)
        assert make_tier(tier, norm) is tier
        assert tier.name == name and tier.guess_steps > 0


@pytest.mark.parametrize("name", TIERS)
def test_every_norm_has_a_tier_of_every_name(name):
    assert list(TIERS[name]) == list(NORMS)


def test_description_states_restarts_and_targets_of_the_norm():
    runs = make_tier("full", "l1").describe()["attacks"]
    assert runs == [
        {"attack": "apgd", "steps": 100, "restarts": 5},
        {"attack": "apgd_targeted", "steps": 100, "restarts": 1, "targets": 9},
        {"attack": "fmn", "steps": 100, "restarts": 1, "targets": 9},
        {"attack": "square", "steps": 5000, "restarts": 1},
    ]
    assert make_tier("lean", "linf").describe()["attacks"][1] == {
        "attack": "malt",
        "steps": 100,
        "restarts": 1,
        "targets": 3,
        "candidates": 100,
    }
    bound = make_tier([(partial(apgd_targeted, targets=3), 5)]).describe()["attacks"][0]
    assert bound["targets"] == 3


def test_shown_in_a_line():
    assert repr(TIERS["full"]["l1"]) == "Tier(full: apgd 100 x 5, apgd_targeted 100, fmn 100, square 5000)"


def test_description_names_everything_and_is_json():
    tier = make_tier([("pgd", 7), (apgd, 20, 3)])
    description = tier.describe()
    assert description == {
        "tier": "custom",
        "attacks": [
            {"attack": "pgd", "steps": 7, "restarts": 1},
            {"attack": "apgd", "steps": 20, "restarts": 3},
        ],
        "guess_steps": 0,
    }
    assert json.loads(json.dumps(description)) == description


@pytest.mark.parametrize("name", ATTACKS)
def test_own_list_of_built_in_attacks(name):
    by_name, by_function = make_tier([(name, 1)]), make_tier(((ATTACKS[name], 1, 2),))
    assert by_name == Tier("custom", (AttackRun(ATTACKS[name], 1, 1),), 0)
    assert by_function == Tier("custom", (AttackRun(ATTACKS[name], 1, 2),), 0)
    assert by_name.describe()["attacks"][0]["attack"] == name


@pytest.mark.parametrize(
    ("attack", "name", "bound"),
    [
        (leaves_the_ball, "leaves_the_ball", {}),
        (
            partial(partial(pgd, random_start=False), step_size=0.1),
            "pgd",
            {"random_start": "False", "step_size": "0.1"},
        ),
        (partial(leaves_the_ball, generator=3), "leaves_the_ball", {"generator": "3"}),
        (OwnAttack(), "OwnAttack(strength=3)", {}),
    ],
)
def test_own_attack_keeps_its_name_and_bound_arguments(attack, name, bound):
    assert attack_name(attack) == name
    described = {"attack": name, "steps": 3, "restarts": 1, **({"options": bound} if bound else {})}
    assert make_tier([(attack, 3)]).describe()["attacks"] == [described]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_own_attack_must_stay_in_the_ball(norm):
    pixels = torch.full((2, 1, 3, 3), 0.9)
    run = make_tier([(leaves_the_ball, 3)]).attacks[0]
    with pytest.raises(ValueError, match=f"outside the {norm} ball of radius .*; end it with `threat_model.project`"):
        run.attack(None, pixels, torch.tensor([0, 1]), threat_model=ThreatModel(norm, "0.5"), steps=run.steps)
    within = run.attack(
        None, pixels, torch.tensor([0, 1]), threat_model=ThreatModel(norm, "0.9" if norm == "linf" else 9), steps=3
    )
    assert torch.equal(within, 1 - pixels)


@pytest.mark.parametrize(
    ("tier", "message"),
    [
        (
            "strong",
            r"`tier='strong'` is unknown; choose one of \['fast', 'lean', 'standard', 'full'\], or give a list",
        ),
        ([], "`tier` is an empty list; an evaluation needs at least one attack"),
        ([("fab", 10)], r"`tier` holds the unknown attack 'fab'; choose among \['fgsm', 'pgd', .*'square'\]"),
        ([("apgd",)], r"`tier` holds \('apgd',\); an attack is given as \(attack, steps\) or"),
        ([("apgd", 1, 2, 3)], r"`tier` holds \('apgd', 1, 2, 3\); an attack is given as \(attack, steps\) or"),
        (["apgd"], r"`tier` holds 'apgd'; an attack is given as \(attack, steps\) or"),
        ([apgd], r"`tier` holds <function apgd at .*>; an attack is given as \(attack, steps\) or"),
        ([(3, 10)], "`tier` holds 3, which is not an attack; give a callable or a name"),
        ([(None, 10)], "`tier` holds None, which is not an attack; give a callable or a name"),
        ([("apgd", 0)], "`tier` holds steps 0 for apgd; give a whole number from 1"),
        ([("apgd", -1)], "`tier` holds steps -1 for apgd; give a whole number from 1"),
        ([("apgd", 1.5)], "`tier` holds steps 1.5 for apgd; give a whole number from 1"),
        ([("apgd", "10")], "`tier` holds steps '10' for apgd; give a whole number from 1"),
        ([("apgd", None)], "`tier` holds steps None for apgd; give a whole number from 1"),
        ([("apgd", 10, 0)], "`tier` holds restarts 0 for apgd; give a whole number from 1"),
        (
            [("pgd", 10), (leaves_the_ball, 10, 1.0)],
            "`tier` holds restarts 1.0 for leaves_the_ball; give a whole number",
        ),
        ([("apgd", True)], "`tier` holds steps True for apgd; give a whole number from 1"),
        ([("apgd", 10, True)], "`tier` holds restarts True for apgd; give a whole number"),
        (["pgd"], r"`tier` holds 'pgd'; an attack is given as \(attack, steps\) or"),
        ([(lambda pixels, labels: pixels, 3)], r"takes \(pixels, labels\), but is called as .*Give it the signature"),
    ],
)
def test_bad_tiers(tier, message):
    with pytest.raises(ValueError, match=message):
        make_tier(tier)
