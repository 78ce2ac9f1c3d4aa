import copy
import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NUM_LABELS, SIZE, Images, make_model, weights, without_dropout
from safetensors.torch import load_model
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, ViTImageProcessor

from hf_rft import EpsilonScheduleCallback, ModuleForImageClassification, RobustTrainer, evaluate_robustness
from hf_rft.attacks import pgd
from hf_rft.cli.leaderboard import first_difference
from hf_rft.evaluation.cache import hash_model
from hf_rft.losses import LOSSES, RobustLoss, trades_loss
from hf_rft.training.alarm_callback import AlarmCallback
from hf_rft.training.card import described_arguments
from hf_rft.training.distributed import OptimizerStep


ALL_FAMILIES = ["vit", "swin", "convnext", "resnet", "dinov2", "timm"]


def assert_close(actual, expected, name, **tolerances):
    torch.testing.assert_close(actual, expected, **tolerances, msg=lambda text: f"{name}: {text}")


# --- The loss and its gradient ---


@pytest.mark.parametrize("family", ["vit", "timm"])
@pytest.mark.parametrize("robust_loss", ["standard", "at", "trades", "mart"])
@pytest.mark.parametrize(("count", "accumulation"), [(32, 4), (21, 3)])
def test_accumulated_micro_batches_give_the_gradient_of_the_large_batch(
    make_trainer, family, robust_loss, count, accumulation
):
    """4 x 8 against 32, and 8 + 8 + 5 against 21, with a random start. One SGD step with rate 1 shows the gradient."""
    updates, losses = [], []
    for batch_size, steps in ((8, accumulation), (count, 1)):
        model = without_dropout(make_model(family)).double()
        before = weights(model)
        trainer = make_trainer(
            model,
            count,
            robust_loss=robust_loss,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
        )
        trainer.train()
        updates.append({name: tensor - before[name] for name, tensor in weights(model).items()})
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert any(update.abs().max() > 1e-3 for update in updates[0].values())
    for name, update in updates[0].items():
        assert_close(update, updates[1][name], name, atol=2e-6, rtol=1e-4)


def test_an_adaptive_epsilon_does_not_depend_on_accumulation(make_trainer):
    """The accuracy that it follows is that of the whole step, whose last one is smaller."""
    epsilons = []
    for batch_size, accumulation in ((4, 4), (16, 1)):
        trainer = make_trainer(
            without_dropout(make_model("vit")).double(),
            37,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=5,
            logging_steps=1,
            optim="sgd",
            epsilon_schedule_type="adaptive",
        )
        trainer.train()
        epsilons.append([entry["epsilon"] for entry in trainer.state.log_history if "epsilon" in entry])
    assert len(epsilons[0]) == 15 and epsilons[0] == epsilons[1]
    assert epsilons[0][0] == 0 and len(set(epsilons[0])) > 5


