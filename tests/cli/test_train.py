"""The main recipe as a user runs it, on the bundled model and data with few steps, and on a folder of images."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import WRITE_TOKEN
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, TimmWrapperForImageClassification, pipeline

from hf_rft import RobustnessReport, RobustTrainer, ThreatModel, load_robust_model
from hf_rft.cli import recipes
from hf_rft.cli import train as run_rft
from hf_rft.training.distributed import NonFiniteError
from hf_rft.training.interruption import AlarmRaised


RECIPES = recipes.FOLDER
TINY = ["--max_train_samples", "32", "--max_eval_samples", "8", "--max_test_samples", "12", "--num_train_epochs", "2"]
TINY += [
    "--image_size",
    "32",
    "--per_device_train_batch_size",
    "16",
    "--eval_attack_steps",
    "2",
    "--disable_tqdm",
    "True",
]


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """What `hf-rft train` does without `--config`, only smaller."""
    folder = tmp_path_factory.mktemp("default")
    return folder, run_rft.main(["--output_dir", str(folder), "--seed", "1", *TINY])


def test_default_run_writes_everything(default_run):
    folder, metrics = default_run
    results = json.loads((folder / "all_results.json").read_text())
    for name in ("eval_accuracy", "eval_robust_accuracy", "eval_expected_robustness"):
        assert results[name] == metrics[name]
    grid = [results[f"eval_accuracy_at_{epsilon}"] for epsilon in ("0", "2/255", "4/255", "6/255", "8/255")]
    assert grid == sorted(grid, reverse=True)
    assert results["eval_samples"] == 12
    assert {"model.safetensors", "config.json", "trainer_state.json", "README.md"} <= {
        p.name for p in folder.iterdir()
    }
    assert (folder / "robustness_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "adversarial-robustness" in (folder / "README.md").read_text()


def test_processes_that_prepare_batches_change_nothing(default_run, tmp_path):
    folder, metrics = default_run
    flags = ["--output_dir", str(tmp_path), "--seed", "1", *TINY, "--dataloader_num_workers", "2"]
    assert run_rft.main(flags) == metrics
    weights, expected = (load_file(one / "model.safetensors") for one in (tmp_path, folder))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_adapters(tmp_path):
    """The bundled model is named as `hf-rft` calls it, not by its folder."""
    flags = ["--lora_r", "2", "--lora_target_modules", "conv_head", "conv_pw", "--head_learning_rate", "0.01"]
    metrics = run_rft.main(["--output_dir", str(tmp_path), *TINY, *flags])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "bundled:tf_efficientnet_lite0" and config["r"] == 2
    assert set(config["target_modules"]) == {"conv_head", "conv_pw"}
    model, _, report = load_robust_model(tmp_path, merge=True)
    assert report.expected_robustness == pytest.approx(metrics["eval_expected_robustness"])
    assert isinstance(model, TimmWrapperForImageClassification)


def test_the_code_of_the_card_measures_the_same_again(default_run, monkeypatch, capsys):
    folder, metrics = default_run
    monkeypatch.chdir(folder.parent)
    code = (folder / "README.md").read_text().split("## Reproduce")[1].split("```python\n")[1].split("```")[0]
    assert "shuffle(seed=1).select(range(12))" in code
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "the same images: True" in capsys.readouterr().out
    assert names["again"].expected_robustness == pytest.approx(metrics["eval_expected_robustness"])


def test_default_run_is_the_hinge_recipe(default_run):
    folder, _ = default_run
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry]
    settings = json.loads((folder / "all_results.json").read_text())["eval_settings"]
    assert (settings["epsilons"][-1], settings["seed"], settings["dataset"]["split"]) == ("8/255", 1, "test")
    default, hinge = (run_rft.parse_arguments(flags) for flags in ([], ["--config", run_rft.DEFAULT_RECIPE]))
    assert default == hinge
    assert default[2].epsilon_schedule_type == "hinge"


def test_labels_survive_save_reload_and_pipeline(default_run, tmp_path):
    folder, _ = default_run
    classifier = pipeline("image-classification", model=str(folder), top_k=10)
    assert classifier.image_processor.data_config["input_size"] == (3, 32, 32)
    labels = {row["label"] for row in classifier(Image.new("RGB", (28, 28)))}
    assert {"Ankle boot", "T-shirt/top"} <= labels
    assert len(labels) == 10
    AutoModelForImageClassification.from_pretrained(folder).save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert set(again.config.id2label.values()) == labels


def test_default_run_has_its_evidence(default_run):
    folder, metrics = default_run
    report = load_robust_model(folder, threat_model=ThreatModel("linf", "8/255")).report
    assert report.expected_robustness == pytest.approx(metrics["eval_expected_robustness"])
    assert report.settings["dataset"]["name"] == "fashion_mnist_5k"
    assert report.flags is not None
    card = (folder / "README.md").read_text()
    assert "hf-rft train --seed 1" in card
    assert "No test data were held out" not in card
    assert str(folder) not in card


def test_push_to_hub(hub, tmp_path, capsys):
    flags = ["--output_dir", str(tmp_path / "out"), "--push_to_hub", "--hub_model_id", "user/robust", *TINY]
    run_rft.main([*flags, "--hub_token", WRITE_TOKEN])
    pushed = hub.repo("models", "user/robust").files()
    assert {"README.md", "model.safetensors", "robustness.json", "all_results.json"} <= set(pushed)
    for name, content in pushed.items():
        for secret in (str(tmp_path), str(Path.home()) + "/", str(Path(run_rft.__file__).parent), WRITE_TOKEN):
            assert secret.encode() not in content, name

    hub.fail("commit", status=403)
    metrics = run_rft.main([*flags, "--seed", "2"])
    assert metrics["eval_samples"] == 12
    assert "The push to user/robust failed: the Hub answered 403" in capsys.readouterr().err


@pytest.fixture
def image_folder(tmp_path):
    """Three classes of grey 20 x 24 images, told apart by brightness."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for index, name in enumerate(["dark", "middle", "bright"]):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = 80 * index + generator.integers(0, 60, (20, 24))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "images"


