"""CONTRIBUTING.md, followed: a schedule, a loss and an attack are added to their tables, and to nothing else."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Images

from hf_rft import get_epsilon_schedule
from hf_rft.attacks import ATTACKS, TRAINING_ATTACKS
from hf_rft.cli.parsing import parse_with_config
from hf_rft.losses import LOSSES, RobustLoss, at_loss, standard_loss
from hf_rft.schedules import SCHEDULES
from hf_rft.training.arguments import RobustTrainingArguments


NAMES = {"epsilon_schedule_type": "exponential", "robust_loss": "half_and_half", "attack": "sign"}


def exponential(*, rate: float = 5.0):
    return lambda progress: math.expm1(rate * progress) / math.expm1(rate)


def half_and_half(clean_logits, adversarial_logits, labels, *, weight=None, label_smoothing=0.0):
    options = {"label_smoothing": label_smoothing}
    clean = standard_loss(clean_logits, None, labels, **options)
    return (clean + at_loss(None, adversarial_logits, labels, **options)) / 2


def sign(forward, pixels, labels, *, threat_model, steps, generator=None, random_start=True, step_size=None):
    adversarial = threat_model.random_start(pixels, generator) if random_start else pixels
    for _ in range(steps):
        leaf = adversarial.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(forward(leaf), labels, reduction="sum")
        gradient = torch.autograd.grad(loss, leaf)[0]
        step = threat_model.step(gradient, threat_model.radius(pixels) * (step_size or 1 / steps))
        adversarial = threat_model.project(adversarial + step, pixels)
    return adversarial


@pytest.fixture
def plugged_in(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "exponential", exponential)
    monkeypatch.setitem(LOSSES, "half_and_half", RobustLoss(half_and_half))
    monkeypatch.setitem(ATTACKS, "sign", sign)
    monkeypatch.setitem(TRAINING_ATTACKS, "sign", sign)


@pytest.mark.parametrize("source", ["flags", "YAML"])
def test_command_line_and_yaml_know_the_new_names(plugged_in, tmp_path, source):
    flags = [word for name, value in NAMES.items() for word in (f"--{name}", value)]
    if source == "YAML":
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(NAMES))
        flags = ["--config", str(tmp_path / "recipe.yaml")]
    flags += ["--output_dir", str(tmp_path), "--use_cpu", "True", "--report_to", "none"]
    (args,) = parse_with_config((RobustTrainingArguments,), flags)
    assert {name: getattr(args, name) for name in NAMES} == NAMES
    assert args.make_epsilon_schedule()(1.0) == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_help_and_error_lists_show_them(plugged_in, tmp_path, capsys, name):
    with pytest.raises(SystemExit):
        parse_with_config((RobustTrainingArguments,), ["--help"])
    assert NAMES[name] in capsys.readouterr().out
    with pytest.raises(ValueError, match=NAMES[name]):
        RobustTrainingArguments(str(tmp_path), use_cpu=True, **{name: "unknown"})


def test_a_schedule_by_name_has_its_arguments(plugged_in):
    assert get_epsilon_schedule("exponential", rate=1.0)(0.5) == pytest.approx(math.expm1(0.5) / math.expm1(1.0))
    with pytest.raises(ValueError, match=r"'exponential' epsilon schedule takes \['rate'\]"):
        get_epsilon_schedule("exponential", start=0.5)


def test_a_model_is_trained_with_them_and_its_card_says_so(plugged_in, make_trainer):
    trainer = make_trainer(**NAMES, num_train_epochs=2, trainer_options={"train_dataset": Images(16)})
    trainer.train()
    epsilons = [entry["epsilon"] for entry in trainer.state.log_history if "loss" in entry]
    expected = [8 / 255 * math.expm1(5 * step / 4) / math.expm1(5) for step in range(4)]
    assert epsilons == pytest.approx(expected)
    trainer.create_model_card()
    with open(f"{trainer.args.output_dir}/README.md", encoding="utf-8") as card:
        text = card.read()
    for name in NAMES.values():
        assert f"`{name}`" in text


def test_the_table_of_folders_is_complete():
    table = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text().split("## The house")[1].split("\n## ")[0]
    package = Path(__file__).parents[1] / "hf_rft"
    entries = {f"{path.name}/" if path.is_dir() else path.name for path in package.iterdir()}
    missing = {name for name in entries if not name.startswith("__") and f"`{name}`" not in table}
    assert not missing