@pytest.mark.parametrize("count", [14, 18])  # the last step of a pass has one micro-batch of 2, or two of 4 and 2
def test_a_stream_that_ends_within_a_step_trains_like_a_dataset_of_known_length(make_trainer, count):
    """Over two passes, three micro-batches a step."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return (images[index] for index in range(count))

    class Gradients(TrainerCallback):
        def __init__(self):
            self.steps = []

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    images, found = Images(count), []
    for dataset in (images, Stream()):
        gradients = Gradients()
        trainer = make_trainer(
            without_dropout(make_model("vit")),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=3,
            max_steps=4,
            train_sampling_strategy="sequential",
            trainer_options={"train_dataset": dataset, "callbacks": [gradients]},
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append((losses, gradients.steps))
    (losses, steps), (losses_of_stream, steps_of_stream) = found
    assert losses == losses_of_stream and len(steps) == len(steps_of_stream) == 4
    for step, of_stream in zip(steps, steps_of_stream, strict=True):
        assert step and all(torch.equal(gradient, of_stream[name]) for name, gradient in step.items())


@pytest.mark.parametrize("robust_loss", ["at", "trades", "mart"])
def test_loss_equals_formula_on_its_own_adversarial_examples(make_trainer, robust_loss):
    trainer = make_trainer(without_dropout(make_model("vit")), robust_loss=robust_loss, label_smoothing_factor=0.0)
    made = {}

    def recording_attack(forward, pixels, labels, **options):
        made["pixels"], made["adversarial"] = pixels, pgd(forward, pixels, labels, **options)
        return made["adversarial"]

    trainer.adversary.attack = recording_attack
    inputs = trainer.data_collator([Images(8)[i] for i in range(8)])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    assert not torch.equal(made["pixels"], made["adversarial"])

    logits = [trainer.classifier(made[key]) for key in ("pixels", "adversarial")]
    options = {} if robust_loss == "at" else {"weight": 6.0}
    expected = LOSSES[robust_loss].function(*logits, inputs["labels"], **options).mean()
    torch.testing.assert_close(loss, expected)


def test_label_smoothing_is_honoured(make_trainer):
    inputs = make_trainer().data_collator([Images(8)[i] for i in range(8)])
    losses = []
    for smoothing in (0.0, 0.3):
        trainer = make_trainer(
            without_dropout(make_model("vit")), label_smoothing_factor=smoothing, robust_loss="standard"
        )
        trainer.model.train()
        losses.append(trainer.compute_loss(trainer.model, dict(inputs)))
    logits = without_dropout(make_model("vit"))(inputs["pixel_values"]).logits
    expected = torch.nn.functional.cross_entropy(logits, inputs["labels"], label_smoothing=0.3)
    torch.testing.assert_close(losses[1], expected)
    assert losses[0] != losses[1]


def test_no_attack_runs_at_epsilon_zero(make_trainer):
    """The loss is then that of plain fine-tuning, for AT and for TRADES."""

    def no_attack(*args, **kwargs):
        raise AssertionError("attacked at epsilon 0")

    inputs = make_trainer().data_collator([Images(8)[i] for i in range(8)])
    for robust_loss in ("at", "trades"):
        trainer = make_trainer(
            without_dropout(make_model("vit")),
            robust_loss=robust_loss,
            epsilon_schedule_kwargs={"multiplier": 0.0},
            trainer_options={"attack": no_attack},
        )
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, dict(inputs))
        torch.testing.assert_close(loss, trainer.model(**inputs).loss)


# --- What an attack must leave alone ---


class Recorder(TrainerCallback):
    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states.append([(module.training, type(module).__name__) for module in model.modules()])


@pytest.mark.parametrize("family", ["resnet", "timm"])
def test_batch_norm_is_frozen_and_every_mode_comes_back(make_trainer, family):
    trainer, recorder = make_trainer(family, max_steps=2), Recorder()
    trainer.add_callback(recorder)
    buffers = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    before = weights(trainer.model)
    trainer.train()
    assert len(recorder.states) == 2
    assert all(training for state in recorder.states for training, _ in state)
    for name, buffer in trainer.model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(trainer.model).items())


def test_batch_norm_learns_statistics_when_not_frozen(make_trainer):
    trainer = make_trainer("resnet", max_steps=1, freeze_batch_norm=False)
    buffers = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    trainer.train()
    assert all(
        not torch.equal(buffer, buffers[name])
        for name, buffer in trainer.model.named_buffers()
        if name.endswith("running_mean")
    )


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("family", ["vit", "timm"])
def test_attack_changes_nothing_about_the_model(make_trainer, family, mode):
    seen = []

    def spying_attack(forward, pixels, labels, **options):
        seen.append(
            (
                any(parameter.requires_grad for parameter in model.parameters()),
                {module.training for module in model.modules() if not hasattr(module, "running_mean")},
                {module.training for module in model.modules() if getattr(module, "running_mean", None) is not None},
            )
        )
        return pgd(forward, pixels, labels, **options)

    trainer = make_trainer(
        family, attack_model_mode=mode, freeze_batch_norm=False, trainer_options={"attack": spying_attack}
    )
    model = trainer.model
    first = next(model.parameters())
    first.requires_grad_(False)
    model.train()
    some_module = list(model.modules())[3]
    some_module.eval()
    modes = [module.training for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    inputs = trainer.data_collator([Images(8)[i] for i in range(8)])

    trainer.adversary(trainer.classifier.normalization.to_pixels(inputs["pixel_values"]), inputs["labels"])

    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not first.requires_grad
    assert all(parameter.requires_grad for parameter in list(model.parameters())[1:])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    requires_grad, modes_seen, batch_norm_modes = seen[0]
    assert not requires_grad
    assert modes_seen == {mode == "train"}
    assert batch_norm_modes <= {False}


def test_attack_does_not_shift_the_data_order(make_trainer):
    orders = []
    for multiplier in (0.0, 1.0):
        order = []

        class Spying(RobustTrainer):
            def training_step(self, model, inputs, *args, order=order):
                order.append(inputs["pixel_values"].mean().item())
                return super().training_step(model, inputs, *args)

        trainer = make_trainer(
            trainer_class=Spying, num_train_epochs=2, epsilon_schedule_kwargs={"multiplier": multiplier}
        )
        trainer.train()
        orders.append(order)
    assert len(orders[0]) == 8
    assert orders[0] == orders[1]


# --- Models and features of the Trainer ---


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_trains_and_evaluates(make_trainer, family, options):
    trainer = make_trainer(family, max_steps=2, **options)
    before = weights(trainer.model)
    trainer.train()
    metrics = trainer.evaluate()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(trainer.model).items())
    assert all(math.isfinite(value) for value in metrics.values())
    grid = [metrics[f"eval_accuracy_at_{epsilon}"] for epsilon in ("0", "2/255", "4/255", "6/255", "8/255")]
    assert grid == sorted(grid, reverse=True)
    assert grid[0] == metrics["eval_accuracy"]
    assert grid[-1] == metrics["eval_robust_accuracy"]
    labels = [example["labels"] for example in trainer.eval_dataset]
    assert metrics["eval_majority_class_share"] == max(map(labels.count, labels)) / len(labels)
    expected = sum(a + b for a, b in zip(grid, grid[1:], strict=False)) / 8
    assert metrics["eval_expected_robustness"] == pytest.approx(expected)


@pytest.mark.parametrize("family", ["vit", "swin", "timm"])
def test_activation_checkpointing_changes_nothing(make_trainer, family):
    """BatchNorm stays frozen while backward runs the forward pass again."""
    results, forwards = [], []
    for checkpointing in (False, True):
        trainer = make_trainer(make_model(family).double(), max_steps=2, gradient_checkpointing=checkpointing)
        calls = []
        deepest = [
            module for module in trainer.model.modules() if isinstance(module, (torch.nn.LayerNorm, torch.nn.Conv2d))
        ]
        deepest[-2].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        results.append(weights(trainer.model))
        forwards.append(len(calls))
    assert forwards[1] > forwards[0]
    for name, tensor in results[0].items():
        assert_close(results[1][name], tensor, name)


# --- Data ---


def test_waiting_for_batches_is_counted_and_nothing_else(make_trainer, monkeypatch):
    """On a clock that only the data and the training step move."""
    clock = {"now": 0.0}
    monkeypatch.setattr("hf_rft.training.trainer.time", SimpleNamespace(perf_counter=lambda: clock["now"]))

    class SlowImages(Images):
        def __getitem__(self, index):
            clock["now"] += 1
            return super().__getitem__(index)

    class SlowTrainer(RobustTrainer):
        def training_step(self, *args, **kwargs):
            clock["now"] += 100
            return super().training_step(*args, **kwargs)

    options = {"trainer_class": SlowTrainer, "trainer_options": {"train_dataset": SlowImages(16)}}
    trainer = make_trainer(count=16, max_steps=2, **options)
    trainer.remove_callback(AlarmCallback)  # whose probe reads images of its own
    trainer.train()
    assert trainer.seconds_for_data == 16
    assert clock["now"] == 216


# --- Precision of the attack ---


@pytest.mark.parametrize("family", ["vit", "timm"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_attack_dtype_changes_the_passes_of_the_attack_only(make_trainer, family, norm):
    epsilon = {"linf": "8/255", "l2": "0.5", "l1": "6"}[norm]
    for attack_dtype, expected in ((None, torch.float32), ("bfloat16", torch.bfloat16)):
        in_attack, in_update, made = [], [], []

        def attack(forward, pixels, labels, seen=in_attack, made=made, **options):
            def recorded(images):
                logits = forward(images)
                seen.append(logits.dtype)
                return logits

            adversarial = pgd(recorded, pixels, labels, **options)
            made.append((adversarial, options["threat_model"].distance(adversarial, pixels).max()))
            return adversarial

        options = {"norm": norm, "epsilon": epsilon, "attack_dtype": attack_dtype, "max_steps": 2}
        trainer = make_trainer(family, count=8, trainer_options={"attack": attack}, **options)
        trainer.model.register_forward_hook(
            lambda module, _, output, seen=in_update: seen.append(output.logits.dtype) if module.training else None
        )
        trainer.train()
        assert in_attack == [expected] * 4  # two steps each
        assert in_update == [torch.float32] * 2
        assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
        for adversarial, distance in made:
            assert adversarial.dtype == torch.float32 and 0 <= adversarial.min() and adversarial.max() <= 1
            assert 0.5 < distance / float(trainer.threat_model.epsilon) <= 1 + 1e-5


def test_attack_in_bfloat16_is_nearly_as_strong(make_trainer):
    """The loss it reaches, against float32 and against no attack at all."""
    inputs = make_trainer().data_collator([Images(32)[i] for i in range(32)])
    losses = {}
    for name, options in {
        "none": {"epsilon_schedule_kwargs": {"multiplier": 0.0}},
        "float32": {},
        "bfloat16": {"attack_dtype": "bfloat16"},
    }.items():
        trainer = make_trainer(without_dropout(make_model("vit")), attack_steps=5, epsilon="16/255", **options)
        trainer.model.train()
        losses[name] = trainer.compute_loss(trainer.model, dict(inputs)).item()
    gain = losses["float32"] - losses["none"]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] - losses["none"] > 0.9 * gain > 0


# --- Epsilon ---


def test_epsilon_follows_the_schedule_and_is_logged_with_training(make_trainer):
    trainer = make_trainer(
        count=32,
        max_steps=8,
        epsilon_schedule_type="hinge",
        epsilon_schedule_kwargs={"start": 0.25, "end": 0.75},
        eval_strategy="steps",
        eval_steps=4,
    )
    trainer.train()
    epsilons = [entry["epsilon"] for entry in trainer.state.log_history if "loss" in entry]
    target = 8 / 255
    expected = [target * max(0.0, min(1.0, (step / 8 - 0.25) / 0.5)) for step in range(8)]
    assert epsilons == pytest.approx(expected)
    assert not any("epsilon" in entry for entry in trainer.state.log_history if "loss" not in entry)


def test_epsilon_staircase_by_epoch(make_trainer):
    trainer = make_trainer(
        num_train_epochs=4, epsilon_schedule_type="linear", epsilon_schedule_interval="epoch"
    )  # linear ends at 75 % of 4 epochs
    trainer.train()
    epsilons = [entry["epsilon"] for entry in trainer.state.log_history if "loss" in entry]
    assert epsilons == pytest.approx([8 / 255 * epoch / 3 for epoch in range(4) for _ in range(4)])


def passes_of_each_step(make_trainer, **args):
    """Forward passes of the attacks in each step of training, and the trainer."""
    passes = []

    def counting_attack(forward, pixels, labels, *, steps, **options):
        def counted(pixels):
            passes[-1] += 1
            return forward(pixels)

        passes.append(0)
        return pgd(counted, pixels, labels, steps=steps, **options)

    trainer = make_trainer(count=8, trainer_options={"attack": counting_attack}, **args)
    trainer.train()
    return passes, trainer


def test_attack_steps_follow_epsilon(make_trainer):
    """Epsilon is 0, 0, 0, 1/4, 1/2, 3/4, 1 and 1 times the target: no attack in the first three steps."""
    arguments = {"max_steps": 8, "epsilon_schedule_type": "hinge", "attack_steps": 6}
    passes, trainer = passes_of_each_step(make_trainer, attack_steps_schedule="epsilon", **arguments)
    assert passes == [2, 3, 5, 6, 6]
    assert described_arguments(trainer)["attack_steps_schedule"] == "epsilon"  # for the card
    logged = [entry["attack_steps"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [0, 0, 0, 2, 3, 5, 6, 6]

    passes, trainer = passes_of_each_step(make_trainer, **arguments)
    assert passes == [6] * 5
    assert not any("attack_steps" in entry for entry in trainer.state.log_history)


def test_attack_steps_of_the_evaluation_follow_no_schedule(make_trainer):
    def metrics(**args):
        trainer = make_trainer(epsilon_schedule_type="hinge", **args)  # epsilon is 0 as long as nothing was trained
        return trainer.evaluate(), [batch.passes for batch in trainer._eval_batches]

    (constant, passes), (scheduled, passes_scheduled) = metrics(), metrics(attack_steps_schedule="epsilon")
    assert passes == passes_scheduled and all(of_batch.backward > 0 for of_batch in passes)
    assert constant["eval_robust_accuracy"] == scheduled["eval_robust_accuracy"]


def test_schedule_callback_can_be_replaced_or_removed(make_trainer):
    class Half(EpsilonScheduleCallback):
        def multiplier(self, state):
            return 0.5

    trainer = make_trainer(max_steps=1, trainer_options={"callbacks": [Half(lambda progress: 0.0)]})
    trainer.train()
    assert trainer.state.log_history[0]["epsilon"] == pytest.approx(4 / 255)

    trainer = make_trainer(max_steps=1, epsilon_schedule_type="hinge")
    trainer.remove_callback(EpsilonScheduleCallback)
    trainer.train()
    assert trainer.state.log_history[0]["epsilon"] == pytest.approx(8 / 255)


def test_callables_override_the_arguments(make_trainer):
    calls = []

    def attack(forward, pixels, labels, *, threat_model, steps, generator=None):
        calls.append(("attack", float(threat_model.epsilon), steps, len(generator)))
        return pixels

    def eval_attack(forward, pixels, labels, *, threat_model, steps, generator=None):
        calls.append(("eval_attack", threat_model.epsilon.tolist(), steps, len(generator)))
        return pixels

    def robust_loss(clean_logits, adversarial_logits, labels, *, weight, label_smoothing):
        calls.append(("robust_loss", weight, label_smoothing))
        return trades_loss(clean_logits, adversarial_logits, labels)

    trainer = make_trainer(
        max_steps=1,
        trainer_options={
            "attack": attack,
            "eval_attack": eval_attack,
            "robust_loss": robust_loss,
            "epsilon_schedule": lambda progress: 0.25,
        },
    )
    trainer.train()
    assert calls == [("attack", pytest.approx(2 / 255), 2, 8), ("robust_loss", None, 0.0)]
    calls.clear()
    metrics = trainer.evaluate()
    # What withstands the largest epsilon needs no other: one call for each of the batches.
    counts = [count for *_, count in calls]
    assert calls == [("eval_attack", pytest.approx(count * [8 / 255]), 2, count) for count in counts]
    assert 1 <= len(calls) <= 2 and sum(counts) == round(13 * metrics["eval_accuracy"])
    assert metrics["eval_robust_accuracy"] == metrics["eval_accuracy"]


# --- Evaluation ---


def test_evaluation_does_not_depend_on_batch_size_or_training_settings(make_trainer):
    results = []
    for options in (
        {"per_device_eval_batch_size": 13},
        {"per_device_eval_batch_size": 4},
        {"per_device_eval_batch_size": 4, "attack": "fgsm", "attack_steps": 1, "attack_random_start": False},
        {"epsilon_schedule_kwargs": {"multiplier": 0.0}, "attack_model_mode": "train"},
    ):
        metrics = make_trainer(make_model("vit").double(), **options).evaluate()
        results.append({key: value for key, value in metrics.items() if "accuracy" in key or "robustness" in key})
    assert len(results[0]) == 8
    assert all(result == results[0] for result in results)


def test_predict_returns_logits_and_the_label_at_each_epsilon(make_trainer):
    trainer = make_trainer()
    output = trainer.predict(Images(13, seed=1))
    logits, predictions, distances = output.predictions
    assert logits.shape == (13, NUM_LABELS)
    assert predictions.shape == (13, 5)
    is_right = predictions[:, 0] == output.label_ids
    assert (distances[~is_right] == 0).all()
    assert (distances[is_right] > 0).all()
    assert np.array_equal(predictions[:, 0], logits.argmax(axis=1))
    assert output.metrics["test_accuracy"] == pytest.approx((predictions[:, 0] == output.label_ids).mean())


def test_user_compute_metrics_sees_clean_logits(make_trainer):
    def compute_metrics(evaluation):
        logits, labels = evaluation
        assert evaluation.predictions is logits
        assert (logits.shape, labels.shape) == ((13, 2), (13,))
        return {"largest": float(logits.max())}

    trainer = make_trainer(
        trainer_options={
            "compute_metrics": compute_metrics,
            "preprocess_logits_for_metrics": lambda logits, labels: logits[:, :2],
        }
    )
    metrics = trainer.evaluate()
    assert "eval_largest" in metrics
    assert "eval_robust_accuracy" in metrics
    assert trainer.robustness_report.margins is None, "not those of all logits"
    plain = make_trainer()
    logits = torch.tensor(plain.predict(plain.eval_dataset).predictions[0])
    largest, second = logits.topk(2, dim=1).values.unbind(dim=1)
    assert plain.robustness_report.margins == pytest.approx((largest - second).numpy())


def test_evaluation_settings_name_everything_and_are_json(make_trainer):
    def own_attack(forward, pixels, labels, *, threat_model, steps, generator=None):
        return pixels

    settings = make_trainer(norm="l2", epsilon="0.5", eval_attack_steps=20, seed=3).evaluator.describe()
    assert json.loads(json.dumps(settings)) == settings
    versions = settings.pop("versions")
    assert {"hf_rft", "torch", "transformers"} <= set(versions)
    assert torch.__version__.startswith(versions["torch"])
    assert settings == {
        "norm": "l2",
        "epsilons": ["0", "0.125", "0.25", "0.375", "0.5"],
        "tier": "custom",
        "attacks": [{"attack": "apgd", "steps": 20, "restarts": 1}],
        "guess_steps": 0,
        "seed": 3,
    }
    named = make_trainer(trainer_options={"eval_attack": own_attack}).evaluator.describe()
    assert named["attacks"] == [{"attack": "own_attack", "steps": 2, "restarts": 1}]


def test_cheap_evaluation_during_training(make_trainer):
    trainer = make_trainer(num_train_epochs=1, eval_strategy="epoch", eval_attack_during_training=False)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(logged) == 1
    assert "eval_robust_accuracy" not in logged[0]
    assert "eval_robust_accuracy" in trainer.evaluate()


def test_several_evaluation_datasets(make_trainer):
    trainer = make_trainer(trainer_options={"eval_dataset": {"one": Images(5), "two": Images(6, seed=1)}})
    metrics = trainer.evaluate()
    assert {"eval_one_robust_accuracy", "eval_two_expected_robustness"} <= set(metrics)


def test_predict_without_labels_returns_plain_logits(make_trainer):
    class Unlabelled(Images):
        def __getitem__(self, index):
            return {"pixel_values": super().__getitem__(index)["pixel_values"]}

    options = {"preprocess_logits_for_metrics": lambda logits, labels: 2 * logits}
    logits = make_trainer(trainer_options=options).predict(Unlabelled(5)).predictions
    expected = make_trainer().predict(Unlabelled(5)).predictions
    assert logits.shape == (5, NUM_LABELS)
    assert np.allclose(logits, 2 * expected)


# --- Resume and best model ---


class Augmented(torch.utils.data.Dataset):
    """Images with random noise from the global generator, as a random augmentation would draw it."""

    def __new__(cls, count):
        from hf_rft.data.augmentation import SeededAugmentation

        def transform(example):
            noise = 0.2 * torch.rand_like(example["pixel_values"])
            return {**example, "pixel_values": 0.8 * example["pixel_values"] + noise}

        return SeededAugmentation(Images(count), transform, seed=3)


@pytest.mark.parametrize("family", ["vit", "swin", "timm"])
@pytest.mark.parametrize("save_steps", [4, 3, 6], ids=["at an epoch's end", "within an epoch", "in the second epoch"])
def test_resume_is_exact(make_trainer, tmp_path, family, save_steps):
    """With dropout and random augmentation on, and an attack with a random start, to the last bit."""
    options = {
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": save_steps,
        "epsilon_schedule_type": "linear",
        "trainer_options": {"train_dataset": Augmented(32)},
    }
    whole = make_trainer(family, output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    resumed = make_trainer(family, output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{save_steps}"))
    assert resumed.state.global_step == whole.state.global_step == 8
    expected = weights(whole.model)
    for name, tensor in weights(resumed.model).items():
        assert torch.equal(tensor, expected[name]), name
    assert len(resumed.state.log_history) == len(whole.state.log_history)
    for one, other in zip(whole.state.log_history[-4:-1], resumed.state.log_history[-4:-1], strict=True):
        assert {**one, "grad_norm": 0} == {**other, "grad_norm": 0}


@pytest.mark.parametrize("family", ["vit", "swin", "timm"])
@pytest.mark.parametrize("metric", ["robust_accuracy", "expected_robustness"])
def test_best_model_is_reloaded_whole(make_trainer, family, metric):
    class BestFirst(RobustTrainer):
        """Metrics that say the first checkpoint is the best one."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            measure = self.compute_metrics
            self.compute_metrics = lambda evaluation: measure(evaluation) | {metric: 1 - self.state.global_step / 100}

    kept = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            kept[state.global_step] = weights(model)

    trainer = make_trainer(
        family,
        trainer_class=BestFirst,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        trainer_options={"callbacks": [Keep()]},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    for name, tensor in weights(trainer.model).items():
        assert torch.equal(tensor, kept[2][name]), name
    assert any(not torch.equal(tensor, kept[6][name]) for name, tensor in weights(trainer.model).items())


class LessAndLessRobust(RobustTrainer):
    """Metrics that fall with every step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        measure, falling = self.compute_metrics, lambda: {"robust_accuracy": 1 - self.state.global_step / 100}
        self.compute_metrics = lambda evaluation: measure(evaluation) | falling()


BEST_OF_A_RAMP = {
    "max_steps": 6,
    "epsilon_schedule_type": "hinge",
    "epsilon_schedule_kwargs": {"start": 0.0, "end": 0.5},  # the fourth step is the first at full epsilon
    "eval_strategy": "steps",
    "eval_steps": 1,
    "eval_epsilons": ["0", "8/255"],
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}


@pytest.mark.parametrize(("at_any_epsilon", "best"), [(False, 4), (True, 1)])
def test_the_best_model_is_chosen_at_the_epsilon_with_which_training_ends(
    make_trainer, caplog, monkeypatch, at_any_epsilon, best
):
    monkeypatch.setattr(logging.getLogger("hf_rft"), "propagate", True)
    options = {**BEST_OF_A_RAMP, "best_model_at_any_epsilon": at_any_epsilon}
    trainer = make_trainer(trainer_class=LessAndLessRobust, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.state.best_metric == pytest.approx(1 - best / 100)
    assert ("may come from the ramp" in caplog.text) == at_any_epsilon


@pytest.mark.parametrize(("at_any_epsilon", "end"), [(False, 5), (True, 2)])
def test_early_stopping_does_not_count_what_was_measured_on_the_ramp(make_trainer, at_any_epsilon, end):
    options = {**BEST_OF_A_RAMP, "best_model_at_any_epsilon": at_any_epsilon}
    callbacks = {"callbacks": [EarlyStoppingCallback()]}
    trainer = make_trainer(trainer_class=LessAndLessRobust, trainer_options=callbacks, **options)
    trainer.train()
    assert trainer.state.global_step == end


def test_plain_fine_tuning_chooses_among_all_its_models(make_trainer):
    trainer = make_trainer(trainer_class=LessAndLessRobust, robust_loss="standard", **BEST_OF_A_RAMP)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")


def test_a_run_stopped_on_the_ramp_keeps_its_last_model_and_says_so(make_trainer, caplog, monkeypatch):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    monkeypatch.setattr(logging.getLogger("hf_rft"), "propagate", True)
    trainer = make_trainer(**BEST_OF_A_RAMP, trainer_options={"callbacks": [Stop()]})
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.state.best_model_checkpoint is None
    assert "There is no best model to load: no evaluation took place at the final epsilon" in caplog.text


def test_saved_model_is_plain_transformers(make_trainer, tmp_path):
    from transformers import AutoModelForImageClassification

    trainer = make_trainer("vit", max_steps=1)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "output")
    expected = weights(trainer.model)
    for name, tensor in weights(loaded).items():
        assert torch.equal(tensor, expected[name]), name


# --- Bad input ---


def test_needs_an_image_processor(make_trainer):
    with pytest.raises(ValueError, match="`processing_class` is None; pass the model's image processor"):
        make_trainer(trainer_options={"processing_class": None})


def test_needs_its_own_arguments(make_trainer, tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(ValueError, match="`args` must be RobustTrainingArguments, got TrainingArguments"):
        RobustTrainer(make_model("vit"), TrainingArguments(output_dir=str(tmp_path)))


def test_refuses_compute_loss_func(make_trainer):
    with pytest.raises(ValueError, match="pass `robust_loss` instead"):
        make_trainer(trainer_options={"compute_loss_func": lambda *args, **kwargs: None})


class WeightedTrainer(RobustTrainer):
    """The usual pattern for class weights: it knows nothing of attacks."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"], weight=torch.ones(4))
        return (loss, outputs) if return_outputs else loss


