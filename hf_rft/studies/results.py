"""The tables of a study: results.csv with one row a run, and curves.csv with one row a run and epsilon.

Everything that a study says is made from results.csv alone, by [`hf_rft.studies.report`]; curves.csv says again, in
long form, what its columns `eval_epsilons` and `broken_at` hold. Columns of results.csv: one for each factor, and

- `seed`, `clean_accuracy`, `robust_accuracy` (at the largest epsilon), `expected_robustness`: shares of 1;
- `eval_norm`, `eval_epsilons` (the grid), `tier` and `attacks` (attack:steps:restarts), `num_examples`, `num_classes`;
- `seconds`: of training alone (its last part, if it was resumed), on a machine that may have had other work;
- `onset`: share of training after which the task began to be learned, see training/onset.py; empty: never;
- `validation_accuracy`: clean, as `share of training:accuracy`; empty: the run was not validated;
- `broken_at`: one character an example (0-9, then a-z): the place in the grid, from 0, of the first epsilon that broke
  it; one more than the last place if none did;
- `images` (first characters of the hash of the test images), `trust_checks` (that failed);
- `run`: hash of the run's flags; `commit`, `torch`: what it was made with.
"""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from transformers import TrainerState

from ..evaluation.provenance import versions
from ..evaluation.report import RobustnessReport
from ..threat_model import format_epsilon, parse_epsilon
from ..training.onset import evaluations, first_above_chance
from ..utils.files import replacing


# After those of the factors.
COLUMNS = [
    *("seed", "clean_accuracy", "robust_accuracy", "expected_robustness", "eval_norm", "eval_epsilons", "tier"),
    "attacks",
    *("num_examples", "num_classes", "seconds", "onset", "validation_accuracy", "broken_at", "images"),
    *("trust_checks", "run", "commit", "torch"),
]
_NUMBERS = [
    *("seed", "clean_accuracy", "robust_accuracy", "expected_robustness"),
    *("num_examples", "num_classes", "seconds", "onset"),
]
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def read_run(folder: Path) -> dict[str, Any]:
    """What results.csv says of a finished `hf-rft train`, except its options and seed.

    Raises:
        OSError: if the run did not write its report.
        ValueError: if its grid of epsilons is too fine for the column `broken_at`.
    """
    report = RobustnessReport.load(folder / "robustness.json")
    log = TrainerState.load_from_json(str(folder / "trainer_state.json")).log_history
    if len(report.epsilons) >= len(_DIGITS):
        raise ValueError(f"A study keeps at most {len(_DIGITS) - 1} epsilons a run, got {len(report.epsilons)}.")
    end = next(entry for entry in reversed(log) if "train_runtime" in entry)
    validation = [(entry["epoch"] / end["epoch"], entry["eval_accuracy"]) for entry in evaluations(log)]
    num_classes = report.settings["model"]["num_classes"]
    adapted = first_above_chance(log, num_classes)
    return {
        "clean_accuracy": report.clean_accuracy,
        "robust_accuracy": report.robust_accuracy,
        "expected_robustness": report.expected_robustness,
        "eval_norm": report.norm,
        "eval_epsilons": " ".join(map(format_epsilon, report.epsilons)),
        "tier": report.settings["tier"],
        "attacks": " ".join("{attack}:{steps}:{restarts}".format(**run) for run in report.settings["attacks"]),
        "num_examples": len(report),
        "num_classes": num_classes,
        "seconds": round(end["train_runtime"], 1),
        "onset": None if adapted is None else round(adapted["epoch"] / end["epoch"], 4),
        "validation_accuracy": " ".join(f"{share:.4g}:{accuracy:.4g}" for share, accuracy in validation),
        "broken_at": "".join(_DIGITS[place] for place in report.broken_at),
        "images": str(report.settings["dataset"]["sha256"])[:12],
        "trust_checks": " ".join(report.flags or {}),
        "commit": current_commit(),
        "torch": report.settings["versions"]["torch"],
    }


def current_commit() -> str:
    """Of the source that runs; the version of the package where it was installed without its repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not that of a repository around the environment
        return git("describe", "--always", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return versions()["hf_rft"]


def read_results(path: Path) -> pandas.DataFrame:
    """results.csv, with numbers where numbers belong; what is empty in a text column is the empty text.

    Raises:
        ValueError: if columns are missing.
    """
    table = pandas.read_csv(path, dtype=str, keep_default_na=False)
    if missing := [column for column in COLUMNS if column not in table]:
        raise ValueError(f"{path} has no column {missing[0]!r}, it is not the results.csv of a study.")
    for column in _NUMBERS:
        table[column] = pandas.to_numeric(table[column])
    return table


def factors_of(table: pandas.DataFrame) -> list[str]:
    return [column for column in table.columns if column not in COLUMNS]


def write_results(rows: Sequence[Mapping[str, Any]], factors: Sequence[str], folder: Path) -> None:
    """Write both tables, whole or not at all."""
    table = pandas.DataFrame(rows, columns=[*factors, *COLUMNS])
    for name, content in (("results.csv", table), ("curves.csv", curves(table, factors))):
        with replacing(folder / name) as scratch:
            content.to_csv(scratch, index=False, float_format="%.6g")


def curves(table: pandas.DataFrame, factors: Sequence[str]) -> pandas.DataFrame:
    """One row a run and epsilon: the epsilon as written, as a number, and the accuracy there."""
    rows = []
    for _, run in table.iterrows():
        first_wrong = broken_at(run["broken_at"])
        named = {column: run[column] for column in (*factors, "seed", "run")}
        for place, epsilon in enumerate(run["eval_epsilons"].split()):
            accuracy = (first_wrong > place).mean()
            rows.append({**named, "at": epsilon, "at_number": float(parse_epsilon(epsilon)), "accuracy": accuracy})
    return pandas.DataFrame(rows, columns=[*factors, "seed", "run", "at", "at_number", "accuracy"])


def broken_at(written: str) -> np.ndarray:
    """The column `broken_at` of one run as numbers."""
    return np.array([_DIGITS.index(digit) for digit in written])
