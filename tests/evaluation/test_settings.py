import json
from functools import partial

from hf_rft import RobustTrainingArguments
from hf_rft.attacks import apgd
from hf_rft.evaluation import evaluation_settings


def test_settings_name_everything_and_are_json(tmp_path):
    args = RobustTrainingArguments(str(tmp_path), epsilon="8/255", eval_attack_steps=20, seed=3, report_to="none")
    settings = evaluation_settings(args, partial(partial(apgd, early_stop=True), random_start=False))
    assert settings["attacks"] == [{"attack": "apgd", "steps": 20, "restarts": 1}]
    assert (settings["norm"], settings["epsilon"], settings["seed"], settings["tier"]) == (
        "linf",
        "8/255",
        3,
        "custom",
    )
    assert settings["epsilons"] == ["0", "2/255", "4/255", "6/255", "8/255"]
    assert set(settings["versions"]) >= {"hf_rft", "torch", "transformers"}
    assert json.loads(json.dumps(settings)) == settings


def test_own_attack_is_named():
    class Attack:
        def __repr__(self):
            return "Attack(strength=3)"

    args = RobustTrainingArguments("unused", report_to="none")
    assert evaluation_settings(args, Attack())["attacks"][0]["attack"] == "Attack(strength=3)"
