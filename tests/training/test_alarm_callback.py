"""Every alarm on a run built to fail that way, and none on healthy ones."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import NUM_LABELS, SIZE, Images, make_model
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ResNetConfig,
    TimmWrapperConfig,
    TrainerCallback,
)

from hf_rft.losses import RobustLoss
from hf_rft.training.alarm_callback import AlarmCallback
from hf_rft.training.alarms import recorded_alarms
from hf_rft.training.interruption import AlarmRaised


class Patterns(torch.utils.data.Dataset):
    """A coarse coloured pattern for each class, in noise; some labels may be wrong."""

    def __init__(self, count, seed=0, *, signal=0.3, noise=0.1, wrong=0.0):
        coarse = torch.rand((NUM_LABELS, 3, 4, 4), generator=torch.Generator().manual_seed(12345))
        patterns = torch.nn.functional.interpolate(2 * coarse - 1, size=SIZE)
        generator = torch.Generator().manual_seed(seed)
        true = torch.arange(count) % NUM_LABELS
        noises = 2 * torch.rand((count, 3, SIZE, SIZE), generator=generator) - 1
        others = torch.randint(NUM_LABELS, (count,), generator=generator)
        self.pixels = (0.5 + signal * patterns[true] + noise * noises).clamp(0, 1)
        self.labels = torch.where(torch.rand(count, generator=generator) < wrong, others, true)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": (self.pixels[index] - 0.5) / 0.5, "labels": int(self.labels[index])}


def from_config(config):
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(config)


def convnext(*hidden_sizes):
    return from_config(
        ConvNextConfig(
            hidden_sizes=list(hidden_sizes), depths=[1, 1], num_stages=2, patch_size=4, num_labels=NUM_LABELS
        )
    )


def resnet():
    return from_config(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=NUM_LABELS)
    )


def timm_convnext():
    pretrained_cfg = {"input_size": [3, SIZE, SIZE], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    return from_config(
        TimmWrapperConfig(
            architecture="test_convnext",
            num_labels=NUM_LABELS,
            pretrained_cfg=pretrained_cfg,
            model_args={"output_stride": 16},
        )
    )


@pytest.fixture
def train(make_trainer):
    """Train with a constant learning rate, and return the trainer."""

    def run(model, train_dataset, eval_dataset=None, checkpoint=None, **args):
        trainer = make_trainer(
            model,
            trainer_options={"train_dataset": train_dataset, "eval_dataset": eval_dataset or Patterns(32, seed=1)},
            **{
                "lr_scheduler_type": "constant",
                "eval_strategy": "epoch",
                "eval_epsilons": ["0", args.get("epsilon", "8/255")],
                **args,
            },
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    return run


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# --- Runs that fail ---


def run_transfer_failure(train, **args):
    """Constant epsilon, four times the brightness by which the classes differ on average; seed 0."""
    options = {"epsilon": "64/255", "num_train_epochs": 3, "learning_rate": 3e-3, **args}
    return train(make_model("vit"), Patterns(64), Patterns(64, seed=1), **options)


def test_transfer_failure(train, caplog):
    trainer = run_transfer_failure(train)
    last = logged(trainer, "eval_accuracy")[-1]
    assert abs(last - 1 / NUM_LABELS) <= 0.05  # within 5 points of chance
    assert list(recorded_alarms(trainer.state.log_history)) == ["transfer_failure"]
    assert logged(trainer, "alarm_transfer_failure") == [1.0]  # once a run
    [message] = logged(trainer, "message")
    assert "Let epsilon grow from 0 (`epsilon_schedule_type='hinge'`)" in message
    assert "guessing among 4 classes 1.386" in message
    assert not logged(trainer, "adaptation_onset")


def test_catastrophic_overfitting(train):
    """FGSM without a random start, while epsilon grows."""
    trainer = train(
        convnext(8, 16),
        Patterns(128, noise=0.2),
        epsilon="64/255",
        epsilon_schedule_type="linear",
        attack="fgsm",
        attack_steps=1,
        attack_random_start=False,
        num_train_epochs=8,
        learning_rate=1e-2,
        eval_strategy="no",
    )
    assert list(recorded_alarms(trainer.state.log_history)) == ["catastrophic_overfitting"]
    assert logged(trainer, "probe_single_step_accuracy")[-1] > 0.8
    assert logged(trainer, "probe_multi_step_accuracy")[-1] < 0.2
    assert "train with more `attack_steps`" in logged(trainer, "message")[0]


def run_robust_overfitting(train, **args):
    """Few training examples, a fifth of the labels wrong, much noise to learn by heart."""
    return train(
        convnext(16, 32),
        Patterns(48, signal=0.15, noise=0.5, wrong=0.2),
        Patterns(200, seed=1, signal=0.15, noise=0.5),
        epsilon="4/255",
        num_train_epochs=9,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=100,
        learning_rate=5e-3,
        **args,
    )


def test_robust_overfitting(train):
    trainer = run_robust_overfitting(train)
    assert list(recorded_alarms(trainer.state.log_history)) == ["robust_overfitting"]
    robust = logged(trainer, "eval_robust_accuracy")
    assert max(robust) - robust[-1] > 0.15
    assert logged(trainer, "adversarial_accuracy")[-1] > 0.9
    assert "`load_best_model_at_end=True`" in logged(trainer, "message")[0]


@pytest.mark.parametrize(
    ("options", "at_least", "at_most"),
    [
        # The alarm's advice. Without any of them: 0.24 at the end, at best 0.495.
        ({"load_best_model_at_end": True, "metric_for_best_model": "robust_accuracy"}, 0.45, 0.54),
        ({"awp_gamma": 0.05}, 0.28, 0.40),
        # Averages overfit as their models do.
        ({"weight_averaging": "ema"}, 0.19, 0.28),
    ],
)
def test_what_helps_against_robust_overfitting(train, options, at_least, at_most):
    trainer = run_robust_overfitting(train, save_strategy="epoch", **options)
    assert "robust_overfitting" in recorded_alarms(trainer.state.log_history)
    assert at_least < trainer.evaluate()["eval_robust_accuracy"] < at_most


def quantised(model):
    """The model behind a rounding of its input to a few levels: no derivative anywhere."""

    def round_input(module, args, kwargs):
        return args, {**kwargs, "pixel_values": torch.round(kwargs["pixel_values"] * 4) / 4}

    model.register_forward_pre_hook(round_input, with_kwargs=True)
    return model


def test_gradient_masking(train):
    trainer = train(
        quantised(make_model("vit")),
        Patterns(64),
        num_train_epochs=3,
        learning_rate=5e-3,
        eval_strategy="no",
        epsilon_schedule_type="hinge",
    )
    assert list(recorded_alarms(trainer.state.log_history)) == ["gradient_masking"]
    assert logged(trainer, "adversarial_accuracy")[-1] > 0.9  # and the log looks well
    assert "exactly zero for 100.0 % of the probed training examples" in logged(trainer, "message")[0]


# --- Runs that go well ---

HEALTHY = {
    "vit, at, hinge": (lambda: make_model("vit"), {"epsilon_schedule_type": "hinge"}),
    "convnext, trades, linear": (
        lambda: convnext(8, 16),
        {"robust_loss": "trades", "epsilon_schedule_type": "linear"},
    ),
    "timm, at, constant": (timm_convnext, {"num_train_epochs": 3, "epsilon": "4/255"}),
    "resnet, standard": (resnet, {"robust_loss": "standard"}),
    "dinov2, mart, cosine": (
        lambda: make_model("dinov2"),
        {"robust_loss": "mart", "epsilon_schedule_type": "cosine"},
    ),
    "convnext, fgsm, constant": (
        lambda: convnext(8, 16),
        {"attack": "fgsm", "attack_steps": 1, "epsilon": "4/255"},
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_silent_on_healthy_runs(train, name):
    make, args = HEALTHY[name]
    trainer = train(make(), Patterns(128), **{"num_train_epochs": 5, "learning_rate": 5e-3, **args})
    assert recorded_alarms(trainer.state.log_history) == {}
    assert logged(trainer, "eval_accuracy")[-1] > 0.95
    if trainer.robust_loss.needs_adversarial:
        assert logged(trainer, "eval_robust_accuracy")[-1] > 0.9
    assert logged(trainer, "adaptation_onset") == [1]
    assert len(logged(trainer, "probe_epsilon")) >= 10


# --- Stopping, resuming, doing without ---


def test_abort_on_alarm(train, tmp_path):
    """Training stops with a checkpoint; resumed, it carries on and does not repeat the alarm."""
    with pytest.raises(AlarmRaised, match="Transfer failure: at epoch 1 ") as raised:
        run_transfer_failure(train, abort_on_alarm=True)
    checkpoint = raised.value.checkpoint
    assert checkpoint is not None
    state = json.loads((tmp_path / "output" / "checkpoint-8" / "trainer_state.json").read_text())
    assert checkpoint == str(tmp_path / "output" / "checkpoint-8")
    assert list(recorded_alarms(state["log_history"])) == ["transfer_failure"]
    resumed = run_transfer_failure(train, abort_on_alarm=True, checkpoint=checkpoint)
    assert resumed.state.global_step == 24
    assert logged(resumed, "alarm_transfer_failure") == [1.0]


def test_resumed_run_has_the_same_history(make_trainer, tmp_path):
    """Every 4 steps an evaluation, every second a probe, also right after the checkpoint, and an onset."""
    step = 6
    options = {
        "num_train_epochs": 2,
        "eval_epsilons": ["0", "8/255"],
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": step,
        "trainer_options": {"train_dataset": Patterns(64), "eval_dataset": Patterns(16, seed=1)},
    }
    whole = make_trainer(convnext(8, 16), output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    resumed = make_trainer(convnext(8, 16), output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert len(logged(whole, "adaptation_onset")) == 1

    def comparable(trainer):
        measured = ("runtime", "per_second", "grad_norm", "train_loss", "total_flos")
        return [
            {key: value for key, value in entry.items() if not key.endswith(measured)}
            for entry in trainer.state.log_history
        ]

    assert comparable(resumed) == comparable(whole)


def test_without_the_callback(make_trainer):
    trainer = make_trainer(num_train_epochs=1, eval_strategy="epoch")
    trainer.remove_callback(AlarmCallback)
    trainer.train()
    assert not logged(trainer, "probe_epsilon")
    assert len(logged(trainer, "adversarial_accuracy")) == 4  # which costs nothing


def test_probes_change_nothing(make_trainer):
    """Not the weights, also where dropout and the dataset draw from global generators; nor the gradients."""

    class Augmented(Images):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            noise = torch.rand(1) + np.random.rand() + random.random()
            return {**example, "pixel_values": example["pixel_values"] * (1 - 0.1 * noise.float())}

    models = []
    for removed in (False, True):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        trainer = make_trainer(
            num_train_epochs=2, gradient_accumulation_steps=2, trainer_options={"train_dataset": Augmented(32)}
        )
        if removed:
            trainer.remove_callback(AlarmCallback)
        trainer.train()
        models.append(trainer.model)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.requires_grad and one.grad is None


def test_reporters_see_numbers_only(make_trainer):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = make_trainer(quantised(make_model("vit")), max_steps=3, trainer_options={"callbacks": [Reporter()]})
    trainer.train()
    assert logged(trainer, "message")
    assert {"alarm_gradient_masking": 1.0, "epoch": 0.75} in seen
    assert all(isinstance(value, (int, float)) for logs in seen for value in logs.values())


@pytest.mark.parametrize("logging_strategy", ["steps", "epoch"])
def test_no_log_is_lost(make_trainer, logging_strategy):
    trainer = make_trainer(count=16, num_train_epochs=3, logging_strategy=logging_strategy)
    trainer.train()
    assert len(logged(trainer, "loss")) == len(logged(trainer, "adversarial_accuracy"))
    assert len(logged(trainer, "loss")) == {"steps": 6, "epoch": 3}[logging_strategy]


# --- What is measured ---


def test_adversarial_accuracy_counts_the_examples_of_the_update(make_trainer):
    """Over micro-batches and the steps between two logs, the smaller last batch included."""
    right = []

    def recording_loss(clean_logits, adversarial_logits, labels, *, weight=None, label_smoothing=0.0):
        right.append((adversarial_logits.argmax(dim=1) == labels).float())
        return torch.nn.functional.cross_entropy(adversarial_logits, labels, reduction="none")

    trainer = make_trainer(
        count=21,
        num_train_epochs=2,
        gradient_accumulation_steps=2,
        logging_steps=2,
        learning_rate=1e-2,
        trainer_options={"robust_loss": RobustLoss(recording_loss)},
    )
    trainer.remove_callback(AlarmCallback)
    trainer.train()
    assert [len(batch) for batch in right] == [8, 8, 5] * 2
    expected = [torch.cat(of_log).mean().item() for of_log in (right[:3], right[3:])]
    assert logged(trainer, "adversarial_accuracy") == pytest.approx(expected)
    assert expected[0] != expected[1]


def chance_loss(trainer):
    (callback,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, AlarmCallback))
    return callback._chance_loss()


def test_chance_loss_is_that_of_equal_probabilities(make_trainer):
    for loss, expected in {"at": np.log(4), "trades": np.log(4), "mart": np.log(4) - np.log(0.7501)}.items():
        assert chance_loss(make_trainer(robust_loss=loss)) == pytest.approx(expected, abs=1e-5)
    assert chance_loss(make_trainer(label_smoothing_factor=0.2)) == pytest.approx(np.log(4), abs=1e-5)


def test_probe_without_random_access(make_trainer):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from (Images(8)[index] for index in range(8))

    trainer = make_trainer(max_steps=2, trainer_options={"train_dataset": Stream()})
    trainer.train()
    assert not logged(trainer, "probe_epsilon")
    assert len(logged(trainer, "loss")) == 2


def test_several_evaluation_datasets(make_trainer):
    """The first counts."""
    datasets = {"wild": Patterns(16, seed=1), "hard": Images(13)}
    trainer = make_trainer(
        convnext(8, 16),
        num_train_epochs=2,
        learning_rate=1e-2,
        eval_strategy="epoch",
        eval_epsilons=["0", "8/255"],
        trainer_options={"train_dataset": Patterns(64), "eval_dataset": datasets},
    )
    trainer.train()
    accuracies = logged(trainer, "eval_wild_accuracy")
    assert logged(trainer, "adaptation_onset") == [1 + [accuracy > 0.5 for accuracy in accuracies].index(True)]


def test_the_card_says_when_the_model_began_to_learn_and_which_alarms_went_off(make_trainer):
    def card(trainer):
        trainer.create_model_card()
        with open(f"{trainer.args.output_dir}/README.md") as file:
            return file.read()

    trainer = make_trainer(quantised(make_model("vit")), max_steps=3)
    assert "Alarms in training" not in card(trainer)
    trainer.train()
    assert "first learning): not measured." in card(trainer)
    assert "- **gradient_masking**: Gradient masking: the input gradient is exactly zero" in card(trainer)
    trainer = make_trainer(num_train_epochs=1, eval_strategy="epoch", learning_rate=0.0)
    trainer.train()
    assert "first learning): never (transfer failure)." in card(trainer)
    trainer.state.log_history.append({"adversarial": 1})
    trainer.evaluate()
    assert "first learning): never (transfer failure)." in card(trainer)
