"""Checkpoints of a trainer that is killed while it writes them, or runs out of space."""

import json
import logging
import math
import os
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from conftest import Images, make_adapted, make_model, weights
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from hf_rft.data import bundled
from hf_rft.training import resuming
from hf_rft.training.checkpoints import MARKER_NAME, complete_checkpoints, why_incomplete
from hf_rft.training.distributed import NonFiniteError


class Killed(BaseException):
    """What nobody catches, as nobody catches SIGKILL."""


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


@pytest.fixture
def warnings_of(caplog, monkeypatch):
    """Messages of transformers' loggers, which do not propagate by default."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_rft"), "propagate", True)
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def whole(make_trainer, tmp_path):
    trainer = make_trainer(output_dir=str(tmp_path / "whole"), **SAVING)
    trainer.train()
    return trainer


def assert_same(resumed, whole):
    assert resumed.state.global_step == whole.state.global_step
    for (name, tensor), other in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name
    timing = ("_runtime", "_per_second", "train_loss")
    logs = [
        [{key: value for key, value in entry.items() if not key.endswith(timing)} for entry in history]
        for history in (whole.state.log_history, resumed.state.log_history)
    ]
    assert logs[0] == logs[1]


def names(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize(
    ("family", "options"), [("timm", {}), ("vit", {"weight_averaging": "ema"}), ("vit", {"head_warmup_steps": 3})]
)
def test_adapters_resume_exactly(make_trainer, tmp_path, family, options):
    options = {**SAVING, "learning_rate": 1e-2, **options}
    whole = make_trainer(make_adapted(family), **options)
    start = weights(whole.model)
    whole.train()
    resumed = make_trainer(make_adapted(family, seed=1), output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(str(tmp_path / "output" / "checkpoint-2"))
    assert_same(resumed, whole)
    changed = {name for name, value in weights(whole.model).items() if not torch.equal(value, start[name])}
    assert changed and all("lora_" in name or "modules_to_save" in name for name in changed)


def test_a_checkpoint_of_the_other_kind_is_refused(make_trainer, tmp_path):
    make_trainer(make_adapted("vit"), **{**SAVING, "max_steps": 2}).train()
    with pytest.raises(ValueError, match="holds an adapter, but the trainer trains a whole model; resume with"):
        make_trainer().train(str(tmp_path / "output" / "checkpoint-2"))


def test_the_best_adapter_is_loaded(make_trainer):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 1e-2}
    options |= {"metric_for_best_model": "loss", "greater_is_better": True}  # the loss falls: the first is best
    trainer = make_trainer(make_adapted("vit"), **SAVING, **options)
    trainer.train()
    assert trainer.state.best_global_step == 2
    saved = load_file(Path(trainer.state.best_model_checkpoint, "adapter_model.safetensors"))
    found = get_peft_model_state_dict(trainer.model)
    assert saved.keys() == found.keys() and all(torch.equal(value, found[name]) for name, value in saved.items())


@pytest.mark.parametrize(
    "moment", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "mark_complete", "rotate_checkpoints"]
)
def test_killed_inside_a_checkpoint(make_trainer, tmp_path, monkeypatch, warnings_of, whole, moment):
    """At each stage of the second checkpoint, with room for one: the next start takes the last complete one."""
    holder = resuming if hasattr(resuming, moment) else Trainer
    original = getattr(holder, moment)

    def half_done(*args, **kwargs):
        if state["step"] == 4:
            raise Killed
        return original(*args, **kwargs)

    state = {"step": 0}

    class Count(TrainerCallback):
        def on_step_end(self, args, trainer_state, control, **kwargs):
            state["step"] = trainer_state.global_step

    options = {**SAVING, "output_dir": str(tmp_path / "run"), "save_total_limit": 1}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(holder, moment, half_done)
        make_trainer(**options, trainer_options={"callbacks": [Count()]}).train()
    expected = "checkpoint-4" if moment == "rotate_checkpoints" else "checkpoint-2"
    assert [path.name for path in complete_checkpoints(tmp_path / "run")][-1] == expected

    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    assert f"resumes from {tmp_path / 'run' / expected}." in warnings_of()
    if (moment, expected) != ("save_model", "checkpoint-2") and expected == "checkpoint-2":
        assert f"{tmp_path / 'run' / 'checkpoint-4'} is ignored because it is not complete" in warnings_of()
    assert_same(resumed, whole)
    assert names(tmp_path / "run") == ["checkpoint-6"]
    assert why_incomplete(tmp_path / "run" / "checkpoint-6") is None


@pytest.mark.parametrize("damage", ["truncated", "missing", "no marker", "bad marker", "empty marker"])
def test_damaged_checkpoints_are_ignored_and_named(make_trainer, tmp_path, warnings_of, whole, damage):
    run = Path(shutil.copytree(tmp_path / "whole", tmp_path / "run"))
    shutil.rmtree(run / "checkpoint-6")
    last = run / "checkpoint-4"
    if damage == "truncated":
        os.truncate(last / "optimizer.pt", 100)
    elif damage == "missing":
        (last / "scheduler.pt").unlink()
    elif damage == "no marker":
        (last / MARKER_NAME).unlink()
    else:
        (last / MARKER_NAME).write_text("{" if damage == "bad marker" else "{}")
    reason = {"truncated": "optimizer.pt has 100 bytes instead of", "missing": "scheduler.pt is missing"}
    resumed = make_trainer(output_dir=str(run), **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert f"{last} is ignored because it is not complete: {reason.get(damage, '')}" in warnings_of()
    assert f"resumes from {run / 'checkpoint-2'}." in warnings_of()
    assert_same(resumed, whole)


def test_a_damaged_checkpoint_is_refused_when_named(make_trainer, tmp_path, whole):
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    os.truncate(checkpoint / "rng_state.pth", 1)
    message = r"checkpoint-4'` is not complete: rng_state.pth has 1 bytes instead of \d+. Resume from an earlier one"
    with pytest.raises(ValueError, match=message):
        make_trainer(**SAVING).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_without_marker_is_taken_when_named(make_trainer, tmp_path, warnings_of, whole):
    """A plain Trainer's, or one from the Hub."""
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    (checkpoint / MARKER_NAME).unlink()
    resumed = make_trainer(output_dir=str(tmp_path / "run"), **SAVING)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert "which may not be complete" in warnings_of()
    assert_same(resumed, whole)


