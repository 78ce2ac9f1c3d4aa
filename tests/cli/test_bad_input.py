"""What a user can get wrong, a row a case, and the words that must tell them.

Every row is refused before the work starts, by an error of hf_rft and not of a library below: a `ValueError` whose
message names argument (or file, column, example), value and remedy, or, from a command line, one line on standard
error and exit status 2. Command lines leave no output folder behind. (What `TrainingArguments` is told of its own is
left to `transformers`.)
"""

import copy
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bad_data
import datasets
import numpy as np
import pytest
import torch
from bad_data import NAMES
from conftest import SIZE, Images
from transformers import AutoModelForImageClassification, ViTImageProcessor

from hf_rft import (
    PixelNormalization,
    RobustnessReport,
    RobustTrainer,
    RobustTrainingArguments,
    ThreatModel,
    evaluate_robustness,
    load_robust_model,
)
from hf_rft.cli import compare, leaderboard, push_metric, study
from hf_rft.cli import evaluate as evaluation_recipe
from hf_rft.cli import push as push_robust_model
from hf_rft.cli import train as run_rft
from hf_rft.cli.exits import run_program
from hf_rft.evaluation import evaluator, subject
from hf_rft.metrics.expected_robustness.expected_robustness import mean_breaking_share, robustness_summary
from hf_rft.metrics.robust_accuracy.robust_accuracy import robust_accuracy_summary
from hf_rft.studies import runs as studied_runs


ROOT = Path(__file__).parents[2]


