"""The benchmark of a whole run: what it counts, and what it makes of finished runs."""

import json

import pytest


@pytest.fixture
def run_cost(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    import run_cost

    return run_cost


def test_counted_passes(run_cost):
    """k + 1 with a constant epsilon; 1 in a quarter of the steps with hinges; half of k on average along the ramp."""
    assert run_cost.counted_passes("constant", 7) == 8
    assert run_cost.counted_passes("hinge", 7) == pytest.approx(1 / 4 + 8 * 3 / 4, abs=1e-2)
    on_ramp = 1 + sum(range(1, 8)) / 7
    assert run_cost.counted_passes("hinge_fewer_steps", 7) == pytest.approx(1 / 4 + on_ramp / 2 + 8 / 4, abs=1e-2)


def test_finished_runs_are_not_repeated_and_compared_by_seed(run_cost, tmp_path, capsys):
    seconds = {"constant": (100, 200), "hinge": (80, 150), "hinge_fewer_steps": (60, 110)}
    for arm, of_seeds in seconds.items():
        (tmp_path / arm).mkdir()
        for seed, time in enumerate(of_seeds):
            expected = {"constant": 0.1, "hinge": 0.7, "hinge_fewer_steps": 0.69 + 0.02 * seed}[arm]
            found = {"seconds": time, "whole_seconds": time + 100, "accuracies": {"0": 0.8}, "robust": 0.5}
            (tmp_path / arm / f"seed{seed}.json").write_text(json.dumps({**found, "expected": expected}))
    run_cost.main(["--seeds", "0", "1", "--output_dir", str(tmp_path)])
    *_, constant, hinge, fewer = capsys.readouterr().out.splitlines()
    assert constant.startswith("| constant | 150 (100–200) | 1.000 (1.000–1.000) | 1.000 | 250 (200–300) |")
    assert hinge.startswith("| hinge | 115 (80–150) | 0.775 (0.750–0.800) | 0.781 |")
    assert fewer.startswith("| hinge_fewer_steps | 85 (60–110) | 0.575 (0.550–0.600) |")
    assert fewer.endswith("| 80.0 ± 0.0 | 50.0 ± 0.0 | 70.0 ± 1.4 | -1.0, +1.0 |")
