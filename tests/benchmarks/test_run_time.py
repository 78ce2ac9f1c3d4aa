"""The benchmark of the training time: each step is that of its schedule, and its time goes to that schedule."""

import pytest


@pytest.fixture
def run_time(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    import run_time

    return run_time


def test_steps_belong_to_the_schedules_in_turn(run_time, make_trainer):
    trainer = make_trainer(trainer_class=run_time.InTurns, attack_steps=4)
    trainer.state.max_steps = 24
    steps = []
    for trainer.state.global_step in range(24):
        share = trainer.share_of_epsilon
        steps.append((share, trainer.adversary.strength(share)[1]))
    ramp = [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]  # from a quarter of the run to three quarters
    assert steps[0::3] == [(1, 4)] * 8
    assert steps[1::3] == [(share, 4 if share else 0) for share in ramp]
    assert steps[2::3] == [(share, 4 * share) for share in ramp]


def test_times_of_steps_and_probes(run_time, capsys):
    tiny = ["--max_train_samples", "32", "--max_test_samples", "4", "--image_size", "32"]
    (stopwatch,) = run_time.main(["--seeds", "0", "--rounds", "2", "--attack_steps", "1", *tiny])
    assert all(seconds > 0 for times in stopwatch.steps.values() for seconds in times)
    assert len(stopwatch.probes) == 2  # after five steps, and at the end
    *_, constant, hinge, fewer = capsys.readouterr().out.splitlines()
    assert constant.endswith("| 1.000 (1.000–1.000) | 1.000 (1.000–1.000) | 1.000 (1.000–1.000) | 1.000 |")
    assert [line.split(" | ")[0] for line in (hinge, fewer)] == ["| hinge", "| hinge_fewer_steps"]


def test_share_of_a_run(run_time):
    """384 steps at 2 seconds and ten probes at 3, against 384 at 1."""
    stopwatch = run_time.Stopwatch()
    stopwatch.steps |= {"constant": [20.0, 0.0], "hinge": [10.0, 0.0]}
    stopwatch.probes = [[2.0, 0.0], [4.0, 0.0]]
    assert stopwatch.seconds_of_run("constant", rounds=10) == 384 * 2 + 30
    assert stopwatch.seconds_of_run("hinge", rounds=10) == 384 + 30


def test_counted_passes(run_time):
    """k + 1 with a constant epsilon; 1 in a quarter of the steps with hinges; half of k on average along the ramp."""
    assert run_time.counted_passes("constant", 7) == 8
    assert run_time.counted_passes("hinge", 7) == pytest.approx(1 / 4 + 8 * 3 / 4, abs=1e-2)
    on_ramp = 1 + sum(range(1, 8)) / 7
    assert run_time.counted_passes("hinge_fewer_steps", 7) == pytest.approx(1 / 4 + on_ramp / 2 + 8 / 4, abs=1e-2)
