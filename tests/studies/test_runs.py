import csv
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial

import pandas
import psutil
import pytest
import yaml

from hf_rft.studies import runs as studied
from hf_rft.studies.grid import Run, Study
from hf_rft.studies.results import read_results
from hf_rft.studies.runs import folder_of, make_run, make_study, with_threads, write_recipe
from studies.test_results import finished


RUNS = [Run({"schedule": name}, seed, {"epsilon_schedule_type": name}) for seed in (0, 1) for name in ("a", "b")]
STUDY = Study(["schedule"], RUNS)
ONE_JOB = partial(with_threads, jobs=1)


@pytest.fixture
def trained(monkeypatch):
    """Stands in for `hf-rft train`; holds the folders it was called for. A schedule named in `broken` fails."""

    class Trained(list):
        broken = set()

    calls = Trained()

    def run(command, stdout, env, **options):
        folder = command[command.index("--output_dir") + 1]
        recipe = open(command[command.index("--config") + 1]).read()
        calls.append(os.path.basename(folder))
        if any(f"epsilon_schedule_type: {name}" in recipe for name in calls.broken):
            stdout.write("Loading\r 10%\nhf-rft train: error: no such schedule.\n")
            return subprocess.CompletedProcess(command, 2)
        for path in finished(studied.Path(folder, "scratch")).iterdir():
            path.rename(studied.Path(folder, path.name))
        studied.Path(folder, "model.safetensors").write_bytes(b"weights")
        studied.Path(folder, "checkpoint-1").mkdir(exist_ok=True)
        studied.Path(folder, "checkpoint-1", "optimizer.pt").write_bytes(b"state")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(studied.subprocess, "run", run)
    monkeypatch.setattr("hf_rft.studies.results.current_commit", lambda: "0123456")
    return calls


def rows(folder, name="results.csv"):
    with open(folder / name, newline="") as stream:
        return list(csv.DictReader(stream))


def test_each_run_is_made_once_and_has_a_row_in_order(trained, tmp_path):
    assert make_study(STUDY, tmp_path, ONE_JOB, cpus=1) == 0
    assert trained == [run.key for run in RUNS]
    assert [(row["schedule"], row["seed"]) for row in rows(tmp_path)] == [
        ("a", "0"),
        ("b", "0"),
        ("a", "1"),
        ("b", "1"),
    ]
    assert make_study(STUDY, tmp_path, ONE_JOB, cpus=1) == 0
    assert len(trained) == 4, "nothing is repeated"
    assert (tmp_path / "runs" / RUNS[0].key / "model.safetensors").is_file()


def test_rows_are_enough_to_go_on(trained, tmp_path):
    """The folders of runs may be gone, as on another machine."""
    first = Study(["schedule"], RUNS[:2])
    make_study(first, tmp_path / "here", ONE_JOB, cpus=1)
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "results.csv").rename(tmp_path / "there" / "results.csv")
    make_study(STUDY, tmp_path / "there", ONE_JOB, cpus=1)
    assert len(trained) == 4 and len(rows(tmp_path / "there")) == 4


def test_renamed_options_keep_their_runs(trained, tmp_path):
    make_study(STUDY, tmp_path, ONE_JOB, cpus=1)
    renamed = [Run({"ramp": run.options["schedule"].upper()}, run.seed, run.flags) for run in RUNS]
    make_study(Study(["ramp"], renamed), tmp_path, ONE_JOB, cpus=1)
    assert len(trained) == 4 and [row["ramp"] for row in rows(tmp_path)] == ["A", "B", "A", "B"]


def test_a_failed_run_is_listed_and_does_not_stop_the_others(trained, tmp_path, capsys):
    trained.broken.add("b")
    assert make_study(STUDY, tmp_path, ONE_JOB, cpus=1) == 2
    assert [row["schedule"] for row in rows(tmp_path)] == ["a", "a"]
    failed = rows(tmp_path, "failures.csv")
    assert [(row["schedule"], row["seed"]) for row in failed] == [("b", "0"), ("b", "1")]
    assert failed[0]["reason"] == "status 2: no such schedule."
    assert "FAILED b, seed 0: status 2: no such schedule." in capsys.readouterr().out
    trained.broken.clear()
    assert make_study(STUDY, tmp_path, ONE_JOB, cpus=1) == 0
    assert len(trained) == 6 and len(rows(tmp_path)) == 4 and not rows(tmp_path, "failures.csv")