def test_own_folder_of_images_with_resume(image_folder, tmp_path):
    """No default recipe is mixed in, the head has its own rate, a validation part is split off, resume is exact."""
    arguments = ["--train_dir", str(image_folder / "train"), "--test_dir", str(image_folder / "test")]
    arguments += ["--image_size", "32", "--epsilon", "4/255", "--attack", "pgd", "--attack_steps", "1"]
    arguments += ["--num_train_epochs", "2", "--per_device_train_batch_size", "7", "--head_learning_rate", "1e-3"]
    arguments += ["--eval_attack_steps", "1", "--report_to", "none", "--disable_tqdm", "True"]
    arguments += ["--train_val_split", "0.15", "--save_strategy", "steps", "--save_steps", "2"]
    metrics = run_rft.main([*arguments, "--output_dir", str(tmp_path / "whole")])
    assert metrics["eval_samples"] == 12
    assert {"eval_accuracy_at_1/255", "eval_accuracy_at_4/255"} <= set(metrics)
    assert "No test data were held out" not in (tmp_path / "whole" / "README.md").read_text()
    state = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())
    assert state["max_steps"] == 6  # 20 of 24 images, in batches of 7

    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    run_rft.main([*arguments, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", checkpoint])
    whole, resumed = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "resumed"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_without_test_data_the_card_says_that_the_numbers_are_from_the_validation_images(small_run, tmp_path):
    run_rft.main(small_run)
    assert "the numbers are from the validation images" in (tmp_path / "out" / "README.md").read_text()


def test_a_schedule_flag_replaces_the_whole_schedule_of_the_recipe():
    _, _, args = run_rft.parse_arguments(["--epsilon_schedule_type", "linear"])
    assert (args.epsilon_schedule_type, args.epsilon_schedule_kwargs) == ("linear", None)
    _, _, args = run_rft.parse_arguments([])
    assert args.epsilon_schedule_kwargs == {"start": 0.25, "end": 0.75}


CONFIGS = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "accelerate_configs")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_parses_and_says_what_it_is(config):
    run_rft.parse_arguments(["--config", str(config)])
    header = config.read_text().split("\n\n")[0]
    assert f"hf-rft train --config {config.relative_to(RECIPES).with_suffix('')}" in header
    assert re.search(r"# Result: +clean \d+\.\d", header), header
    assert re.search(r"# Time: +\d", header), header


def test_the_four_recipes_differ_in_the_schedule_only():
    configs = [run_rft.parse_arguments(["--config", str(path)]) for path in RECIPES.glob("fashion_mnist/*.yaml")]
    assert len(configs) == 4
    schedule = {"epsilon_schedule_type", "epsilon_schedule_kwargs", "output_dir"}
    assert all(config[:2] == configs[0][:2] for config in configs)
    settings = [
        {key: value for key, value in config[2].to_dict().items() if key not in schedule} for config in configs
    ]
    assert all(setting == settings[0] for setting in settings)


# --- Stopping and going on ---


@pytest.fixture
def small_run(image_folder, tmp_path):
    return [
        *("--train_dir", str(image_folder / "train"), "--image_size", "32", "--attack", "pgd", "--attack_steps", "1"),
        *("--eval_attack_steps", "1", "--max_steps", "4", "--per_device_train_batch_size", "7", "--report_to", "none"),
        *("--save_strategy", "steps", "--save_steps", "1", "--disable_tqdm", "True"),
        *("--output_dir", str(tmp_path / "out")),
    ]


def test_sigterm_ends_the_recipe_and_resume_auto_goes_on(small_run, tmp_path, monkeypatch, capsys):
    step = RobustTrainer.training_step

    def terminated(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_info:
        patch.setattr(RobustTrainer, "training_step", terminated)
        run_rft.main([*small_run, "--resume", "auto"])  # nothing is there yet: it starts anew
    assert exit_info.value.code == 75
    assert "checkpoint-3. The same command with --resume auto goes on from there." in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}

    with pytest.raises(ValueError, match="--output_dir .*out holds checkpoints of an earlier run .*--resume auto"):
        run_rft.main(small_run)
    run_rft.main([*small_run, "--resume", "auto"])
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    report = RobustnessReport.load(tmp_path / "out" / "robustness.json")
    assert "train_mode" not in report.flags


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="there are no process groups")
def test_sigterm_to_the_whole_group_spares_the_workers(small_run, tmp_path):
    """As `torchrun` sends it: training would end with an error if the processes that prepare batches died."""
    small_run[small_run.index("--max_steps") + 1] = "100000"
    small_run[small_run.index("--per_device_train_batch_size") + 1] = "1"  # each epoch, of 24 steps, has a new worker
    flags = [*small_run, "--save_total_limit", "2", "--dataloader_num_workers", "1"]
    command = [sys.executable, "-m", "hf_rft", "train", *flags]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        while process.poll() is None and not (tmp_path / "out" / "checkpoint-2").exists():
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=120) == 75, (tmp_path / "log").read_text()
    finally:
        process.kill()


