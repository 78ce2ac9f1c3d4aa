import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import Images
from transformers import TrainerCallback

from hf_rft.training.checkpoints import last_complete_checkpoint, why_incomplete
from hf_rft.training.interruption import (
    AlarmRaised,
    InterruptionCallback,
    TrainingInterrupted,
    TrainingPreempted,
    preemption_requests,
)


class During(TrainerCallback):
    """Calls a function at one event of one step."""

    def __init__(self, event: str, step: int, function):
        setattr(self, event, lambda args, state, control, **kwargs: function() if state.global_step == step else None)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("save_strategy", ["no", "steps", "epoch"])
@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_pre_optimizer_step"])
def test_sigterm_ends_the_step_saves_and_raises(make_trainer, tmp_path, save_strategy, event):
    handler = signal.getsignal(signal.SIGTERM)
    options = {"max_steps": 6, "gradient_accumulation_steps": 2, "save_strategy": save_strategy, "save_steps": 100}
    callbacks = {"trainer_options": {"callbacks": [During(event, 2, terminate)]}}
    with pytest.raises(TrainingPreempted, match=r"SIGTERM.*stopped.*is in .*checkpoint-3") as raised:
        make_trainer(output_dir=str(tmp_path / "run"), **options, **callbacks).train()
    assert raised.value.checkpoint == str(tmp_path / "run" / "checkpoint-3")
    saved = {path.name for path in (tmp_path / "run").iterdir()}
    assert saved == {"checkpoint-3"} | ({"checkpoint-2"} if save_strategy == "epoch" else set())
    assert signal.getsignal(signal.SIGTERM) == handler

    whole = make_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "run"), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    for (name, tensor), other in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name


def test_a_request_during_an_evaluation_stops_after_it(make_trainer, tmp_path):
    """The evaluation is finished, logged and counted for the best model; then the same step is saved."""
    trainer = make_trainer(max_steps=6, eval_strategy="steps", eval_steps=2)
    trainer.add_callback(During("on_prediction_step", 2, terminate))
    with pytest.raises(TrainingPreempted) as raised:
        trainer.train()
    assert str(raised.value.checkpoint).endswith("checkpoint-2")
    assert "eval_robust_accuracy" in trainer.state.log_history[-1]


def test_a_request_in_the_last_evaluation_is_not_lost(make_trainer):
    trainer = make_trainer(num_train_epochs=1, eval_strategy="epoch")
    trainer.add_callback(During("on_prediction_step", 4, terminate))
    with pytest.raises(TrainingPreempted) as raised:
        trainer.train()
    assert str(raised.value.checkpoint).endswith("checkpoint-4")


def test_a_request_after_the_last_step_is_not_lost(make_trainer):
    trainer = make_trainer(max_steps=2)
    trainer.add_callback(During("on_train_end", 2, terminate))
    with pytest.raises(TrainingPreempted):
        trainer.train()


def test_training_again_forgets_an_earlier_request(make_trainer):
    trainer = make_trainer(max_steps=2)
    trainer.interruption.request(AlarmRaised("before"))
    assert trainer.train().global_step == 2


def test_any_callback_may_request(make_trainer):
    trainer = make_trainer(max_steps=6)
    trainer.callback_handler.callbacks.insert(
        0, During("on_log", 2, lambda: trainer.interruption.request(AlarmRaised("An alarm.")))
    )
    with pytest.raises(AlarmRaised, match="An alarm. Everything up to here is in .*checkpoint-3"):
        trainer.train()
    assert why_incomplete(last_complete_checkpoint(trainer.args.output_dir)) is None


def test_the_first_request_counts():
    callback, first = InterruptionCallback(), AlarmRaised("first")
    callback.request(first)
    callback.request(TrainingPreempted("second"))
    assert callback.requested is first
    assert str(first) == "first"
    first.checkpoint = "here"
    assert isinstance(first, TrainingInterrupted) and str(first) == "first Everything up to here is in here."


def test_the_previous_handler_comes_back_after_an_error():
    heard = []
    previous = signal.signal(signal.SIGTERM, lambda *_: heard.append("previous"))
    callback = InterruptionCallback()
    try:
        with pytest.raises(KeyError), preemption_requests(callback):
            terminate()
            raise KeyError
        assert isinstance(callback.requested, TrainingPreempted) and not heard
        terminate()
        assert heard == ["previous"]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_other_threads_cannot_listen(make_trainer):
    """Training in a thread works; signals then do what they always did."""
    trainer, steps = make_trainer(max_steps=1), []
    thread = threading.Thread(target=lambda: steps.append(trainer.train().global_step))
    thread.start()
    thread.join()
    assert steps == [1]


def test_evaluation_outside_of_training_asks_nobody(make_trainer):
    trainer = make_trainer(trainer_options={"eval_dataset": Images(5)})
    trainer.interruption.request(AlarmRaised("late"))
    assert "eval_accuracy" in trainer.evaluate()
    assert not trainer.control.should_training_stop


@pytest.mark.slow
def test_all_processes_stop_at_the_same_step(tmp_path):
    """One of two is asked to stop, or finds a loss that is not finite: both stop, neither hangs."""
    worker = str(Path(__file__).parents[1] / "interruption_worker.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, worker, str(tmp_path)], check=True, timeout=300, env=environment)
    first, second = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1))
    assert first["world_size"] == second["world_size"] == 2
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert first["preempted"].startswith("Another process of this run was asked to stop.")
    assert second["preempted"].startswith("Training received SIGTERM")
    assert first["preempted"].endswith(f"is in {checkpoint}.") and second["preempted"].endswith(f"is in {checkpoint}.")
    assert first["resumed_is_exact"] and second["resumed_is_exact"]
    assert "in micro-batch 1 of optimizer step 2: on another process." in first["not_finite"]
    assert "in micro-batch 1 of optimizer step 2: nan for examples [0, 1, 2, 3] of the batch." in second["not_finite"]


@pytest.mark.skipif(not hasattr(os, "setpgrp"), reason="there are no process groups")
@pytest.mark.parametrize("loader", ["get_train_dataloader", "get_eval_dataloader"])
def test_workers_have_a_process_group_of_their_own(make_trainer, loader):
    class Groups(Images):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "labels": os.getpgrp()}

    options = {"train_dataset": Groups(8), "eval_dataset": Groups(8)}
    trainer = make_trainer(trainer_options=options, dataloader_num_workers=1)
    trainer.data_collator = lambda examples: {"groups": [example["labels"] for example in examples]}
    groups = {group for batch in getattr(trainer, loader)() for group in batch["groups"]}
    assert len(groups) == 1 and groups != {os.getpgrp()}