def test_folders_that_are_no_checkpoint(make_trainer, tmp_path, whole):
    trainer = make_trainer(output_dir=str(tmp_path / "run"), **SAVING)
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match=f"`resume_from_checkpoint='{folder}'` is not a checkpoint"):
            trainer.train(resume_from_checkpoint=str(folder))
    with pytest.raises(ValueError, match="`resume_from_checkpoint=True`, but `output_dir='.*run'` holds no complete"):
        trainer.train(resume_from_checkpoint=True)
    assert resuming.find_checkpoint(trainer) is None
    assert not names(tmp_path / "run")


def test_without_optimizer_state_nothing_goes_on(make_trainer, tmp_path):
    options = {**SAVING, "output_dir": str(tmp_path / "run")}
    make_trainer(**options, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"checkpoint-6'` has no optimizer state \(`save_only_model=True`\?\)"):
        make_trainer(**options).train(resume_from_checkpoint=True)


def test_rotation_keeps_the_best_and_counts_complete_ones_only(make_trainer, tmp_path, warnings_of):
    run = tmp_path / "run"

    class BestSecond(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_robust_accuracy"] = 1.0 if state.global_step == 2 else 0.0

    (run / "checkpoint-1").mkdir(parents=True)  # torn, of an earlier attempt
    trainer = make_trainer(
        output_dir=str(run),
        max_steps=5,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="robust_accuracy",
        greater_is_better=True,
        trainer_options={"callbacks": [BestSecond()]},
    )
    (run / "checkpoint-0").mkdir()
    seen = []
    trainer.add_callback(
        type("Look", (TrainerCallback,), {"on_save": lambda self, *a, **k: seen.append(names(run))})()
    )
    trainer.train()
    assert seen == [
        ["checkpoint-0", "checkpoint-1"],
        ["checkpoint-0", "checkpoint-1", "checkpoint-2"],
        ["checkpoint-0", "checkpoint-2", "checkpoint-3"],
        ["checkpoint-0", "checkpoint-2", "checkpoint-4"],
        ["checkpoint-0", "checkpoint-2", "checkpoint-5"],
    ]


def test_a_best_checkpoint_that_is_damaged_is_forgotten(make_trainer, tmp_path, warnings_of):
    options = {
        **SAVING,
        "output_dir": str(tmp_path / "run"),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "robust_accuracy",
    }
    first = make_trainer(**options)
    first.train()
    best = Path(first.state.best_model_checkpoint)
    state_path = tmp_path / "run" / "checkpoint-4" / "trainer_state.json"
    if best.name != "checkpoint-2":  # let the state of checkpoint-4 name it, whatever the tiny model did
        state = json.loads(state_path.read_text())
        state["best_model_checkpoint"] = str(tmp_path / "run" / "checkpoint-2")
        state_path.write_text(json.dumps(state))
        (tmp_path / "run" / "checkpoint-4" / MARKER_NAME).unlink()
    os.truncate(tmp_path / "run" / "checkpoint-2" / "model.safetensors", 10)
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert "The best checkpoint so far" in warnings_of() and "model.safetensors has 10 bytes" in warnings_of()
    assert resumed.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-6")


@pytest.mark.parametrize("stage", ["_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_full_disk_loses_nothing(make_trainer, tmp_path, monkeypatch, whole, stage):
    original = getattr(Trainer, stage)

    def full(self, folder):
        if "checkpoint-4" in folder:
            raise OSError(28, "No space left on device")
        return original(self, folder)

    options = {**SAVING, "output_dir": str(tmp_path / "run"), "save_total_limit": 1}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, stage, full)
        message = "checkpoint-4 could not be written after step 4: .*No space left.*last complete checkpoint is .*-2"
        with pytest.raises(OSError, match=message):
            make_trainer(**options).train()
    assert names(tmp_path / "run") == ["checkpoint-2"]
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)


# --- Streams ---


class Stream(torch.utils.data.IterableDataset):
    """18 images in another order in each pass; nobody is told how many they are."""

    images, epoch = Images(18), 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(18, generator=torch.Generator().manual_seed(self.epoch))
        return (self.images[index] for index in order.tolist())


@pytest.mark.parametrize(
    ("strategy", "accumulation", "steps"),
    [
        ("steps", 1, [5, 7]),  # a pass has 5 steps
        ("steps", 2, [3, 4, 8]),  # 3 steps, the last of one micro-batch
        ("epoch", 2, [6]),
    ],
)
def test_a_stream_resumed_in_any_pass_ends_like_one_that_was_not_interrupted(
    make_trainer, tmp_path, strategy, accumulation, steps
):
    options = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 12,
        "save_strategy": strategy,
        "save_steps": 1,
        "eval_strategy": "epoch",
        "eval_attack_during_training": False,
    }

    def run(folder, checkpoint=None, **changes):
        trainer = make_trainer(
            output_dir=str(tmp_path / folder), trainer_options={"train_dataset": Stream()}, **{**options, **changes}
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = run("whole")
    for step in steps:
        assert_same(run(f"from-{step}", tmp_path / "whole" / f"checkpoint-{step}"), whole)


def test_bundled_data_streamed_are_trained_evaluated_and_resumed(make_trainer, processor, tmp_path, monkeypatch):
    """Shuffled anew in each pass, and transformed, by `datasets` itself; evaluated on the first few."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s at each end of a reading

    def prepared(example):
        image = example["image"].convert("RGB")
        values = processor(image, return_tensors="np")["pixel_values"][0]
        return {"pixel_values": values, "labels": example["label"] % 4}

    def run(folder, checkpoint=None):
        splits = datasets.load_dataset(bundled.resolve("bundled:fashion_mnist_5k"), streaming=True)
        splits = {name: stream.map(prepared, remove_columns=["image", "label"]) for name, stream in splits.items()}
        train = splits["train"].shuffle(seed=1, buffer_size=20).take(28)
        data = {"train_dataset": train, "eval_dataset": splits["test"].take(13)}
        options = {
            "max_steps": 9,
            "save_strategy": "steps",
            "save_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 3,
        }
        trainer = make_trainer(output_dir=str(tmp_path / folder), trainer_options=data, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = run("whole")
    assert whole.state.epoch > 1  # 4 steps a pass
    assert len(whole.robustness_report) == 13
    for step in (2, 5):
        assert_same(run(f"from-{step}", tmp_path / "whole" / f"checkpoint-{step}"), whole)


@pytest.mark.parametrize("stream", [False, True])
def test_an_adaptive_epsilon_resumes_exactly_also_between_two_logs(make_trainer, tmp_path, stream):
    options = {"max_steps": 24, "save_strategy": "steps", "save_steps": 1, "logging_steps": 2}
    options |= {"epsilon_schedule_type": "adaptive", "per_device_train_batch_size": 4}

    def run(folder, checkpoint=None):
        data = {"train_dataset": Stream()} if stream else None
        trainer = make_trainer(output_dir=str(tmp_path / folder), trainer_options=data, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    def path_of_epsilon(trainer):
        # Not the loss: after a resume, `Trainer` averages it over fewer steps than it divides by.
        entries = (entry for entry in trainer.state.log_history if "epsilon" in entry)
        return [(entry["epsilon"], entry["adversarial_accuracy"]) for entry in entries]

    whole = run("whole")
    assert path_of_epsilon(whole)[0][0] == 0 and len({epsilon for epsilon, _ in path_of_epsilon(whole)}) > 5
    for step in (6, 7, 11):
        resumed = run(f"from-{step}", tmp_path / "whole" / f"checkpoint-{step}")
        assert path_of_epsilon(resumed) == path_of_epsilon(whole)
        for name, tensor in weights(whole.model).items():
            assert torch.equal(weights(resumed.model)[name], tensor), name


def test_a_stream_that_was_trained_to_its_end_goes_on_only_if_the_end_is_put_off(make_trainer, tmp_path):
    def run(max_steps, checkpoint=None):
        trainer = make_trainer(
            output_dir=str(tmp_path / f"{max_steps} steps"),
            max_steps=max_steps,
            per_device_train_batch_size=4,
            lr_scheduler_type="constant",
            save_strategy="steps",
            save_steps=1,
            trainer_options={"train_dataset": Stream()},
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer.state.global_step, weights(trainer.model)

    step, shorter = run(8)
    again, same = run(8, tmp_path / "8 steps" / "checkpoint-8")
    assert step == again == 8 and all(torch.equal(tensor, same[name]) for name, tensor in shorter.items())
    _, resumed = run(12, tmp_path / "8 steps" / "checkpoint-7")
    step, longer = run(12)
    assert step == 12 and all(torch.equal(tensor, resumed[name]) for name, tensor in longer.items())


# --- Losses and gradients that are not finite ---


@pytest.mark.parametrize(("accumulation", "micro_batch"), [(1, 1), (3, 2)])
def test_a_loss_that_is_not_finite_stops_before_the_step(make_trainer, tmp_path, accumulation, micro_batch):
    calls = []

    def loss(clean_logits, adversarial_logits, labels, **_):
        calls.append(len(labels))
        values = torch.nn.functional.cross_entropy(adversarial_logits, labels, reduction="none")
        is_bad = len(calls) == 2 * accumulation + micro_batch
        return values * torch.tensor([1.0] * 5 + [math.nan] + [1.0] * 2) if is_bad else values

    trainer = make_trainer(
        count=64,
        gradient_accumulation_steps=accumulation,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        trainer_options={"robust_loss": loss},
    )
    after = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            after.update({name: tensor.clone() for name, tensor in model.state_dict().items()})

    trainer.add_callback(Keep())
    message = rf"loss is not finite in micro-batch {micro_batch} of optimizer step 3: nan for examples \[5\] of the"
    with pytest.raises(NonFiniteError, match=message):
        trainer.train()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, after[name]), name
    assert names(trainer.args.output_dir) == ["checkpoint-1", "checkpoint-2"]
    assert len(calls) == 2 * accumulation + micro_batch


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_before_the_step(make_trainer, max_grad_norm):
    model = make_model("vit")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.classifier.bias.register_hook(lambda gradient: gradient * math.inf)
    trainer = make_trainer(model, max_steps=1, max_grad_norm=max_grad_norm)
    with pytest.raises(NonFiniteError, match="The gradient is not finite before optimizer step 1, though the loss is"):
        trainer.train()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_jit_checkpoint_is_refused(make_trainer):
    with pytest.raises(ValueError, match="`enable_jit_checkpoint=True` saves before the optimizer step"):
        make_trainer(enable_jit_checkpoint=True)
