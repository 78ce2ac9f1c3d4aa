"""The benchmark of a whole run: what it counts, and what it makes of finished runs."""

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


@pytest.fixture
def made(run_cost, monkeypatch):
    """In place of runs: what they would have found, and which were made."""
    seconds = {"constant": (100, 200), "hinge": (80, 150), "hinge_fewer_steps": (60, 110)}
    made = []

    def run(config, seed, folder, flags, threads):
        made.append((folder.name, seed))
        (folder / config.stem / f"seed{seed}").mkdir(parents=True)
        return folder.name, seed

    def read(finished):
        arm, seed = finished
        expected = {"constant": 0.1, "hinge": 0.7, "hinge_fewer_steps": 0.69 + 0.02 * seed}[arm]
        return {"seconds": seconds[arm][seed], "accuracies": {"0": 0.8}, "robust": 0.5, "expected": expected}

    monkeypatch.setattr(run_cost.compare, "run", run)
    monkeypatch.setattr(run_cost.compare, "read", read)
    return made


def test_runs_are_compared_by_seed(run_cost, made, tmp_path, capsys):
    run_cost.main(["--seeds", "0", "1", "--output_dir", str(tmp_path)])
    assert len(made) == 6
    *_, constant, hinge, fewer = capsys.readouterr().out.splitlines()
    assert constant.startswith("| constant | 150 (100–200) | 1.000 (1.000–1.000) | 1.000 | ")
    assert hinge.startswith("| hinge | 115 (80–150) | 0.775 (0.750–0.800) | 0.781 |")
    assert fewer.startswith("| hinge_fewer_steps | 85 (60–110) | 0.575 (0.550–0.600) |")
    assert fewer.endswith("| 80.0 ± 0.0 | 50.0 ± 0.0 | 70.0 ± 1.4 | -1.0, +1.0 |")


def test_only_the_same_run_is_not_repeated(run_cost, made, tmp_path):
    flags = ["--seeds", "0", "--output_dir", str(tmp_path)]
    for _ in range(2):
        run_cost.main(flags)
    assert len(made) == 3
    run_cost.main([*flags, "--attack_steps", "3"])
    assert len(made) == 6
    (tmp_path / "hinge" / "seed0.json").unlink()  # the run is there, its time is not
    run_cost.main([*flags, "--attack_steps", "3"])
    assert made[6:] == [("hinge", 0)]