def test_weights_are_deleted_on_request(trained, tmp_path):
    make_study(STUDY, tmp_path, ONE_JOB, cpus=1, keeps_weights=False)
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("checkpoint-*"))
    assert len(list(tmp_path.rglob("robustness.json"))) == 4


def test_rows_of_another_study_are_refused_before_anything_is_made(trained, tmp_path):
    make_study(STUDY, tmp_path, ONE_JOB, cpus=1)
    with pytest.raises(ValueError, match=rf"results.csv has 3 rows of runs .* run {RUNS[1].key} first; delete"):
        make_study(Study(["schedule"], RUNS[:1]), tmp_path, ONE_JOB, cpus=1)
    assert len(rows(tmp_path)) == 4


def test_two_studies_cannot_share_a_folder(trained, tmp_path):
    started, may_end = threading.Event(), threading.Event()

    def slow(make, missing):
        started.set()
        may_end.wait(10)
        return []

    first = threading.Thread(target=make_study, args=(STUDY, tmp_path, slow), kwargs={"cpus": 1})
    first.start()
    started.wait(10)
    with pytest.raises(ValueError, match="in use by another study"):
        make_study(STUDY, tmp_path, ONE_JOB, cpus=1)
    may_end.set()
    first.join()
    assert make_study(STUDY, tmp_path, ONE_JOB, cpus=1) == 0


def test_jobs_run_at_the_same_time():
    both = threading.Barrier(2)

    def make(run):
        both.wait(10)
        return {"reason": run.key}

    found = {run.key: outcome["reason"] for run, outcome in with_threads(make, RUNS, jobs=2)}
    assert found == {run.key: run.key for run in RUNS}


def test_the_threads_of_a_run_are_its_cpus(monkeypatch, tmp_path):
    seen = {}

    def run(command, env, **options):
        seen.update(env)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(studied.subprocess, "run", run)
    assert make_run(RUNS[0], tmp_path, cpus=3) == {"reason": "status 1: no output"}
    assert seen["OMP_NUM_THREADS"] == "3"


def test_a_training_whose_study_was_killed_is_stopped_before_it_is_made_again(trained, tmp_path):
    code, folder = "import time; time.sleep(1000)", str(folder_of(RUNS[0], tmp_path))
    orphan = subprocess.Popen([sys.executable, "-c", code, "train", "--output_dir", folder])
    while folder not in psutil.Process(orphan.pid).cmdline():
        time.sleep(0.01)
    make_run(RUNS[0], tmp_path, cpus=1)
    orphan.wait(10)
    assert trained == [RUNS[0].key]


def test_an_interrupted_study_stops_its_trainings(tmp_path, monkeypatch):
    """Whoever interrupts it: each of them ends by itself on SIGTERM."""
    trainings = []

    def run(command, env, **options):
        words = [sys.executable, "-c", "import time; time.sleep(1000)", *command[3:]]
        trainings.append(subprocess.Popen(words))
        return subprocess.CompletedProcess(command, trainings[-1].wait())

    monkeypatch.setattr(studied.subprocess, "run", run)
    found = with_threads(partial(make_run, output_dir=tmp_path, cpus=1), RUNS, jobs=2)
    first = threading.Thread(target=lambda: time.sleep(1) or trainings[0].terminate())
    first.start()
    assert next(found)[1] == {"reason": "status -15: no output"}
    with pytest.raises(KeyboardInterrupt):
        found.throw(KeyboardInterrupt)
    assert len(trainings) <= 3 and all(training.poll() is not None for training in trainings)


def test_the_reason_is_that_of_the_last_attempt(trained, tmp_path):
    folder = folder_of(RUNS[0], tmp_path)
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("RuntimeError: an earlier one\n")
    trained.broken.add("a")
    assert make_run(RUNS[0], tmp_path, cpus=1) == {"reason": "status 2: no such schedule."}


def test_a_damaged_result_is_a_failure(trained, tmp_path):
    folder_of(RUNS[0], tmp_path).mkdir(parents=True)
    (folder_of(RUNS[0], tmp_path) / "robustness.json").write_text("{}")
    outcome = make_run(RUNS[0], tmp_path, cpus=1)
    assert outcome["reason"] and not trained


