import importlib.util
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from hf_rft.cli import main, train
from hf_rft.cli.recipes import FOLDER


SMALL = "--max_train_samples 64 --max_eval_samples 8 --max_test_samples 4 --image_size 32 --num_train_epochs 400"
SMALL += " --per_device_train_batch_size 8 --attack_steps 1 --eval_strategy no --logging_steps 1 --use_cpu --seed 0"


def hf_rft(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hf_rft", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def call(monkeypatch, capsys):
    """`hf-rft` in this process: its status and what it printed."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-rft", *words])
        status = 0
        try:
            main.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


# --- Which command ---


def test_without_a_command_it_lists_them(call):
    for words in ([], ["--help"]):
        status, out, _ = call(*words)
        assert status == 0 and all(f"\n  {name} " in out for name in main.COMMANDS)


def test_version(call):
    assert re.fullmatch(r"hf_rft \d+\.\d+\.\d+\n", call("--version")[1])


def test_a_command_that_is_none_is_refused_with_the_nearest(call):
    assert call("trian") == (2, "", "hf-rft: error: 'trian' is not a command; did you mean train?\n")
    assert "choose one of train, evaluate" in call("nothing")[2]


def test_a_missing_extra_is_one_sentence(call, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert call("app") == (2, "", 'hf-rft app: error: it needs gradio: pip install "hf_rft[app]"\n')


# --- Help ---


@pytest.mark.parametrize("command", main.COMMANDS)
def test_help_shows_each_flag_once_and_examples_as_they_are(call, command):
    status, out, _ = call(command, "--help")
    assert status == 0 and out.startswith(f"usage: hf-rft {command} ")
    flags = re.findall(r"^  (--\w+)", out, re.MULTILINE)
    assert len(flags) == len(set(flags)) > 0
    assert f"\n    hf-rft {command} " in out
    assert "recipes/" not in out.replace("my_recipes/", "")  # no file that pip does not install


def test_help_of_train_begins_with_what_a_run_is_about(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out = call("train", "--help")[1]
    titles = re.findall(r"^([a-z ]+):$", out, re.MULTILINE)
    assert titles == list(train.SECTIONS)
    assert titles[:6] == ["model", "data", "threat model", "attack", "epsilon schedule", "loss"]
    assert len(out.splitlines()) <= 130 and "--adam_beta1" not in out
    everything = call("train", "--help_all")[1]
    assert "--adam_beta1" in everything and len(re.findall(r"^  --norm ", everything, re.MULTILINE)) == 1


def test_required_flags_say_so(call):
    out = " ".join(call("evaluate", "--help")[1].split())
    assert out.startswith("usage: hf-rft evaluate --model_name_or_path TEXT [flags]")
    assert "or local folder. Required." in out


# --- Processes ---


@pytest.fixture
def launched(call, monkeypatch):
    """What would be launched, and the message if it is refused."""

    def launched(*words: str):
        seen = []
        monkeypatch.setattr(main, "launch", lambda *what: (seen.append(what), sys.exit(0)))
        _, _, error = call("train", *words)
        return seen[0] if seen else error

    return launched


def test_flags_for_the_launcher_are_taken_out(launched):
    program = ["hf_rft", "train", "--seed", "1", "--bf16"]
    config = FOLDER / "accelerate_configs" / "multi_gpu.yaml"
    assert launched("--num_processes", "4", "--seed", "1", "--bf16") == (["--num_processes=4"], program)
    flags, rest = launched("--seed", "1", "--accelerate_config=multi_gpu", "--num_processes=4", "--bf16")
    assert sorted(flags) == [f"--config_file={config}", "--num_processes=4"] and rest == program


@pytest.mark.parametrize(
    "words, message",
    [
        (["--num_processes", "0"], "--num_processes 0 must be at least 1."),
        (["--num_processes", "two"], "argument --num_processes: invalid int value: 'two'"),
        (["--machine_rank", "1"], "--machine_rank needs --accelerate_config multi_node."),
        (["--accelerate_config", "mulit_gpu"], "Did you mean multi_gpu?"),
    ],
)
def test_what_cannot_be_launched_is_refused(launched, words, message):
    assert message in launched(*words)


def test_a_launched_process_launches_nothing(launched, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "a launcher has already started this one" in launched("--num_processes", "2")


@pytest.mark.slow
def test_several_processes_give_one_message_and_their_status():
    ended = hf_rft("train", "--num_processes", "2", "--use_cpu", "--epsilon", "300")
    assert ended.returncode == 2
    assert ended.stderr.count("error:") == 1 and "Traceback" not in ended.stderr, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "sent, status, said",
    [(signal.SIGTERM, 75, "received SIGTERM"), (signal.SIGINT, 130, "was interrupted (Ctrl-C)")],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_signal_ends_training_in_order(tmp_path, processes, sent, status, said):
    command = [sys.executable, "-m", "hf_rft", "train", *SMALL.split(), "--output_dir", str(tmp_path / "run")]
    command += ["--num_processes", "2"] if processes == 2 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + 240
        while "'loss'" not in (tmp_path / "log.txt").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
            time.sleep(0.2)
        process.send_signal(sent)
        assert process.wait(timeout=60) == status
    log = (tmp_path / "log.txt").read_text()
    assert said in log and "The same command with --resume auto goes on from there." in log
    assert "Traceback" not in log
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] != []


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_loss_that_is_not_finite_ends_with_its_status(tmp_path, processes):
    diverging = ["--learning_rate", "1e30", "--max_grad_norm", "1e30", "--optim", "sgd"]
    ended = hf_rft(
        "train", "--num_processes", processes, *SMALL.split(), *diverging, "--output_dir", str(tmp_path / "run")
    )
    assert ended.returncode == 3
    assert "is not finite" in ended.stderr and "Traceback" not in ended.stderr, ended.stderr
