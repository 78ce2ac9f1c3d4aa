import numpy as np
import pytest

from hf_rft.studies.report import write_report
from hf_rft.studies.results import COLUMNS
from studies.test_statistics import ROWS, table


PNG = b"\x89PNG\r\n\x1a\n"


def saved(folder, rows=ROWS, **columns):
    found = table(rows, **{"validation_accuracy": "0.25:0.1 0.5:0.4 1:0.6", **columns})
    found["run"] = [f"run{place}" for place in range(len(found))]
    found[["data", "schedule", *COLUMNS]].to_csv(folder / "results.csv", index=False)
    return folder


def test_report_of_two_pairs(tmp_path):
    text = write_report(saved(tmp_path))
    assert text == (tmp_path / "report.md").read_text()
    assert "# schedule: constant, hinge" in text
    assert "6 runs, seeds 0, 1. Evaluation: linf, tier fast, 4 examples a run. 0.1 hours of training; commit c" in text
    assert "| easy | constant | 2 | 62.5 ± 17.7 | 62.5 ± 17.7 | 62.5 ± 17.7 | 50.0 | 1.0 |" in text
    assert "| hard | hinge | 1 | 50.0 | 0.0 | 25.0 | 50.0 | 1.0 |" in text
    assert "## Compared with constant" in text
    assert "| easy | hinge | 2 | +25.0 | [+25.0, +25.0] | [" in text and "| hard | hinge | 1 | +25.0 |  | [" in text
    assert "| hinge | 2 | +25.0 | [+25.0, +25.0] | 2 | 1 | 0 | +25.0 | +25.0 | 1.0 |" in text
    for name in ("levels", "differences", "curves", "adaptation"):
        assert f"({name}.png)" in text and (tmp_path / f"{name}.png").read_bytes().startswith(PNG)
    assert not (tmp_path / "onset.png").exists(), "two pairs cannot be correlated"


def test_report_with_onsets_and_failed_checks(tmp_path):
    rows = [(data, "constant", 0, "0000") for data in "abcd"] + [
        ("a", "hinge", 0, "2222"),
        ("b", "hinge", 0, "2220"),
        ("c", "hinge", 0, "2200"),
        ("d", "hinge", 0, "2000"),
    ]
    checks = ["flat_loss zero_gradients", "flat_loss", *[""] * 6]
    text = write_report(saved(tmp_path, rows, onset=[0.1, 0.2, 0.7, np.nan, *[0.0] * 4], trust_checks=checks))
    assert "Trust checks failed in 2 runs: flat_loss (2), zero_gradients (1)." in text
    assert "| hinge | 4 | -1.00 | 0.083 |" in text and (tmp_path / "onset.png").read_bytes().startswith(PNG)


def test_another_factor_and_baseline(tmp_path):
    text = write_report(saved(tmp_path), compare="schedule", baseline="hinge")
    assert "## Compared with hinge" in text and "| easy | constant | 2 | -25.0 |" in text
    text = write_report(saved(tmp_path, images=["a"] * 4 + ["b"] * 2), compare="data")
    assert "| constant | hard | 1 | other images |  |  |" in text and "Over all pairs" not in text


def test_one_run_alone_is_reported(tmp_path):
    text = write_report(saved(tmp_path, ROWS[:1], validation_accuracy=""))
    assert "| all | constant | 1 | 50.0 |" in text and "Compared" not in text


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(OSError):
        write_report(tmp_path)
    saved(tmp_path)
    with pytest.raises(ValueError, match="--compare colour is not a factor of the study; there are data, schedule"):
        write_report(tmp_path, compare="colour")
    with pytest.raises(ValueError, match="--baseline linear is not an option of schedule; there are constant, hinge"):
        write_report(tmp_path, baseline="linear")
    with pytest.raises(ValueError, match="has no runs yet"):
        write_report(saved(tmp_path, []))
