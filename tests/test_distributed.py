"""Two processes against one with the same global batch: noise, gradients and metrics must not tell them apart.

And a process that is killed against one that is not.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import evaluation_worker
import pytest
import torch

from hf_rft.evaluation import evaluate as evaluation
from hf_rft.evaluation import flags


WORKER = Path(__file__).parent / "distributed_worker.py"
EVALUATION_WORKER = Path(evaluation_worker.__file__)
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize(("robust_loss", "family"), [("at", "vit"), ("trades", "timm")])
def test_two_processes_equal_one(tmp_path, robust_loss, family):
    worker = [str(WORKER), str(tmp_path), robust_loss, family]
    subprocess.run([sys.executable, *worker], check=True)
    subprocess.run([*TWO_PROCESSES, *worker], check=True)

    results = [json.loads((tmp_path / f"result-{processes}.json").read_text()) for processes in (1, 2)]
    assert [result["world_size"] for result in results] == [1, 2]
    assert results[0]["metrics"] == results[1]["metrics"]
    one, two = (torch.load(tmp_path / f"weights-{processes}.pt", weights_only=True) for processes in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture
def one_thread(monkeypatch):
    """What the worker changes, when it is called here, is changed back."""
    monkeypatch.setattr(flags, "SQUARE_STEPS", flags.SQUARE_STEPS)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_two_processes_return_the_report_of_one(tmp_path, one_thread):
    evaluation_worker.main(str(tmp_path))
    subprocess.run([*TWO_PROCESSES, str(EVALUATION_WORKER), str(tmp_path)], check=True, env=ONE_THREAD)

    one, first, second = (
        json.loads((tmp_path / f"evaluation-{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )
    assert [result.pop("world_size") for result in (one, first, second)] == [1, 2, 2]
    assert list(one) == ["plain", "empty cache", "full cache", "one batch"]
    for name, report in one.items():
        assert first[name] == second[name] == report, name
    assert one["plain"] == one["empty cache"] == one["full cache"]
    assert one["plain"]["num_examples"] == 13 and len(set(one["plain"]["accuracies"])) > 2
    caches = [sorted(path.name for path in (tmp_path / f"cache-{count}").iterdir()) for count in (1, 2)]
    assert caches[0] == caches[1] and len(caches[0]) == 5


@pytest.mark.slow
def test_evaluation_that_is_killed_goes_on(tmp_path, monkeypatch, one_thread):
    examples, batch_size = evaluation_worker.EXAMPLES, evaluation_worker.BATCH_SIZE
    cache_dir, batches = tmp_path / "cache", examples // batch_size
    process = subprocess.Popen(
        [sys.executable, str(EVALUATION_WORKER), "--to_be_killed", str(cache_dir)], env=ONE_THREAD
    )
    try:
        deadline = time.monotonic() + 120
        while not list(cache_dir.glob("*.safetensors")):
            assert process.poll() is None and time.monotonic() < deadline, "no batch was finished"
            time.sleep(0.002)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    finished = {path: path.read_bytes() for path in cache_dir.glob("*.safetensors")}
    assert 1 <= len(finished) < batches

    attacked, find = [], evaluation.find_breaking_points

    def counted(*args, **kwargs):
        attacked.append(kwargs["positions"])
        return find(*args, **kwargs)

    monkeypatch.setattr(evaluation, "find_breaking_points", counted)
    resumed = evaluation_worker.evaluate(examples, batch_size, cache_dir)
    assert len(attacked) == batches - len(finished)
    undisturbed = evaluation_worker.evaluate(examples, batch_size)
    assert resumed.table() == undisturbed.table()
    assert resumed.to_dict() == undisturbed.to_dict()
    assert {path: path.read_bytes() for path in finished} == finished
    assert len(list(cache_dir.glob("*.safetensors"))) == batches
