import csv

import yaml

from cli.test_study import made  # noqa: F401
from hf_rft.cli import compare
from hf_rft.cli.compare import flags_of


def test_recipes_are_the_options_of_a_study(made, tmp_path, capsys):  # noqa: F811
    compare.main(
        ["fashion_mnist", "emoji/efficientnet_lite0_adaptive", "--seeds", "5", "--output_dir", str(tmp_path)]
        + ["--max_steps", "1", "--epsilon=4/255", "--eval_epsilons", "0", "4/255", "--use_cpu"]
    )
    with open(tmp_path / "results.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["recipe"] for row in rows][-2:] == ["efficientnet_lite0_standard", "efficientnet_lite0_adaptive"]
    assert {row["seed"] for row in rows} == {"5"} and len(made) == 5
    recipe = yaml.safe_load((made[-1] / "recipe.yaml").read_text())
    assert recipe["eval_epsilons"] == ["0", "4/255"] and recipe["label_column_name"] == "group"
    assert "## Compared with efficientnet_lite0_constant" in capsys.readouterr().out


def test_flags_of_a_command_line():
    words = ["--max-steps", "3", "--seed=4", "--bf16", "--eval_epsilons", "0", "0.5", "--max_steps", "5"]
    assert flags_of(["--no_save_safetensors", "--lr-scheduler-type", "cosine"]) == {
        "save_safetensors": False,
        "lr_scheduler_type": "cosine",
    }
    assert flags_of(words) == {"max_steps": "5", "seed": "4", "bf16": True, "eval_epsilons": ["0", "0.5"]}