class WorkStarted(Exception):
    """What must not happen for bad input, and must for good."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    for name, make in (
        ("images", bad_data.make_image_folders),
        ("data", bad_data.make_datasets),
        ("models", bad_data.make_models),
    ):
        (root / name).mkdir()
        make(root / name)
    return root


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    def start(*args, **options):
        raise WorkStarted

    monkeypatch.setattr(RobustTrainer, "train", start)
    monkeypatch.setattr(evaluator, "find_breaking_points", start)
    for module in (push_metric, push_robust_model):
        monkeypatch.setattr(module, "push_folder", start)
    monkeypatch.setattr(studied_runs, "make_run", start)


RECIPES = {
    "run_rft": run_rft,
    "evaluate": evaluation_recipe,
    "compare": compare,
    "study": study,
    "leaderboard": leaderboard,
    "push_metric": push_metric,
    "push_robust_model": push_robust_model,
}
# Flags with which each recipe would start to work; a row's flags come on top.
VALID = {
    "run_rft": "--model_name_or_path {root}/models/good --use_cpu True --cache_dir {root}/cache "
    "--train_val_split 0.5 --output_dir {out}",
    "evaluate": "--model_name_or_path {root}/models/good --output_dir {out}",
    "compare": "--output_dir {out}",
    "study": "--output_dir {out}",
    "leaderboard": "--output_dir {out}",
    "push_metric": "",
    "push_robust_model": "",
}
IMAGES, DATA = "--train_dir {root}/images/", "--dataset_name {root}/data/"


@pytest.fixture
def start(place, tmp_path, monkeypatch):
    """Run a recipe as a program. The flags win over the valid ones where both are given."""

    def run(recipe: str, flags: str | list[str]) -> None:
        def words(text: str) -> list[str]:
            return [word.format(root=place, out=tmp_path / "out") for word in text.split()]

        own = words(flags) if isinstance(flags, str) else [flag.format(root=place) for flag in flags]
        given = {word for word in own if word.startswith("--")}
        valid = words(VALID[recipe])
        pairs = [valid[index : index + 2] for index in range(0, len(valid), 2) if valid[index] not in given]
        monkeypatch.setattr(sys, "argv", [f"{recipe}.py"])
        run_program(lambda: RECIPES[recipe].main([*own, *(word for pair in pairs for word in pair)]))

    return run


@pytest.fixture
def refused(start, tmp_path, capsys):
    """The message of a recipe that refused its input."""

    def run(recipe: str, flags: str | list[str]) -> str:
        with pytest.raises(SystemExit) as end:
            start(recipe, flags)
        assert end.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        found = [line for line in lines if re.search(r"\.py: error: |pytest.*: error: |-c: error: ", line)]
        assert len(found) == 1 and not any(line.startswith("Traceback") for line in lines), lines
        assert not (tmp_path / "out").exists()
        return "\n".join(lines[lines.index(found[0]) :])

    return run


# --- Command lines: recipe, flags, what the message must match ---

COMMAND_LINES = [
    # Flags
    ("run_rft", "--epsilom 8/255", "Unknown flag --epsilom. Did you mean --epsilon?"),
    ("run_rft", "--seed 1 2", r"Values \['2'\] belong to no flag"),
    ("run_rft", "stray", r"Values \['stray'\] belong to no flag"),
    ("run_rft", "--config missing.yaml", "--config missing.yaml is neither a file nor the name of one"),
    ("run_rft", "--config {root}", "is neither a file nor the name of one"),
    # Numbers of the wrong type and size
    ("run_rft", "--attack_steps many", "--attack_steps.*: invalid int value: 'many'"),
    ("run_rft", "--attack_steps 0", "`attack_steps=0` must be a whole number from 1 .*set `robust_loss='standard'`"),
    ("run_rft", "--max_train_samples 0", "--max_train_samples 0 must be a whole number from 1 "),
    ("run_rft", "--train_val_split 1.5", "--train_val_split 1.5 must be a number above 0 and at most 0.99"),
    ("run_rft", "--train_val_split nan", "--train_val_split nan must be a number above 0 and at most 0.99"),
    ("run_rft", "--rotation -5", "--rotation -5.0 must be a number from 0 to 180"),
    ("run_rft", "--horizontal_flip 2", "--horizontal_flip 2.0 must be a number from 0 to 1"),
    ("run_rft", "--color_jitter inf", "--color_jitter inf must be a number from 0 to 10"),
    ("run_rft", "--image_size 0", "--image_size 0 must be a whole number from 1 to 4096"),
    ("run_rft", "--image_size 1000000", "--image_size 1000000 must be"),
    ("run_rft", "--head_learning_rate nan", "`head_learning_rate=nan` must be a number from 0"),
    ("run_rft", "--epsilon 8", "did you mean '8/255'"),
    ("run_rft", "--epsilon nan", "`epsilon='nan'` is not a number"),
    ("run_rft", ["--epsilon_schedule_kwargs", "{{'end': 1}}"], "`epsilon_schedule_kwargs=.* is not a JSON object"),
    ("run_rft", "--accelerator_config missing.json", "missing.json"),
    ("run_rft", ["--accelerator_config", '{{"no_such_key": 1}}'], "unexpected keyword argument 'no_such_key'"),
    ("run_rft", "--bf16 True --fp16 True", "At most one of fp16 and bf16"),
    ("run_rft", "--norm l3", "--norm: invalid choice: 'l3'"),
    # Folders
    ("run_rft", "--output_dir {root}/images/a_file", "`--output_dir=.*a_file'` cannot be a folder: .* is a file"),
    ("run_rft", "--output_dir {root}/images/a_file/below", "cannot be a folder: .*a_file is a file"),
    ("run_rft", ["--output_dir", "/proc/no_such_place"], "`--output_dir='/proc/no_such_place'` cannot be written"),
    ("run_rft", ["--output_dir", "x" * 300], "`--output_dir='x*'` cannot be written .File name too long"),
    ("run_rft", "--cache_dir {root}/images/a_file", "`--cache_dir=.* is a file"),
    ("run_rft", "--train_dir no_such_folder", "--train_dir 'no_such_folder' is not a folder"),
    ("run_rft", "--train_dir {root}/images/a_file", "--train_dir .* is not a folder"),
    ("run_rft", f"{IMAGES}good --validation_dir nowhere", "--validation_dir 'nowhere' is not a folder"),
    ("run_rft", "--validation_dir {root}/images/good", "--validation_dir and --test_dir need --train_dir"),
    ("run_rft", "--train_dir a --dataset_name b", "Give either --dataset_name or --train_dir"),
    # Images
    ("run_rft", f"{IMAGES}empty", "--train_dir .* holds 0 files but no image; it should hold one folder"),
    ("run_rft", f"{IMAGES}only_text", r"--train_dir .* holds 1 files \(notes.txt first\) but no image"),
    ("run_rft", f"{IMAGES}flat", r"--label_column_name 'label' is not a column .* columns are \['image'\]"),
    ("run_rft", f"{IMAGES}one_class", "--label_column_name 'label' is not a column"),
    ("run_rft", f"{IMAGES}corrupt", r"Split '\w+': example \d+ \(.*/cat/bad.png\) has no usable image .* Repair it"),
    ("run_rft", f"{IMAGES}truncated", r"example \d+ \(.*/cat/bad.jpg\) .* truncated"),
    ("run_rft", f"{IMAGES}half_png", r"example \d+ \(.*/dog/bad.png\) has no usable image"),
    ("run_rft", f"{IMAGES}bomb", r"example \d+ \(.*/cat/bad.png\) .* exceeds limit"),
    ("run_rft", f"{IMAGES}floats", r"example \d+ \(.*bad.tif\) .* mode 'F' \(32 bits\), .* save it with 8 or 16"),
    ("run_rft", f"{DATA}damaged", r"Split '\w+': example \d+ has no usable image in column 'image'"),
    ("run_rft", f"{DATA}no_image", r"Split '\w+': example \d+ has no usable image in column 'image': it is missing"),
    # Datasets
    ("run_rft", "--dataset_name bundled:mnist", "'bundled:mnist' is not bundled"),
    ("run_rft", f"{DATA}no_data", "--dataset_name .*no_data' cannot be loaded; give a Hub id, or a folder"),
    ("run_rft", f"{DATA}cut", "--dataset_name .*cut' cannot be loaded; .*Parquet"),
    ("run_rft", f"{DATA}nothing", "--dataset_name .*nothing' cannot be loaded"),
    ("run_rft", f"{DATA}good --dataset_config_name x", "--dataset_name .* cannot be loaded; .*'x' not found"),
    ("run_rft", f"{DATA}no_train", r"The dataset has no split 'train', it has \['test'\]"),
    ("run_rft", f"{DATA}tiny", "--train_val_split 0.5 cannot divide 2 training images"),
    ("run_rft", f"{DATA}good --test_split hidden", "--test_split 'hidden' is not a split of the dataset, it has"),
    # Columns
    (
        "run_rft",
        f"{DATA}good --image_column_name x",
        r"--image_column_name 'x' is not a column .*\['image', 'label'\]",
    ),
    ("run_rft", f"{DATA}good --label_column_name y", "--label_column_name 'y' is not a column"),
    ("run_rft", f"{DATA}good --image_column_name label", "--image_column_name 'label' holds ClassLabel.*not images"),
    (
        "run_rft",
        f"{DATA}good --label_column_name image",
        "--label_column_name 'image' holds Image.*a class is text or",
    ),
    ("run_rft", f"{DATA}paths", "--image_column_name 'image' holds .*string.*, not images; cast it"),
    ("run_rft", f"{DATA}floats", "--label_column_name 'label' holds .*float64.* in split 'train'; a class is text"),
    ("run_rft", f"{DATA}lists", "--label_column_name 'label' holds List.*one per image"),
    ("run_rft", f"{DATA}no_label", "Split 'train' has no label in 4 of 8 examples, number 1 first; leave them out"),
    ("run_rft", f"{DATA}no_text", "Split 'train' has no label in 2 of 8 examples, number 1 first"),
    ("run_rft", f"{DATA}negative --train_val_split 0.4", "holds labels down to -1; .*leave them out"),
    ("run_rft", f"{DATA}one", r"--label_column_name 'label' has the classes \['cat'\]; a classifier needs at least 2"),
    ("run_rft", f"{DATA}unknown_test", r"Split 'test' has labels \['eel'\] that the training split lacks"),
    # Models
    ("run_rft", [*f"{DATA}good".split(), "--model_name_or_path", ""], "--model_name_or_path is empty"),
    ("run_rft", f"{DATA}good --model_name_or_path bundled:vit", "'bundled:vit' is not bundled"),
    *(
        (
            "run_rft",
            f"{DATA}good --model_name_or_path {{root}}/models/{name}",
            "--model_name_or_path .*cannot be loaded",
        )
        for name in (
            "nothing",
            "no_weights",
            "cut",
            "bad_config",
            "unknown_type",
            "bad_processor",
            "no_processor",
            "text_model",
        )
    ),
    ("run_rft", f"{DATA}good --image_size 32", "do not fit .* with --image_size 32.*leave --image_size out"),
    # Evaluation
    ("evaluate", "--max_samples 0", "--max_samples 0 must be a whole number from 1"),
    ("evaluate", "--max_samples all", "--max_samples.*: invalid int value: 'all'"),
    ("evaluate", "--epsilon 8/255", r"Unknown flag --epsilon. Did you mean --epsilons\?"),
    ("evaluate", "--tier strong", "--tier: invalid choice: 'strong'"),
    ("evaluate", "--norm l0", "--norm: invalid choice: 'l0'"),
    ("evaluate", "--match_labels position", "--match_labels.*: invalid choice: 'position'"),
    ("evaluate", "--autocast_dtype int8", "--autocast_dtype.*: invalid choice: 'int8'"),
    ("evaluate", "--reference foolbox", "--reference: invalid choice: 'foolbox'"),
    ("evaluate", "--reference_attacks fgsm", r"--reference_attacks \['fgsm'\] are unknown; choose among apgd-ce"),
    ("evaluate", "--epsilons 1/255 2/255", r"`epsilons=\['1/255', '2/255'\]` must start with 0"),
    ("evaluate", "--epsilons 0 8", "`epsilon='8'` is above 1, but pixels lie in .* did you mean '8/255'"),
    ("evaluate", "--epsilons 0 much", "`epsilon='much'` is not a number"),
    ("evaluate", "--batch_size 0", "--batch_size 0 must be a whole number from 1"),
    ("evaluate", "--seed -1", "--seed -1 must be a whole number from 0 to 4294967295"),
    ("evaluate", "--seed 4294967296", "--seed 4294967296 must be a whole number from 0 to 4294967295"),
    (
        "evaluate",
        "--image_dir nowhere",
        "--image_dir 'nowhere' is not a folder; it should hold one folder of images per class",
    ),
    ("evaluate", "--image_dir . --dataset_name b", "Give either --dataset_name or --image_dir, not both"),
    ("evaluate", "--output_dir {root}/images/a_file", "`--output_dir=.* is a file"),
    ("evaluate", f"{DATA}good --split hidden", "--dataset_name .* cannot be loaded; .*its --split.*hidden"),
    ("evaluate", f"{DATA}good --split train --image_column_name x", "--image_column_name 'x' is not a column"),
    ("evaluate", f"{DATA}good --split train --label_column_name y", "--label_column_name 'y' is not a column"),
    (
        "evaluate",
        "--image_dir {root}/images/corrupt",
        r"Example \d+ of `dataset` cannot be read: Unidentified",
    ),
    ("evaluate", "--image_dir {root}/images/truncated", r"Example \d+ of `dataset` cannot be read: .*truncated"),
    ("evaluate", "--image_dir {root}/images/bomb", r"Example \d+ of the dataset .*bad.png\) is not decoded: .*bomb"),
    ("evaluate", f"{DATA}no_image --split train", "Example 5 of `dataset`, column 'image': the image is missing"),
    ("evaluate", f"{DATA}no_text --split train", "Split 'train' has no label in 2 of 8 examples, number 1 first"),
    (
        "evaluate",
        f"{DATA}no_label --split train",
        "column 'label' must hold one class index per image; example 1 has N",
    ),
    ("evaluate", f"{DATA}negative --split train", "holds labels down to -1; .*leave them out"),
    ("evaluate", f"{DATA}three --split train", r"The model has no classes \['a', 'b', 'c'\].*--match_labels index"),
    ("evaluate", f"{DATA}three --split train --match_labels index", "labels from 0 to 2, but the model has 2 classes"),
    (
        "evaluate",
        f"{DATA}strings --split train --match_labels index",
        "one class index per image; example 0 has 'dog'",
    ),
    (
        "evaluate",
        f"{DATA}good --split train --model_name_or_path {{root}}/models/headless",
        r"--model_name_or_path .* has no weights \['classifier.bias'.*random",
    ),
    (
        "evaluate",
        f"{DATA}good --split train --model_name_or_path {{root}}/models/cut",
        "--model_name_or_path .*cut'.*load",
    ),
    # The other recipes
    ("compare", "missing.yaml", "configs: missing.yaml is neither a file nor the name of one"),
    ("compare", "{root}/images/a_file", "config: .*a_file must hold `name: value` lines, got str"),
    ("compare", "emoji --jobs 0", "--jobs 0 must be at least 1"),
    ("compare", "emoji --seeds -1", r"`seeds: \[-1\]` must be a list of seeds, each a whole number from 0"),
    ("compare", "emoji emoji", "two configurations have the same file name"),
    ("compare", "emoji --output_dir {root}/images/a_file", "`--output_dir=.* is a file"),
    ("compare", "emoji --epsilom 4/255", "unknown key 'epsilom'. Did you mean epsilon?"),
    ("compare", "emoji --hub_token secret", "'hub_token' is set, and a study keeps its flags in files; log in"),
    ("compare", "emoji --jobs 2 fashion_mnist", "fashion_mnist belongs to no flag; name all recipes first"),
    ("study", "missing.yaml", "file: missing.yaml is neither a file nor the name of one"),
    ("leaderboard", "a --output_dir {root}/images/a_file", "`--output_dir=.* is a file"),
    ("push_metric", [], "required: --namespace"),
    ("push_metric", ["--namespace", "my name"], "--namespace 'my name' is not the name of a user: .*my name"),
    ("push_metric", "--namespace my-name/metrics", "--namespace 'my-name/metrics' must be the name of a user"),
    ("push_metric", ["--namespace", ""], "--namespace '' must be the name of a user"),
    ("push_metric", "--namespace me --metrics robust_accuracy accuracy", "--metrics accuracy unknown; choose among"),
    ("push_metric", "--namespace me --timeout 0", "--timeout 0.0 must be a number above 0"),
    ("push_metric", "--namespace me --metric x", "Unknown flag --metric. Did you mean --metrics?"),
    ("push_robust_model", "--model_dir nowhere", "--model_dir nowhere is not a folder"),
    ("push_robust_model", "--model_dir . --report nowhere", "--report nowhere is not a file"),
    ("push_robust_model", "--model_dir . --timeout nan", "--timeout nan must be a number above 0"),
    ("push_robust_model", "--model_dir . --repo_id a/b/c", "--repo_id 'a/b/c' is not the name of a repository"),
    ("push_robust_model", "--model_dir . --repoid x", "Unknown flag --repoid. Did you mean --repo_id?"),
    ("push_robust_model", "--model_dir {root}/models/good", "has no robustness.json.*hf-rft evaluate"),
]


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    COMMAND_LINES,
    ids=[
        f"{recipe} {flags if isinstance(flags, str) else ' '.join(flags)[:60]}" for recipe, flags, _ in COMMAND_LINES
    ],
)
def test_command_line_is_refused(refused, recipe, flags, message):
    assert re.search(message, " ".join(refused(recipe, flags).split()))


# --- YAML files of run_rft ---

YAML = {
    "empty": (b"", "must hold `name: value` lines, got NoneType"),
    "comment only": (b"# epsilon: 4/255\n", "must hold `name: value` lines, got NoneType"),
    "list": (b"- epsilon\n- 4/255\n", "must hold `name: value` lines, got list"),
    "scalar": (b"epsilon\n", "must hold `name: value` lines, got str"),
    "two documents": (b"seed: 1\n---\nseed: 2\n", "is not valid YAML: expected a single document"),
    "repeated key": (b"seed: 1\nepsilon: 4/255\nseed: 2\n", "the key 'seed' stands in it twice"),
    "repeated key inside": (
        b"epsilon_schedule_kwargs: {start: 0.1, start: 0.2}\n",
        "the key 'start' stands in it twice",
    ),
    "tab": (b"seed:\n\t- 1\n", "is not valid YAML: while scanning"),
    "no end": (b"epsilon: [1\n", "is not valid YAML"),
    "nested": (b"learning_rate: {a: 1}\n", "--learning_rate.*: invalid float value"),
    "list for one": (
        b"learning_rate: [1, 2]\n",
        r"`learning_rate: \[1, 2\]` is a list, but `learning_rate` takes",
    ),
    "list in list": (
        b"eval_epsilons: [[0]]\n",
        r"`eval_epsilons` holds a wrong value: `epsilon='\[0\]'` is not a number",
    ),
    "date": (b"learning_rate: 2020-01-01\n", "--learning_rate.*: invalid float value: '2020-01-01'"),
    "no date": (b"learning_rate: 2020-13-41\n", "is not valid YAML: month must be in"),
    "python object": (
        b"run_name: !!python/object/apply:os.system ['touch pwned']\n",
        "is not valid YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python",
    ),
    "complex key": (b"? [a, b]\n: 1\n", "is not valid YAML: .*unhashable key"),
    "number as key": (b"1: 2\n", "unknown key 1"),
    "mistyped key": (b"epsilom: 4/255\n", "unknown key 'epsilom'. Did you mean epsilon?"),
    "key config": (b"config: other.yaml\n", "unknown key 'config'"),
    "other encoding": ("run_name: größe\n".encode("latin-1"), "is not valid YAML: 'utf-8' codec"),
    "utf-16": ("seed: 1\n".encode("utf-16"), "is not valid YAML: 'utf-8' codec"),
    "zero bytes": (b"seed: \0\n", "is not valid YAML"),
    "unquoted no": (b"save_strategy: no\n", "--save_strategy.*: invalid choice: 'False'"),
}


@pytest.mark.parametrize("case", YAML)
def test_yaml_is_refused(refused, tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = YAML[case]
    (tmp_path / "recipe.yaml").write_bytes(content)
    found = refused("run_rft", ["--config", str(tmp_path / "recipe.yaml")])
    assert re.search("--config|recipe.yaml|`?-*learning_rate|eval_epsilons|save_str", found)
    assert re.search(message, " ".join(found.split()))
    assert not (tmp_path / "pwned").exists()


# --- Arguments, from Python ---

NAN, INF = float("nan"), float("inf")
NUMBERS: list[tuple[str, Any]] = [
    *(("attack_steps", value) for value in (-1, 2.5, "7")),
    ("eval_attack_steps", True),
    *(("attack_steps_schedule", value) for value in (None, "hinge")),
    *(("attack_step_size", value) for value in (INF, NAN, -1.0, 0)),
    *(("robust_loss_weight", value) for value in (NAN, INF, "6")),
    *(("hub_timeout", value) for value in (0, NAN, 1e300)),
    ("epsilon_schedule_kwargs", '{"start": 0.1'),
    *(("epsilon", value) for value in (NAN, INF, -0.1, "8", True, "1/0", None, [0.1])),
    *(("norm", value) for value in (None, 2, ["linf"])),
    *(("eval_epsilons", value) for value in (0.1, 5, [0, NAN])),
    *(("attack", value) for value in (None, 7)),
    *(("epsilon_schedule_type", value) for value in (None, ["hinge"])),
]


@pytest.mark.parametrize(("name", "value"), NUMBERS, ids=[f"{name}={value!r}" for name, value in NUMBERS])
def test_argument_is_refused(tmp_path, name, value):
    with pytest.raises(ValueError) as error:
        RobustTrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, **{name: value})
    assert name in str(error.value) and re.search(
        "must|choose|write|is not a JSON|is 0 or more|did you mean", str(error.value)
    )
    written = value if isinstance(value, str) else str(value)
    assert written.strip("[]").split(", ")[-1] in str(error.value)
    assert "hf_rft" in error.traceback[-1].path.parts  # not a library's
    assert not (tmp_path / "out").exists()


# --- Calls from Python: what is called with (tools), what the message must match ---


@pytest.fixture(scope="module")
def tools(place, tmp_path_factory):
    """A model with its processor, the same data as tensors and as a dataset with named classes."""
    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model = AutoModelForImageClassification.from_pretrained(place / "models" / "good")
    files = str(place / "data" / "good" / "data" / "*.parquet")
    pictures = datasets.load_dataset("parquet", data_files=files, cache_dir=str(place / "cache"), split="train")
    tensors = [{**Images(1, seed=seed)[0], "labels": seed % 2} for seed in range(4)]

    def changed(position: int, **values) -> list[dict]:
        return [{**example, **(values if place == position else {})} for place, example in enumerate(tensors)]

    def evaluate(dataset=tensors, model=model, processor=processor, norm="linf", epsilons=("0", "4/255"), **options):
        return evaluate_robustness(model, dataset, processor, norm=norm, epsilons=epsilons, **options)

    def train(model=model, dataset=tensors, **options):
        args = RobustTrainingArguments(
            output_dir=str(place / "trainer"), use_cpu=True, report_to="none", disable_tqdm=True
        )
        options = {"args": args, "processing_class": processor, **options}
        return RobustTrainer(model=model, train_dataset=dataset, **options)

    def step(batch: dict) -> Any:
        trainer = train(model=copy.deepcopy(model))
        trainer.model.train()
        return trainer.compute_loss(trainer.model, batch)

    return SimpleNamespace(
        step=step,
        place=place, model=model, processor=processor, pictures=pictures, tensors=tensors, changed=changed,
        evaluate=evaluate, train=train,
    )  # fmt: skip


def with_nan(value: float = NAN) -> torch.Tensor:
    pixel_values = Images(1)[0]["pixel_values"].clone()
    pixel_values[0, 3, 3] = value
    return pixel_values


def reversed_names(tools) -> datasets.Dataset:
    return tools.pictures.cast_column("label", datasets.ClassLabel(names=NAMES[::-1]))


CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    # evaluate_robustness: arguments
    "model": (lambda t: t.evaluate(model="vit"), "`model` must be a torch module, got str"),
    "dataset": (lambda t: t.evaluate(None), "`dataset` is NoneType, which cannot be indexed"),
    "dataset empty": (lambda t: t.evaluate([]), "`dataset` is empty"),
    "dataset of strings": (lambda t: t.evaluate("images"), "`dataset` returns str objects"),
    "processor": (lambda t: t.evaluate(processor=None), "`processor=NoneType` is not an image processor"),
    "processor mean": (
        lambda t: t.evaluate(processor=ViTImageProcessor(image_mean=[NAN] * 3, image_std=[0.5] * 3)),
        "`image_mean=.*nan.*; give one finite number per channel",
    ),
    "norm": (lambda t: t.evaluate(norm="l7"), r"`norm='l7'` is unknown; choose one of"),
    "norm None": (lambda t: t.evaluate(norm=None), "`norm=None` is unknown"),
    "epsilons None": (lambda t: t.evaluate(epsilons=None), r"`epsilons=None` must be a list, for example \['0'"),
    "epsilons a number": (lambda t: t.evaluate(epsilons=0.1), "`epsilons=0.1` must be a list"),
    "epsilons text": (lambda t: t.evaluate(epsilons="0"), "`epsilons='0'` must be a list"),
    "epsilons nan": (lambda t: t.evaluate(epsilons=[0, NAN]), "`epsilon=nan` is not a number"),
    "epsilons inf": (lambda t: t.evaluate(epsilons=[0, INF]), "`epsilon=inf` is not a number"),
    "epsilons negative": (lambda t: t.evaluate(epsilons=[0, -0.1]), "`epsilon=-0.1` is negative"),
    "epsilons huge": (lambda t: t.evaluate(epsilons=[0, 1e300]), r"`epsilon=1e\+300` is above 1"),
    "epsilons fall": (lambda t: t.evaluate(epsilons=[0, 0.2, 0.1]), "must start with 0 and increase strictly"),
    "tier": (lambda t: t.evaluate(tier="best"), "`tier='best'` is unknown; choose one of"),
    "tier number": (lambda t: t.evaluate(tier=3), "`tier=3` must be one of"),
    "tier steps": (lambda t: t.evaluate(tier=[("pgd", NAN)]), "`tier` holds steps nan for pgd"),
    "batch_size": (lambda t: t.evaluate(batch_size=0), "`batch_size=0` must be a whole number from 1"),
    "batch_size text": (lambda t: t.evaluate(batch_size="64"), "`batch_size='64'` must be a whole number"),
    "seed": (lambda t: t.evaluate(seed=-1), "`seed=-1` must be a whole number from 0"),
    "seed nan": (lambda t: t.evaluate(seed=NAN), "`seed=nan` must be"),
    "autocast_dtype": (lambda t: t.evaluate(autocast_dtype="bfloat16"), "`autocast_dtype='bfloat16'` must be torch"),
    "cache_dir": (lambda t: t.evaluate(cache_dir=t.place / "images" / "a_file"), "`cache_dir=.* is a file"),
    "image_column": (lambda t: t.evaluate(image_column="x"), "`image_column='x'` is not in the dataset's examples"),
    # evaluate_robustness: data
    "nan": (lambda t: t.evaluate(t.changed(2, pixel_values=with_nan())), "Example 2 .*'pixel_values', holds NaN"),
    "inf": (lambda t: t.evaluate(t.changed(1, pixel_values=with_nan(INF))), "Example 1 .* holds NaN or infinite"),
    "range": (lambda t: t.evaluate(t.changed(1, pixel_values=with_nan(9.0))), "pixels must lie in .0, 1"),
    "shapes": (
        lambda t: t.evaluate(t.changed(3, pixel_values=torch.zeros(3, 8, 8))),
        r"Example 3 of `dataset`, column 'pixel_values', has the shape \(3, 8, 8\), not \(3, 16, 16\)",
    ),
    "batched": (lambda t: t.evaluate(t.changed(0, pixel_values=torch.zeros(1, 3, 16, 16))), "Example 0 .* the shape"),
    "text as pixels": (lambda t: t.evaluate(t.changed(1, pixel_values="x")), "Example 1 .* is not numeric"),
    "channels": (
        lambda t: t.evaluate([{"pixel_values": torch.zeros(1, 16, 16), "labels": 0}]),
        r"Images have 1 channel\(s\), the processor normalises 3",
    ),
    "label text": (lambda t: t.evaluate(t.changed(2, labels="dog")), "class index per image; example 2 has 'dog'"),
    "label missing": (lambda t: t.evaluate(t.changed(1, labels=None)), "class index per image; example 1 has None"),
    "label float": (lambda t: t.evaluate(t.changed(1, labels=0.5)), "class index per image, got torch.float32"),
    "label large": (lambda t: t.evaluate(t.changed(1, labels=7)), "labels from 0 to 7, but the model has 2 classes"),
    "label negative": (lambda t: t.evaluate(t.changed(1, labels=-100)), "labels down to -100; .*leave them out"),
    "label order": (
        lambda t: t.evaluate(reversed_names(t)),
        r"`dataset` numbers the class 'dog' 0, the model 1 \(`config.id2label`\); bring the labels into the model's",
    ),
    # RobustTrainer
    "trainer args": (lambda t: t.train(args={"epsilon": 1}), "`args` must be RobustTrainingArguments, got dict"),
    "trainer processor": (lambda t: t.train(processing_class=None), "`processing_class` is None; pass the model's"),
    "trainer tokenizer": (lambda t: t.train(processing_class=SimpleNamespace()), "is not an image processor"),
    "trainer empty": (lambda t: t.train(dataset=[]), "`train_dataset` is empty"),
    "trainer label order": (lambda t: t.train(dataset=reversed_names(t)), "`train_dataset` numbers the class 'dog'"),
    "trainer classes": (
        lambda t: t.train(dataset=datasets.Dataset.from_dict({"label": [5, 5]})),
        "`train_dataset` holds labels from 5 to 5, but the model has 2 classes",
    ),
    "trainer two schedules": (lambda t: t.train(robust_loss=3), "`robust_loss=3` "),
    "trainer attack": (lambda t: t.train(attack="pgd"), "`attack='pgd'` "),
    "trainer nan": (
        lambda t: t.step({"pixel_values": with_nan()[None], "labels": torch.tensor([0])}),
        r"NaN values in the images \[0\] of this batch; leave them out",
    ),
    # Metrics
    "metric predictions": (lambda t: robustness_summary(None, [0], [0, 1]), "`predictions` is missing"),
    "metric probabilities": (lambda t: robustness_summary([[0.5, 0.1]], [0], [0, 1]), "`predictions` must hold"),
    "metric lengths": (lambda t: robustness_summary([[0, 0]], [0, 1], [0, 1]), "`predictions` holds 1 examples"),
    "metric epsilons": (lambda t: robustness_summary([[0, 0]], [0], [0, NAN]), "`epsilons=.*nan.* must start with 0"),
    "metric epsilons text": (lambda t: robustness_summary([[0, 0]], [0], ["0", "4/x"]), "`epsilons` must be numbers"),
    "metric weight": (lambda t: robustness_summary([[0, 0]], [0], [0, 1], weight=lambda _: NAN), "`weight` returned"),
    "metric distances": (lambda t: mean_breaking_share([NAN], 1.0), r"`distances=\[nan\]` must be a list"),
    "metric classes": (lambda t: robust_accuracy_summary([3], [0], num_classes=2), "`predictions` holds the label 3"),
    "metric num_classes": (lambda t: robust_accuracy_summary([0], [0], num_classes=0), "`num_classes=0` must be"),
    # Pixel space and threat model
    "normalization": (lambda t: PixelNormalization.from_processor("vit"), "`processing_class=str` is not an image"),
    "epsilon": (lambda t: ThreatModel("l2", "much"), "`epsilon='much'` is not a number; write a fraction"),
    # Hub and reports
    "repository": (lambda t: load_robust_model("not a name"), "not a name is neither a folder nor the name of a repo"),
    "repository None": (lambda t: load_robust_model(None), "`repo_or_path=None` must be a folder or the name of a"),
    "revision": (lambda t: load_robust_model(t.place, revision="v1"), "`revision='v1'` needs a repository, but"),
    "threat model": (lambda t: load_robust_model(t.place, threat_model="linf"), "`threat_model='linf'` must be a"),
    "expected": (lambda t: load_robust_model(t.place, min_expected_robustness=NAN), "min_expected_robustness=nan"),
    "expected text": (
        lambda t: load_robust_model(t.place, min_expected_robustness="0.5"),
        "`min_expected_robustness='0.5'` must lie in",
    ),
    "no report": (lambda t: load_robust_model(t.place / "models" / "good"), "has no robustness.json"),
    "report": (lambda t: RobustnessReport.load(t.place / "models" / "good" / "config.json"), "is not a robustness"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_call_is_refused(tools, case):
    call, message = CALLS[case]
    with pytest.raises(ValueError) as error:
        call(tools)
    assert re.search(message, " ".join(str(error.value).split()))
    assert "hf_rft" in error.traceback[-1].path.parts


def test_the_table_is_as_long_as_promised():
    assert len(COMMAND_LINES) + len(YAML) + len(NUMBERS) + len(CALLS) >= 80


# --- What looks bad and is good: the work starts ---


@pytest.mark.parametrize(
    ("recipe", "flags", "said"),
    [
        ("run_rft", f"{DATA}good", ""),
        ("run_rft", f"{IMAGES}good", ""),
        ("run_rft", f"{IMAGES}with_text", r"--train_dir .* left out 1 files, notes.txt first: not images"),
        ("run_rft", f"{DATA}strings", ""),
        ("run_rft", f"{DATA}absent", "WARNING: no training example has the class unicorn, griffin"),
        ("run_rft", f"{IMAGES}corrupt --check_images False", ""),
        ("run_rft", f"{DATA}good --model_name_or_path {{root}}/models/headless", ""),
        ("evaluate", f"{DATA}good --split train", ""),
        ("evaluate", f"{DATA}strings --split train", ""),
        ("evaluate", "--image_dir {root}/images/with_text", "left out 1 files"),
        ("push_metric", "--namespace me", ""),
        ("compare", "emoji --use_cpu True", ""),
    ],
)
def test_work_starts(start, capsys, caplog, recipe, flags, said):
    with pytest.raises(WorkStarted):
        start(recipe, flags)
    printed = capsys.readouterr()
    assert re.search(said, printed.out + printed.err + caplog.text)


def test_yaml_that_is_fine(tmp_path):
    """A byte order mark, comments, nulls, negative numbers and JSON beside YAML."""
    config = tmp_path / "recipe.yaml"
    config.write_bytes(
        b"\xef\xbb\xbf# seeds\nseed: 3\nmax_steps: -1\nhub_token: null\noutput_dir: {out}\n".replace(b"{out}", b"x")
    )
    _, _, args = run_rft.parse_arguments(["--config", str(config), "--use_cpu", "True"])
    assert (args.seed, args.max_steps, args.output_dir) == (3, -1, "x")


# --- Classes in another order ---


def labels_by_name(dataset) -> list[str]:
    return [dataset.features["label"].names[label] for label in dataset["label"]]


def test_fine_tuning_goes_on_with_the_classes_in_the_models_order(place, tmp_path, monkeypatch):
    """The head of a model fine-tuned on the same classes stays right when the data numbers them otherwise."""
    seen = {}

    def look(trainer, **options):
        seen["model"], seen["data"] = trainer.model.config.id2label, trainer.train_dataset.dataset
        raise WorkStarted

    monkeypatch.setattr(RobustTrainer, "train", look)
    flags = f"--model_name_or_path {place}/models/reversed --dataset_name {place}/data/good --use_cpu True"
    flags += f" --cache_dir {place}/cache --train_val_split 0.5 --output_dir {tmp_path}/out"
    with pytest.raises(WorkStarted):
        run_rft.main(flags.split())
    assert seen["model"] == {0: "dog", 1: "cat"} and seen["data"].features["label"].names == ["dog", "cat"]
    original = datasets.load_dataset(str(place / "data" / "good"), split="train", cache_dir=str(place / "cache"))
    names_of = {
        image["bytes"]: name for image, name in zip(raw_images(original), labels_by_name(original), strict=True)
    }
    found = [names_of[image["bytes"]] for image in raw_images(seen["data"])]
    assert found == labels_by_name(seen["data"]) and set(found) == set(NAMES)


def raw_images(dataset) -> list[dict]:
    return dataset.cast_column("image", datasets.Image(decode=False))["image"][:]


@pytest.mark.parametrize("data", ["good", "strings"])
def test_evaluation_finds_classes_by_name(place, tmp_path, monkeypatch, data):
    flags = f"--model_name_or_path {place}/models/reversed --dataset_name {place}/data/{data} --split train"
    seen = {}

    def look(model, dataset, *args, **options):
        seen["names"] = [model.config.id2label[label] for label in dataset["label"]]
        raise WorkStarted

    monkeypatch.setattr(evaluation_recipe, "evaluate_robustness", look)
    with pytest.raises(WorkStarted):
        evaluation_recipe.main([*flags.split(), "--output_dir", str(tmp_path / "out")])
    assert seen["names"] == (["cat", "dog"] if data == "good" else ["dog", "cat"]) * 4


# --- Folders and disks ---


SMALL_FILES = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from hf_rft.cli import {module} as recipe
from hf_rft.cli.exits import run_program
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
sys.argv[0] = "{module}.py"
run_program(recipe.main)
"""