class DoubledTrainer(RobustTrainer):
    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)


def test_refuses_a_compute_loss_that_bypasses_the_attack_before_the_weights_change(make_trainer):
    trainer = make_trainer(max_steps=2, trainer_class=WeightedTrainer)
    before = weights(trainer.model)
    message = "WeightedTrainer ran no attack in optimizer step 1.*`compute_loss`.*`super.*`RobustTrainer.robust_loss="
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    for name, tensor in weights(trainer.model).items():
        assert torch.equal(tensor, before[name]), name


def test_a_bypassed_attack_is_noticed_at_the_first_step_that_needs_one(make_trainer):
    options = {"epsilon_schedule": lambda progress: float(progress >= 0.5)}
    trainer = make_trainer(max_steps=4, trainer_class=WeightedTrainer, trainer_options=options)
    with pytest.raises(RuntimeError, match="ran no attack in optimizer step 3"):
        trainer.train()


def test_a_compute_loss_of_your_own_may_build_on_ours(make_trainer):
    losses = {}
    for trainer_class in (RobustTrainer, DoubledTrainer):
        trainer = make_trainer(without_dropout(make_model("vit")), max_steps=1, trainer_class=trainer_class)
        losses[trainer_class] = trainer.train().training_loss
    assert losses[DoubledTrainer] == pytest.approx(2 * losses[RobustTrainer])


