import json
from fractions import Fraction

import numpy as np
import pandas
import pytest
from evaluation.test_report import make_report

from hf_rft.studies.results import (
    COLUMNS,
    broken_at,
    curves,
    factors_of,
    read_results,
    read_run,
    write_results,
)


SETTINGS = {
    "model": {"name": "m", "num_classes": 10},
    "dataset": {"sha256": "abcdef" * 10},
    "tier": "standard",
    "attacks": [
        {"attack": "apgd", "steps": 100, "restarts": 1},
        {"attack": "apgd_targeted", "steps": 100, "restarts": 1},
    ],
    "seed": 0,
    "versions": {"torch": "2.0.1"},
}


def finished(folder, places=(0, 1, 2, 4, 4), validation=(0.1, 0.5), **options):
    """The files of a finished run that a study reads."""
    folder.mkdir(parents=True)
    make_report(places, settings=SETTINGS, **options).save(folder / "robustness.json")
    log = [{"epoch": epoch, "eval_accuracy": accuracy} for epoch, accuracy in enumerate(validation, start=1)]
    log.append({"train_runtime": 120.04, "epoch": 2.0})
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def test_a_finished_run_as_a_row(tmp_path):
    row = read_run(finished(tmp_path / "run", flags={"random_output": "it varies"}))
    assert (row["clean_accuracy"], row["robust_accuracy"]) == (0.8, 0.4)
    assert (row["eval_epsilons"], row["broken_at"]) == ("0 2/255 85/255 0.5", "01244")
    assert (row["tier"], row["num_examples"], row["num_classes"], row["seconds"]) == ("standard", 5, 10, 120.0)
    assert (row["images"], row["trust_checks"]) == ("abcdefabcdef", "random_output")
    assert (row["validation_accuracy"], row["onset"]) == ("0.5:0.1 1:0.5", 1.0)
    assert (row["attacks"], row["torch"]) == ("apgd:100:1 apgd_targeted:100:1", "2.0.1")
    assert row["commit"] and set(row) | {"seed", "run"} == set(COLUMNS)


def test_onset_of_a_run_that_never_learned_is_empty(tmp_path):
    row = read_run(finished(tmp_path / "run", validation=(0.1, 0.15)))
    assert row["onset"] is None


def test_tables_say_what_was_written(tmp_path):
    row = read_run(finished(tmp_path / "run", validation=(0.1, 0.15))) | {"seed": 3, "run": "0123456789ab"}
    rows = [{**row, "data": "01", "epsilon": "4/255"}, {**row, "data": "None", "epsilon": "4/255", "onset": 0.5}]
    write_results(rows, ["data", "epsilon"], tmp_path)
    table = read_results(tmp_path / "results.csv")
    assert factors_of(table) == ["data", "epsilon"]
    assert list(table["data"]) == ["01", "None"], "names are text, whatever they look like"
    assert list(table["seed"]) == [3, 3] and np.isnan(table["onset"][0]) and table["onset"][1] == 0.5
    assert table["expected_robustness"][0] == pytest.approx(row["expected_robustness"], abs=1e-6)
    np.testing.assert_array_equal(broken_at(table["broken_at"][0]), [0, 1, 2, 4, 4])
    long = pandas.read_csv(tmp_path / "curves.csv", dtype={"data": str}, keep_default_na=False)
    assert list(long[long["data"] == "01"]["accuracy"]) == [0.8, 0.6, 0.4, 0.4]
    assert list(long["at"][:4]) == ["0", "2/255", "85/255", "0.5"] and long["at_number"][3] == 0.5


def test_an_empty_study_has_headers(tmp_path):
    write_results([], ["data"], tmp_path)
    table = read_results(tmp_path / "results.csv")
    assert table.empty and factors_of(table) == ["data"] and curves(table, ["data"]).empty


def test_other_tables_are_refused(tmp_path):
    (tmp_path / "results.csv").write_text("data,seed\nemoji,0\n")
    with pytest.raises(ValueError, match=r"results.csv has no column 'clean_accuracy'"):
        read_results(tmp_path / "results.csv")


def test_a_grid_with_more_epsilons_than_digits_is_refused(tmp_path):
    fine = [Fraction(place, 100) for place in range(36)]
    with pytest.raises(ValueError, match="at most 35 epsilons a run, got 36"):
        read_run(finished(tmp_path / "run", epsilons=fine))