def test_disk_that_is_full_in_the_middle(place, tmp_path):
    """No file may grow beyond 100 bytes. The report that was there stays, whole; one message says what happened."""
    report = tmp_path / "leaderboard.md"
    report.write_text("of the user")
    evidence = place / "evidence"
    evidence.mkdir(exist_ok=True)
    results = {"linf": RobustnessReport.from_predictions}  # made here: a real report needs an evaluation
    report_of = results["linf"](
        np.zeros((4, 2), dtype=int),
        np.zeros(4, dtype=int),
        np.full(4, np.inf),
        norm="linf",
        epsilons=[0, 1],
        passes=subject.Passes(0, 0),
        settings={
            "model": {"sha256": "0", "name": "m"},
            "dataset": {},
            "processor": {},
            "tier": "fast",
            "attacks": [],
            "seed": 0,
        },
    )
    report_of.save(evidence / "robustness.json")
    code = SMALL_FILES.format(module="leaderboard", size=100)
    command = [sys.executable, "-c", code, str(evidence), "--output_dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert re.search(r"leaderboard.py: error: .*File too large", ended.stderr) and "Traceback" not in ended.stderr
    assert report.read_text() == "of the user"
    assert [path.name for path in tmp_path.iterdir()] == ["leaderboard.md"]


def test_one_cache_for_two_evaluations_at_once(tools, tmp_path, monkeypatch):
    """Both give the report that one alone gives, and nothing half-written stays."""
    monkeypatch.undo()
    monkeypatch.setattr(subject, "trust_flags", lambda *args, **options: {})

    def run(cache_dir):
        model = copy.deepcopy(tools.model)
        options = {"tier": [("apgd", 3)], "batch_size": 1, "cache_dir": cache_dir, "progress_bar": False}
        return evaluate_robustness(
            model, tools.tensors, tools.processor, norm="linf", epsilons=["0", "8/255"], **options
        )

    alone = run(None).to_dict()
    found: list[dict] = []
    threads = [threading.Thread(target=lambda: found.append(run(tmp_path).to_dict())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one["per_example"] for one in found] == [alone["per_example"]] * 3
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"} and len(list(tmp_path.iterdir())) == 4


# --- The edge of a program ---


@pytest.mark.slow
def test_a_recipe_as_a_program(place, tmp_path):
    recipe = str(ROOT / "recipes" / "run_rft.py")
    command = [
        sys.executable,
        recipe,
        "--train_dir",
        str(place / "images" / "corrupt"),
        "--output_dir",
        str(tmp_path / "x"),
    ]
    command += ["--train_val_split", "0.5", "--use_cpu", "True"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("hf-rft train: error: Split 'train': example ")
    assert not (tmp_path / "x").exists()