def test_without_an_attack_in_the_schedule_any_compute_loss_will_do(make_trainer):
    make_trainer(max_steps=1, trainer_class=WeightedTrainer, robust_loss="standard").train()


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits, labels: logits,
        lambda clean_logits, adversarial_logits, labels: clean_logits,
        lambda clean_logits, adversarial_logits, labels, *, weight: clean_logits,
    ],
)
def test_refuses_a_loss_of_another_signature_when_it_is_passed(make_trainer, loss):
    message = r"must take `\(clean_logits, adversarial_logits, labels, \*, weight, label_smoothing\)`, but its sig"
    for robust_loss in (loss, RobustLoss(loss)):
        with pytest.raises(ValueError, match=message):
            make_trainer(trainer_options={"robust_loss": robust_loss})


def test_refuses_a_schedule_of_another_signature_when_it_is_passed(make_trainer):
    with pytest.raises(ValueError, match=r"is called as `epsilon_schedule\(progress\)`.*missing a required argument"):
        make_trainer(trainer_options={"epsilon_schedule": lambda step, total: step / total})


def test_a_schedule_beyond_epsilon_is_refused_before_the_first_step(make_trainer):
    class Double(EpsilonScheduleCallback):
        def multiplier(self, state):
            return 2.0

    for options in ({"epsilon_schedule": lambda p: 2 * p}, {"callbacks": [Double(lambda p: p)]}):
        trainer = make_trainer(max_steps=1, trainer_options=options)
        with pytest.raises(ValueError, match="must return a multiplier of epsilon from 0 to 1. To train beyond"):
            trainer.train()
        assert trainer.state.global_step == 0


