import pytest

from hf_rft.studies.grid import Run, Study


RECIPES = {"slow": {"epsilon_schedule_type": "hinge", "epsilon_schedule_kwargs": {"start": 0.5}, "output_dir": "x"}}
FACTORS = {
    "data": {"emoji": {"dataset_name": "bundled:emoji"}, "digits": {"train_dir": "digits"}},
    "schedule": {"constant": {"epsilon_schedule_type": "constant"}, "hinge": {"config": "slow", "epsilon": "8/255"}},
}
COMMON = {"epsilon": "4/255", "num_train_epochs": 4}


def study(**description):
    return Study.from_description({"factors": FACTORS, **description}, RECIPES.__getitem__)


def names(found):
    return [str(run) for run in found.runs]


def test_every_option_of_every_factor_meets_every_seed():
    found = study(common=COMMON, seeds=[0, 7])
    assert found.factors == ["data", "schedule"] and len(found.runs) == len({run.key for run in found.runs}) == 8
    # All with the first seed come first: a study cut short is balanced.
    assert names(found)[:5] == [
        "emoji, constant, seed 0",
        "emoji, hinge, seed 0",
        "digits, constant, seed 0",
        "digits, hinge, seed 0",
        "emoji, constant, seed 7",
    ]
    assert found.runs[0].flags == {**COMMON, "dataset_name": "bundled:emoji", "epsilon_schedule_type": "constant"}


def test_flags_win_over_recipes_and_options_over_what_is_common():
    hinge = study(common=COMMON).runs[1].flags
    assert hinge["epsilon"] == "8/255" and hinge["epsilon_schedule_kwargs"] == {"start": 0.5}
    assert "config" not in hinge and "output_dir" not in hinge
    # The recipe's arguments belong to its schedule: whoever names another one drops them.
    constant = study(common={"config": "slow"}).runs[0].flags
    assert constant == {"epsilon_schedule_type": "constant", "dataset_name": "bundled:emoji"}


def test_parts_of_the_grid_are_made_in_order_and_shared_runs_once():
    grids = [{"data": "emoji", "schedule": ["hinge"]}, {"data": ["emoji"], "seeds": [0, 1]}]
    assert names(study(grids=grids)) == [
        "emoji, hinge, seed 0",
        "emoji, constant, seed 0",
        "emoji, constant, seed 1",
        "emoji, hinge, seed 1",
    ]


def test_the_key_is_a_hash_of_what_is_computed():
    run = Run({"schedule": "hinge"}, 0, {"epsilon": "4/255", "norm": "linf"})
    assert run.key == Run({"renamed": "so"}, 0, {"norm": "linf", "epsilon": "4/255"}).key
    assert run.key not in {Run({}, 1, run.flags).key, Run({}, 0, {**run.flags, "norm": "l2"}).key}
    assert run.key == "50d7c225b486", "runs that were made before would be made again"


def test_resources():
    found = study(resources={"cpus": 2, "gpus": 0.5})
    assert (found.cpus, found.gpus) == (2, 0.5)
    assert (study().cpus, study().gpus) == (None, 0)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"factors": None}, "`factors` must hold what varies"),
        ({"factors": {"data": {}}}, "`data` must hold its options, .* got {}"),
        ({"factors": {"data": {"emoji": "bundled:emoji"}}}, "`data: emoji` must hold flags .* got 'bundled:emoji'"),
        ({"factors": {"seed": {"a": {}}}}, "`factors` has 'seed', a column of the results"),
        ({"common": {"output_dir": "x"}}, "`common` sets 'output_dir', which the study sets"),
        ({"common": {"hub_token": "secret"}}, "'hub_token' is set, .* log in with `hf auth login`"),
        ({"factors": {"common": {"a": {}}}}, "`factors` has 'common'"),
        ({"factors": {"noise": {True: {}, False: {}}}}, "`noise` has the key True, as YAML reads `on`.*quote it"),
        ({"factors": {"size": {1: {}, "1": {}}}}, r"`size` has options that are written alike: \[1, '1'\]"),
        ({"factors": {"size": {"a": {8: 1}}}}, "`size: a` must hold flags .* got {8: 1}"),
        ({"grids": 3}, "`grids` must be a list of .* got 3"),
        ({"seeds": [0, -1]}, r"`seeds: \[0, -1\]` must be a list of seeds, each a whole number from 0"),
        ({"seeds": 3}, "`seeds: 3` must be a list"),
        ({"grids": [{"colour": "red"}]}, r"'colour' is not a factor; there are \['data', 'schedule'\]"),
        ({"grids": [{"data": ["birds"]}]}, r"'data' has no option 'birds'; it has \['emoji', 'digits'\]"),
        ({"grids": ["data"]}, "`grids` must be a list of .* got 'data'"),
        ({"resources": {"cores": 2}}, "may hold `cpus` and `gpus`"),
        ({"resources": {"cpus": 0.5}}, "`resources: cpus: 0.5` must be a whole number from 1"),
        ({"resources": {"gpus": -1}}, "`resources: gpus: -1` must be a number from 0"),
        ({"factors": {"same": {"a": {"norm": "l2"}, "b": {"norm": "l2"}}}}, "a, seed 0 and b, seed 0 have the same"),
    ],
)
def test_what_is_wrong_is_named(description, message):
    with pytest.raises(ValueError, match=message):
        study(**description)
