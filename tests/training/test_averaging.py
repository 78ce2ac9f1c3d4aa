from functools import partial

import pytest
import torch
from conftest import make_model, weights
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForImageClassification, TrainerCallback

from hf_rft import ModuleForImageClassification
from hf_rft.training.averaging import TRAINED_NAME, averaging_of, warmed_up


EMA = {"weight_averaging": "ema", "ema_decay": 0.7}


class TrainedWeights(TrainerCallback):
    """Keeps the weights that training goes on with, after every step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(weights(model))


def trained(make_trainer, family="vit", **options):
    """A trainer after training, and the weights after each step."""
    kept = TrainedWeights()
    trainer = make_trainer(family, trainer_options={"callbacks": [kept]}, **{"max_steps": 4, **options})
    trainer.train()
    return trainer, kept.steps


def recurrence(steps, decay):
    """The average after every step, in float64."""
    averages = [{name: value.double() for name, value in steps[0].items()}]
    for updates, step in enumerate(steps[1:], start=1):
        share = min(decay, (1 + updates) / (10 + updates))
        averages.append({name: share * averages[-1][name] + (1 - share) * step[name].double() for name in step})
    return averages


def assert_close(found, expected):
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7, msg=name)


@given(st.floats(0, 1), st.integers(0, 10**6))
def test_decay_grows_to_its_value(decay, updates):
    assert 0 <= warmed_up(decay, updates) <= warmed_up(decay, updates + 1) <= decay
    assert warmed_up(decay, 10**9) == pytest.approx(decay, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("family", ["vit", "timm", "swin"])
def test_the_trained_model_is_the_average_of_a_recurrence(make_trainer, family, options):
    """BatchNorm's statistics too, one average an optimizer step."""
    trainer, steps = trained(make_trainer, family, freeze_batch_norm=False, learning_rate=1e-2, **EMA, **options)
    assert len(steps) == 4
    assert_close(weights(trainer.model), recurrence(steps, 0.7)[-1])
    other = max((value - steps[-1][name]).abs().max() for name, value in weights(trainer.model).items())
    assert other > 1e-4


def test_whole_numbers_are_not_averaged(make_trainer):
    """Such as the number of batches that BatchNorm has seen, or the indices of positions."""
    trainer, steps = trained(make_trainer, "timm", freeze_batch_norm=False, **EMA)
    counts = [name for name, value in steps[-1].items() if not value.is_floating_point()]
    assert counts
    for name in counts:
        assert torch.equal(weights(trainer.model)[name], steps[-1][name])


def test_training_goes_on_with_its_own_weights(make_trainer):
    """Evaluated and saved in between."""
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    _, plain = trained(make_trainer, **often)
    _, steps = trained(make_trainer, **EMA, **often)
    for one, other in zip(plain, steps, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_what_is_evaluated_and_saved_is_the_average(make_trainer, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer, steps = trained(make_trainer, learning_rate=1e-2, **EMA, **options)
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    for number, average in enumerate(recurrence(steps, 0.7), start=1):
        saved = AutoModelForImageClassification.from_pretrained(tmp_path / "output" / f"checkpoint-{number}")
        assert_close(weights(saved), average)
        assert make_trainer(saved).evaluate()["eval_loss"] == pytest.approx(logged[number - 1], rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logged[-1], rel=1e-5)
    trainer.save_model(tmp_path / "final")
    assert not (tmp_path / "final" / TRAINED_NAME).exists()
    saved = weights(AutoModelForImageClassification.from_pretrained(tmp_path / "final"))
    assert all(torch.equal(value, saved[name]) for name, value in weights(trainer.model).items())


def plain_module(seed=0):
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    module.append(torch.nn.Linear(4 * 14 * 14, 4))
    return ModuleForImageClassification(module, class_names=list("abcd"))


@pytest.mark.parametrize("family", ["vit", "timm", plain_module])
@pytest.mark.parametrize("number", [1, 3])
def test_resuming_is_exact(make_trainer, tmp_path, family, number):
    make = family if callable(family) else partial(make_model, family)
    family, other = make(), make(seed=1)
    options = {"save_strategy": "steps", "save_steps": 1, "freeze_batch_norm": False, "learning_rate": 1e-2, **EMA}
    whole, steps = trained(make_trainer, family, **options)
    kept = TrainedWeights()
    options |= {"output_dir": str(tmp_path / "other"), "max_steps": 4}
    resumed = make_trainer(other, trainer_options={"callbacks": [kept]}, **options)
    resumed.train(str(tmp_path / "output" / f"checkpoint-{number}"))
    assert len(kept.steps) == 4 - number
    for one, other in zip(steps[number:], kept.steps, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(resumed.model)[name]), name


def test_a_run_can_go_on_without_averaging_and_with_it(make_trainer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    _, steps = trained(make_trainer, **saving, **EMA)
    checkpoint = str(tmp_path / "output" / "checkpoint-2")
    without = make_trainer(output_dir=str(tmp_path / "without"), max_steps=4, **saving)
    without.train(checkpoint)
    assert all(torch.equal(value, steps[-1][name]) for name, value in weights(without.model).items())

    kept = TrainedWeights()
    again = make_trainer(
        output_dir=str(tmp_path / "again"), trainer_options={"callbacks": [kept]}, max_steps=6, **saving, **EMA
    )
    again.train(str(tmp_path / "without" / "checkpoint-4"))
    assert_close(weights(again.model), recurrence(kept.steps, 0.7)[-1])  # the average starts anew


def test_the_best_model_is_an_average(make_trainer, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer, steps = trained(make_trainer, learning_rate=1e-2, **EMA, **options, **best)
    number = trainer.state.best_global_step
    assert number < len(steps)  # the loss falls, and here the largest is best
    assert_close(weights(trainer.model), recurrence(steps, 0.7)[number - 1])


def test_off_by_default(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    assert averaging_of(trainer) is None
    assert not (tmp_path / "output" / "checkpoint-2" / TRAINED_NAME).exists()


def test_bfloat16_training_averages_float32_weights(make_trainer):
    trainer, steps = trained(make_trainer, bf16=True, **EMA)
    assert_close(weights(trainer.model), recurrence(steps, 0.7)[-1])
    assert trainer.model.dtype == torch.float32