def test_refuses_two_schedules(make_trainer):
    options = {"callbacks": [EpsilonScheduleCallback(lambda p: p)], "epsilon_schedule": lambda p: p}
    with pytest.raises(ValueError, match="either `epsilon_schedule` or an `EpsilonScheduleCallback`"):
        make_trainer(trainer_options=options)


def test_refuses_an_empty_dataset(make_trainer):
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        make_trainer(count=0)


def test_refuses_labels_the_model_has_no_class_for(make_trainer):
    trainer = make_trainer(max_steps=1, trainer_options={"train_dataset": Images(32, num_labels=7)})
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=r"labels from \d to 6, but the model has 4 classes \(0 to 3\); load it with"):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer.model).items())


def test_refuses_pixels_out_of_range_before_the_first_step(make_trainer):
    class Bytes(Images):
        def __getitem__(self, index):
            return {"pixel_values": 255 * self.pixels[index], "labels": int(self.labels[index])}

    trainer = make_trainer(max_steps=1, trainer_options={"train_dataset": Bytes(32)})
    before = weights(trainer.model)
    with pytest.raises(ValueError, match="They look like bytes 0..255: the processor's `do_rescale`"):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer.model).items())


def test_refuses_a_batch_without_images(make_trainer):
    trainer = make_trainer()
    with pytest.raises(ValueError, match=r"A batch has no \['pixel_values'\], its keys are \['image', 'labels'\]"):
        trainer.compute_loss(trainer.model, {"image": torch.zeros(1), "labels": torch.zeros(1)})