TINY = {
    **{"dataset_name": "bundled:fashion_mnist_5k", "model_name_or_path": "bundled:tf_efficientnet_lite0"},
    **{"image_size": 32, "max_train_samples": 32, "max_eval_samples": 8, "max_test_samples": 8, "max_steps": 2},
    **{"attack": "pgd", "attack_steps": 1, "eval_attack_steps": 2, "epsilon": "4/255", "save_strategy": "no"},
    **{"eval_strategy": "steps", "eval_steps": 0.5, "report_to": "none", "disable_tqdm": True},
    "per_device_train_batch_size": 16,
}


@pytest.fixture
def real_runs():
    options = {"constant": {"epsilon_schedule_type": "constant"}, "linear": {"epsilon_schedule_type": "linear"}}
    description = {"common": TINY, "factors": {"schedule": options}}
    return Study.from_description(description, {}.__getitem__)


@pytest.mark.slow
def test_a_killed_study_ends_as_an_undisturbed_one(real_runs, tmp_path):
    """The study is killed in mid-run, its training lives on; the same study, made again, has the same numbers."""
    code = (
        "import pickle, sys; from pathlib import Path; from functools import partial; "
        "from hf_rft.studies.runs import make_study, with_threads; "
        "study = pickle.loads(bytes.fromhex(sys.argv[1])); "
        "make_study(study, Path(sys.argv[2]), partial(with_threads, jobs=1), cpus=1)"
    )
    study = Study(real_runs.factors, real_runs.runs[:1])
    process = subprocess.Popen([sys.executable, "-c", code, pickle.dumps(study).hex(), str(tmp_path / "killed")])
    log = tmp_path / "killed" / "runs" / study.runs[0].key / "log.txt"
    deadline = time.monotonic() + 200
    while not (log.is_file() and "Loading weights" in log.read_text(errors="replace")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "Loading weights" in log.read_text(errors="replace")
    process.kill()
    process.wait()
    assert rows(tmp_path / "killed") == []
    for name in ("killed", "undisturbed"):
        assert make_study(study, tmp_path / name, ONE_JOB, cpus=1) == 0
    killed, undisturbed = (
        read_results(tmp_path / name / "results.csv").drop(columns="seconds") for name in ("killed", "undisturbed")
    )
    pandas.testing.assert_frame_equal(killed, undisturbed, check_exact=True)


@pytest.mark.slow
def test_ray_makes_the_runs_of_a_node_that_died_on_another(real_runs, tmp_path, monkeypatch):
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # or tests beside this one leave its workers no time
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second_node = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        outcome, attempts = {}, tmp_path / "attempts.txt"

        def scheduler(make, missing):
            def recorded(run):
                with open(attempts, "a") as stream:
                    stream.write(f"{run.key}\n")
                return make(run)

            return studied.with_ray(recorded, missing, address=cluster.address, cpus=1, gpus=0)

        def whole_study():
            outcome["failed"] = make_study(real_runs, tmp_path, scheduler, cpus=1)

        study = threading.Thread(target=whole_study, daemon=True)
        study.start()
        logs = [tmp_path / "runs" / run.key / "log.txt" for run in real_runs.runs]
        deadline = time.monotonic() + 200
        while not all(log.is_file() for log in logs) and time.monotonic() < deadline:
            time.sleep(0.1)
        cluster.remove_node(second_node, allow_graceful=False)
        study.join(400)
        assert outcome == {"failed": 0}
        assert [row["schedule"] for row in rows(tmp_path)] == ["constant", "linear"]
        counts = Counter(attempts.read_text().split())
        assert sorted(counts.values()) == [1, 2], "one run was on the node that died, and was made again"
    finally:
        cluster.shutdown()


def test_recipes_are_ordinary_files(tmp_path):
    run = Run({"schedule": "hinge"}, 3, {"epsilon": "4/255", "epsilon_schedule_kwargs": {"start": 0.25}})
    write_recipe(run, tmp_path / "runs" / "recipe.yaml")
    text = (tmp_path / "runs" / "recipe.yaml").read_text()
    assert text.startswith("# hinge, seed 3\n") and yaml.safe_load(text) == {**run.flags, "seed": 3}