def test_workers_of_other_start_methods_get_what_they_need(small_run, monkeypatch):
    """Where processes are not forked, dataset and collator reach them pickled."""

    def train(self, **_):
        for one in (self.train_dataset, self.eval_dataset, self.data_collator):
            pickle.dumps(one)
        raise AlarmRaised("enough")

    monkeypatch.setattr(RobustTrainer, "train", train)
    with pytest.raises(SystemExit) as exit_info:
        run_rft.main(small_run)
    assert exit_info.value.code == 3


@pytest.mark.parametrize(("error", "status"), [(AlarmRaised("It fails."), 3), (NonFiniteError("It fails."), 3)])
def test_failing_runs_have_a_status_of_their_own(small_run, tmp_path, monkeypatch, capsys, error, status):
    def fails(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(RobustTrainer, "train", fails)
    with pytest.raises(SystemExit) as exit_info:
        run_rft.main(small_run)
    assert exit_info.value.code == status
    assert "It fails." in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_what_cannot_be_resumed_is_refused_before_anything_is_loaded(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(run_rft, "load_splits", None)
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint='.*nowhere'` is not a checkpoint"):
        run_rft.main([*small_run, "--resume_from_checkpoint", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit):
        run_rft.main([*small_run, "--resume", "auto", "--resume_from_checkpoint", "x"])
