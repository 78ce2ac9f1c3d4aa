"""Two processes against one with the same global batch: noise, gradients and metrics must not tell them apart."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


WORKER = Path(__file__).parent / "distributed_worker.py"


@pytest.mark.slow
@pytest.mark.parametrize(("robust_loss", "family"), [("at", "vit"), ("trades", "timm")])
def test_two_processes_equal_one(tmp_path, robust_loss, family):
    worker = [str(WORKER), str(tmp_path), robust_loss, family]
    subprocess.run([sys.executable, *worker], check=True)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *worker], check=True
    )

    results = [json.loads((tmp_path / f"result-{processes}.json").read_text()) for processes in (1, 2)]
    assert [result["world_size"] for result in results] == [1, 2]
    assert results[0]["metrics"] == results[1]["metrics"]
    one, two = (torch.load(tmp_path / f"weights-{processes}.pt", weights_only=True) for processes in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
