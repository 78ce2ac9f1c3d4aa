"""What the benchmark of parity asks for and prints; both sides have tests of their own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_rft.threat_model import NORMS


@pytest.fixture
def parity(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    import parity

    return parity


def test_rows_of_every_norm(parity, monkeypatch, tmp_path, capsys):
    """Four images: one broken at the first epsilon, one at the second, two never."""
    asked = []
    measured = SimpleNamespace(
        model=None, dataset=None, processor=None, forward=None, pixels_and_labels=lambda: (None, None)
    )

    def evaluate(*_, norm, epsilons, **__):
        asked.append((norm, epsilons))
        return SimpleNamespace(table=lambda: "", broken_at=np.array([1, 2, 4, 4]))

    def reference(args, forward, pixels, labels, norm, epsilon):
        return torch.tensor([True, False, True, False])

    monkeypatch.setattr(parity.subject, "load", lambda args: measured)
    monkeypatch.setattr(parity, "evaluate_robustness", evaluate)
    monkeypatch.setattr(parity, "reference_robust", reference)
    parity.main(["--output_dir", str(tmp_path)])
    assert asked == [(norm, ["0", *parity.EPSILONS[norm]]) for norm in NORMS]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| l1 |")]
    assert rows == [
        "| l1 | 3 | 75.0 % | 50.0 % | +25.0 | 25.0 % | 1 | 2 |",
        "| l1 | 6 | 50.0 % | 50.0 % | +0.0 | 50.0 % | 1 | 1 |",
        "| l1 | 12 | 50.0 % | 50.0 % | +0.0 | 50.0 % | 1 | 1 |",
    ]


def test_epsilons_belong_to_one_norm(parity, capsys):
    with pytest.raises(SystemExit):
        parity.main(["--epsilons", "0.1"])
    assert "--epsilons are those of one norm; name it with --norms" in capsys.readouterr().err