def test_trainer_does_not_modify_its_arguments(make_trainer):
    trainer = make_trainer(max_steps=1)
    before = copy.deepcopy(trainer.args.to_dict())
    trainer.train()
    trainer.evaluate()
    assert trainer.args.to_dict() == before


def test_refuses_what_is_no_classifier(make_trainer):
    with pytest.raises(ValueError, match="at least 2 classes, one of which is right; got Linear with num_labels=None"):
        make_trainer(torch.nn.Linear(2, 2))
    for setting in ("regression", "multi_label_classification"):
        model = make_model("vit")
        model.config.problem_type = setting
        with pytest.raises(ValueError, match=f"problem_type='{setting}'"):
            make_trainer(model)


def test_a_plain_module_is_trained_once_it_is_wrapped(make_trainer, tmp_path):
    """Folded, evaluated, saved, resumed and its best weights loaded, like any other model."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    module = nn.Sequential(*layers, nn.Linear(8, NUM_LABELS)).double()
    with pytest.raises(ValueError, match=r"wrap a module of your own: `hf_rft.ModuleForImageClassification\(module"):
        make_trainer(module)
    options = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    }
    start = copy.deepcopy(module)
    trainer = make_trainer(ModuleForImageClassification(module, "abcd"), **options)
    assert len(trainer.adversary.foldable_pairs) == 1
    trainer.train()
    trainer.save_model()
    assert trainer.evaluate()["eval_robust_accuracy"] == trainer.robustness_report.robust_accuracy
    saved = ModuleForImageClassification(copy.deepcopy(start), "abcd")
    load_model(saved, tmp_path / "output" / "model.safetensors")
    assert hash_model(saved.module) == hash_model(module) != hash_model(start)
    resumed = make_trainer(ModuleForImageClassification(start, "abcd"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-2"))
    assert hash_model(start) == hash_model(module)


def test_refuses_a_weight_the_loss_does_not_have(make_trainer):
    with pytest.raises(ValueError, match="`robust_loss_weight=1.0` has no effect on `robust_loss='at'`"):
        make_trainer(robust_loss="at", robust_loss_weight=1.0)


def test_own_loss_gets_the_weight(make_trainer):
    seen = []

    def robust_loss(clean_logits, adversarial_logits, labels, *, weight, label_smoothing):
        seen.append(weight)
        return trades_loss(clean_logits, adversarial_logits, labels, weight=weight)

    make_trainer(max_steps=1, robust_loss_weight=3.0, trainer_options={"robust_loss": robust_loss}).train()
    assert seen == [3.0]


def test_own_attack_must_take_the_objective_of_trades(make_trainer):
    def attack(forward, pixels, labels, *, threat_model, steps, generator=None):
        return pixels

    with pytest.raises(ValueError, match="takes no `objective`, but this `robust_loss` chooses"):
        make_trainer(robust_loss="trades", trainer_options={"attack": attack})


def test_own_attack_must_stay_in_the_ball(make_trainer):
    def attack(forward, pixels, labels, **options):
        return 1 - pixels

    for name in ("attack", "eval_attack"):
        trainer = make_trainer(max_steps=1, trainer_options={name: attack})
        with pytest.raises(ValueError, match="outside the linf ball of radius .*; end it with `threat_model.pro"):
            trainer.train()
            trainer.evaluate()


def test_epoch_interval_needs_a_dataset_with_a_length(make_trainer):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            images = Images(32)
            return (images[index] for index in range(32))

    options = {"trainer_options": {"train_dataset": Stream()}, "max_steps": 1}
    make_trainer(**options).train()
    with pytest.raises(ValueError, match="`epsilon_schedule_interval='epoch'` needs a training dataset with a length"):
        make_trainer(epsilon_schedule_interval="epoch", **options).train()


def test_plain_fine_tuning_logs_epsilon_zero(make_trainer):
    trainer = make_trainer(robust_loss="standard", max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["epsilon"] == 0


def test_perturbation_of_bytes_is_not_rounded(make_trainer):
    """A processor that neither rescales nor normalises returns bytes, which cannot hold a perturbation."""
    processor = ViTImageProcessor(do_rescale=False, do_normalize=False)
    trainer = make_trainer(trainer_options={"processing_class": processor})
    pixel_values = torch.randint(0, 256, (8, 3, SIZE, SIZE), dtype=torch.uint8)
    step = OptimizerStep(8, [8])
    adversarial = trainer._adversarial_values(pixel_values, torch.zeros(8, dtype=torch.long), step, 0, {})
    distance = (adversarial - pixel_values).abs().amax()
    assert 0 < distance <= 8 + 1e-3


def test_a_model_made_by_model_init_is_the_one_that_is_attacked(make_trainer):
    made = []

    def model_init():
        made.append(without_dropout(make_model("resnet", seed=len(made))))
        return made[-1]

    trainer = make_trainer(None, max_steps=2, trainer_options={"model_init": model_init})
    trainer.train()
    assert trainer.classifier.model is trainer.model is made[-1] and len(made) > 1
    assert trainer.adversary.classifier is trainer.classifier
    assert all(pair.batch_norm in made[-1].modules() for pair in trainer.adversary.foldable_pairs)
    trainer.evaluate()
    assert trainer.robustness_report.settings["model"]["sha256"] == hash_model(trainer.model)


def test_report_is_comparable_with_an_evaluation_of_the_same_protocol(make_trainer, processor):
    trainer = make_trainer(per_device_eval_batch_size=4)
    trainer.evaluate()
    options = {"norm": "linf", "epsilons": trainer.evaluator.epsilons, "tier": [("apgd", 2)], "batch_size": 5}
    other = evaluate_robustness(trainer.model, Images(13, seed=1), processor, **options)
    assert first_difference(trainer.robustness_report, other) is None
    trainer.evaluate(Images(13, seed=2))
    assert first_difference(trainer.robustness_report, other).startswith("data (SHA-256): ")


def test_the_last_log_of_a_pass_over_a_stream_is_about_its_steps(make_trainer):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return (Images(16)[index] for index in range(16))

    trainer = make_trainer(max_steps=4, logging_strategy="epoch", trainer_options={"train_dataset": Stream()})
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert all({"epsilon", "adversarial_accuracy"} <= set(entry) for entry in logged)
