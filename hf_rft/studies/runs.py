"""Making the runs of a study: each an ordinary `hf-rft train` in a process and a folder of its own.

A run that has its row in results.csv is not made again, so a study that was killed goes on; a run that was cut short
goes on from its last checkpoint. A run that fails is listed in failures.csv, and the others go on.
"""

import contextlib
import csv
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..utils.files import replacing, write_text
from .grid import Run, Study
from .results import read_results, read_run, write_results


Outcome = dict[str, Any]  # what results.csv says of a run; of one that failed {"reason": ...}
Scheduler = Callable[[Callable[[Run], Outcome], list[Run]], Iterable[tuple[Run, Outcome]]]

_PATIENCE = 60  # seconds in which a run that is told to stop can write its checkpoint


def make_run(run: Run, output_dir: Path, *, cpus: int, keeps_weights: bool = True) -> Outcome:
    """Train in the run's folder, unless that is done; what goes wrong is the outcome, not an exception."""
    folder = folder_of(run, output_dir)
    log = folder / "log.txt"
    try:
        _stop_earlier(folder)
        write_recipe(run, folder / "recipe.yaml")
        if not (folder / "robustness.json").is_file():
            command = [sys.executable, "-m", "hf_rft", "train", "--config", str(folder / "recipe.yaml")]
            command += ["--output_dir", str(folder), "--resume", "auto"]
            with log.open("a") as stream:
                before = stream.tell()
                options = {"stdin": subprocess.DEVNULL, "stdout": stream, "stderr": subprocess.STDOUT}
                environment = {**os.environ, "OMP_NUM_THREADS": str(cpus)}
                status = subprocess.run(command, env=environment, **options).returncode
            if status:
                return {"reason": f"status {status}: {_last_error(log, before)}"}
        outcome = read_run(folder)
        if not keeps_weights:
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            for weights in folder.glob("*.safetensors"):
                weights.unlink()
        return outcome
    except Exception as error:
        return {"reason": f"{type(error).__name__}: {error}"}


def folder_of(run: Run, output_dir: Path) -> Path:
    return output_dir / "runs" / run.key


def write_recipe(run: Run, path: Path) -> None:
    """The run as a file for `hf-rft train --config`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f"# {run}\n" + yaml.safe_dump({**run.flags, "seed": run.seed}, sort_keys=False))


def _is_training(process: psutil.Process | None, *words: str) -> bool:
    """Whether a process is a `hf-rft train` with these words on its command line."""
    try:
        return process is not None and {"train", "--output_dir", *words} <= set(process.cmdline())
    except psutil.Error:
        return False


def _stop_earlier(folder: Path) -> None:
    """Stop a training that still writes to the folder: its study, or its node of a cluster, was killed."""
    found = [process for process in psutil.process_iter() if _is_training(process, str(folder))]
    # Not their workers, which have the same command line: without them a training writes no checkpoint.
    _stop([process for process in found if not _is_training(process.parent(), str(folder))])


def _stop(processes: list[psutil.Process]) -> None:
    """Let trainings end, with a checkpoint after the step in progress."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=_PATIENCE)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _last_error(log: Path, start: int) -> str:
    """The message of the command in its log, from byte `start` on; without one, the last line."""
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in re.split(r"[\n\r]", text) if line.strip()]
    messages = [line for line in lines if re.search(r"error: ", line, re.IGNORECASE)]
    return (messages or lines or ["no output"])[-1].removeprefix("hf-rft train: error: ")[:500]


def with_threads(make: Callable[[Run], Outcome], runs: list[Run], *, jobs: int) -> Iterator[tuple[Run, Outcome]]:
    """Make the runs on this machine, `jobs` at a time."""
    pool = ThreadPoolExecutor(jobs)
    futures = {pool.submit(make, run): run for run in runs}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BaseException:  # the study is interrupted
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in futures):  # one may just be about to start
            _stop([process for process in psutil.Process().children() if _is_training(process)])
            time.sleep(0.1)
        raise
    finally:
        pool.shutdown()


def with_ray(
    make: Callable[[Run], Outcome], runs: list[Run], *, address: str, cpus: int, gpus: float
) -> Iterator[tuple[Run, Outcome]]:
    """Make the runs on the nodes of a Ray cluster, which makes those of a node that is lost again on another.

    Interrupted, it ends its connection, and with it the runs in progress.
    """
    import ray  # the extra `ray`

    @ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=-1)
    def make_remotely(run: Run) -> Outcome:
        return make(run)

    ray.init(address=address, log_to_driver=False)
    pending = {make_remotely.remote(run): run for run in runs}
    try:
        while pending:
            [done], _ = ray.wait(list(pending), num_returns=1)
            yield pending.pop(done), ray.get(done)
    finally:
        ray.shutdown()


def make_study(study: Study, output_dir: Path, scheduler: Scheduler, *, cpus: int, keeps_weights: bool = True) -> int:
    """Make the runs that results.csv lacks; return how many failed.

    Raises:
        ValueError: if another process makes a study in this folder, or results.csv has rows of another study.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(output_dir / ".lock", timeout=0))
        except Timeout:
            raise ValueError(f"--output_dir {output_dir} is in use by another study; wait, or name another.") from None
        rows = known_rows(study, output_dir)
        missing = [run for run in study.runs if run.key not in rows]
        make = partial(make_run, output_dir=output_dir, cpus=cpus, keeps_weights=keeps_weights)
        failures: list[dict[str, Any]] = []
        _write(study, rows, failures, output_dir)
        with tqdm(total=len(study.runs), initial=len(rows), unit="run", smoothing=0.1) as bar:
            for run, outcome in scheduler(make, missing) if missing else ():
                named = {**run.options, "seed": run.seed, "run": run.key}
                if "reason" in outcome:
                    failures.append({**named, "reason": outcome["reason"]})
                    bar.write(f"FAILED {run}: {outcome['reason']} ({folder_of(run, output_dir) / 'log.txt'})")
                else:
                    rows[run.key] = {**outcome, **named}
                    bar.write(f"{run}: expected robustness {outcome['expected_robustness']:.1%}")
                _write(study, rows, failures, output_dir)
                bar.update()
    return len(failures)


def known_rows(study: Study, output_dir: Path) -> dict[str, dict[Any, Any]]:
    """The rows of results.csv by run, under the names that factors and options have now.

    Raises:
        ValueError: if some belong to no run of the study.
    """
    path = output_dir / "results.csv"
    if not path.is_file():
        return {}
    runs = {run.key: run for run in study.runs}
    table = read_results(path)
    if foreign := [key for key in table["run"] if key not in runs]:
        raise ValueError(
            f"{path} has {len(foreign)} rows of runs that the study does not describe, run {foreign[0]} first; delete "
            "these rows, or name another --output_dir."
        )
    return {str(row["run"]): {**row, **runs[row["run"]].options} for row in table.to_dict("records")}


def _write(study: Study, rows: Mapping[str, Mapping[str, Any]], failures: list[dict], output_dir: Path) -> None:
    in_order = [rows[run.key] for run in study.runs if run.key in rows]
    write_results(in_order, study.factors, output_dir)
    with replacing(output_dir / "failures.csv") as scratch, scratch.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*study.factors, "seed", "run", "reason"])
        writer.writeheader()
        writer.writerows(failures)
