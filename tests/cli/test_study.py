import csv
import sys
from pathlib import Path

import pytest
import yaml

from hf_rft.cli import study
from hf_rft.studies import runs


COMMON = {"max_steps": 1, "epsilon": "4/255", "use_cpu": True}
DESCRIPTION = {
    "common": COMMON,
    "factors": {"schedule": {name: {"epsilon_schedule_type": name} for name in ("constant", "linear")}},
    "seeds": [0, 1],
}


@pytest.fixture
def made(monkeypatch):
    """The folders for which a run was asked; every run succeeds."""
    folders = []

    def make_run(run, output_dir, *, cpus, keeps_weights):
        folder = runs.folder_of(run, output_dir)
        folders.append(folder)
        runs.write_recipe(run, folder / "recipe.yaml")
        share = 0.5 if run.options.get("schedule") == "linear" else 0.25
        numbers = dict.fromkeys(("clean_accuracy", "robust_accuracy", "expected_robustness"), share)
        numbers |= {
            "eval_norm": "linf",
            "eval_epsilons": "0 4/255",
            "tier": "fast",
            "num_examples": 4,
            "num_classes": 2,
        }
        numbers |= {
            "seconds": 1.0,
            "onset": None,
            "validation_accuracy": "1:0.5",
            "attacks": "",
            "images": "a",
            "trust_checks": "",
        }
        return {**numbers, "broken_at": "2000", "commit": "c", "torch": "2"}

    monkeypatch.setattr(runs, "make_run", make_run)
    return folders


def described(folder, **changes):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**DESCRIPTION, **changes}))
    return str(path)


def test_runs_and_report(made, tmp_path, capsys):
    arguments = [described(tmp_path), "--output_dir", str(tmp_path / "out"), "--jobs", "2"]
    study.main(arguments)
    assert "| all | linear | 2 | +25.0 |" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.md").is_file() and len(made) == 4
    recipe = yaml.safe_load((made[0] / "recipe.yaml").read_text())
    assert recipe == {**COMMON, "epsilon_schedule_type": "constant", "seed": 0}
    study.main(arguments)
    assert len(made) == 4


def test_report_alone(made, tmp_path, capsys):
    study.main([described(tmp_path), "--output_dir", str(tmp_path / "out")])
    capsys.readouterr()
    study.main(["report", str(tmp_path / "out"), "--baseline", "linear"])
    assert "| all | constant | 2 | -25.0 |" in capsys.readouterr().out


def test_failures_end_in_status_1(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "make_run", lambda run, output_dir, **options: {"reason": "it rained"})
    with pytest.raises(SystemExit, match="4 of 4 runs failed; see .*failures.csv"):
        study.main([described(tmp_path), "--output_dir", str(tmp_path / "out")])
    with open(tmp_path / "out" / "failures.csv", newline="") as stream:
        assert {row["reason"] for row in csv.DictReader(stream)} == {"it rained"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"common": {"epsilon": "8"}}, "did you mean '8/255'"),
        ({"common": {"epsilonn": "4/255"}}, "unknown key 'epsilonn'. Did you mean epsilon?"),
        ({"common": {"config": "emoji/efficientnet_lite9"}}, "config: emoji/efficientnet_lite9 is neither a file nor"),
        (
            {"common": {"dataset_name": "no/such/folder"}},
            "--dataset_name 'no/such/folder' is neither a folder (looked",
        ),
        ({"common": {"model_name_or_path": "./model"}}, "--model_name_or_path './model' is neither a folder (looked"),
        ({"factor": {}}, "unknown key 'factor'. Did you mean factors?"),
        ({"seeds": [0, 0.5]}, "must be a list of seeds"),
    ],
)
def test_mistakes_end_a_study_before_it_begins(made, tmp_path, capsys, changes, message):
    with pytest.raises((SystemExit, ValueError)) as error:
        study.main([described(tmp_path, **changes), "--output_dir", str(tmp_path / "out")])
    assert message in capsys.readouterr().err + str(error.value)
    assert not made and not (tmp_path / "out").exists()


def test_without_ray_it_says_what_to_install(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit):
        study.main([described(tmp_path), "--output_dir", str(tmp_path / "out"), "--ray_address", "auto"])
    assert 'pip install "hf_rft[ray]"' in capsys.readouterr().err


def test_the_run_at_fault_is_named(made, tmp_path, capsys):
    factors = {"norm": {"linf": {"norm": "linf"}, "l3": {"norm": "l3"}}}
    with pytest.raises(SystemExit):
        study.main([described(tmp_path, factors=factors), "--output_dir", str(tmp_path / "out")])
    assert "invalid choice: 'l3'" in (said := capsys.readouterr().err) and "in the run l3, seed 0" in said


def test_options_of_a_recipe_are_overridden(made, tmp_path):
    factors = {"recipe": {"emoji": {"config": "emoji/efficientnet_lite0_hinge", "max_steps": 7}}}
    study.main([described(tmp_path, factors=factors, seeds=[0]), "--output_dir", str(tmp_path / "out")])
    (folder,) = made
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert (recipe["max_steps"], recipe["label_column_name"], recipe["seed"]) == (7, "group", 0)


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("recipes/study/*.yaml")), ids=lambda path: path.stem
)
def test_studies_of_the_repository_can_be_read(path):
    description = study.read_config(path, study.KEYS)
    found = study.Study.from_description(description, study.read_recipe)
    assert found.runs and found.cpus == 1
