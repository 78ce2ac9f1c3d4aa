import json
from pathlib import Path

import pytest

from hf_rft.cli import compare


CONFIG = Path(__file__).parents[2] / "recipes" / "fashion_mnist" / "efficientnet_lite0_linear.yaml"


def fake_run(folder, accuracies, validation, epsilon=0.03):
    """The files of a finished run that `compare.read` looks at."""
    folder.mkdir(parents=True)
    results = {f"eval_accuracy_at_{e}": a for e, a in zip(("0", "1/255", "2/255"), accuracies, strict=True)}
    results |= {"eval_robust_accuracy": accuracies[-1], "eval_expected_robustness": 0.5, "train_runtime": 120.0}
    results["eval_settings"] = {"norm": "linf"}
    (folder / "all_results.json").write_text(json.dumps(results))
    log = [{"epoch": epoch, "eval_accuracy": accuracy} for epoch, accuracy in enumerate(validation, start=1)]
    log += [{"epoch": 1.0, "loss": 1.0, "epsilon": epsilon}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (folder / "config.json").write_text(json.dumps({"label_names": list("abcdefghij")}))
    return folder


def test_table_and_figure(tmp_path):
    runs = {
        "good": [
            compare.read(fake_run(tmp_path / "a", (0.8, 0.7, 0.6), [0.1, 0.5])),
            compare.read(fake_run(tmp_path / "b", (0.9, 0.7, 0.4), [0.3, 0.6])),
        ],
        "failed": [compare.read(fake_run(tmp_path / "c", (0.1, 0.1, 0.1), [0.1, 0.2]))],
    }
    table = compare.markdown_table(runs)
    assert "| good | 85.0 ± 7.1 | 70.0 ± 0.0 | 50.0 ± 14.1 | 50.0 ± 0.0 | 2, 1 | 2.0 ± 0.0 |" in table
    assert "| failed | 10.0 | 10.0 | 10.0 | 50.0 | never | 2.0 |" in table
    compare.plot_comparison(runs, tmp_path / "figure.png", norm="linf")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_validation_is_drawn_too(tmp_path):
    run = compare.read(fake_run(tmp_path / "a", (0.8, 0.7, 0.6), []))
    assert (run["validation"], run["onset"]) == ([], None)
    compare.plot_comparison({"only": [run]}, tmp_path / "figure.png", norm="linf")
    assert (tmp_path / "figure.png").is_file()


@pytest.mark.slow
def test_runs_recipes_as_processes_and_does_not_repeat_them(tmp_path, monkeypatch, capsys):
    tiny = ["--max_train_samples", "16", "--max_eval_samples", "4", "--max_test_samples", "4", "--image_size", "32"]
    tiny += ["--max_steps", "1", "--eval_attack_steps", "1"]
    monkeypatch.setattr(
        "sys.argv", ["compare.py", str(CONFIG), "--seeds", "5", "--output_dir", str(tmp_path), "--jobs", "2", *tiny]
    )
    compare.main()
    first = capsys.readouterr().out
    assert "| efficientnet_lite0_linear |" in first
    assert {"comparison.md", "comparison.json", "comparison.png"} <= {path.name for path in tmp_path.iterdir()}
    run = json.loads((tmp_path / "comparison.json").read_text())[CONFIG.stem][0]
    assert len(run["validation"]) == 1
    monkeypatch.setattr(compare.subprocess, "run", None)
    compare.main()
    assert "already finished" in capsys.readouterr().out


@pytest.mark.slow
def test_failed_run_says_where_its_log_is(tmp_path, monkeypatch):
    arguments = [str(CONFIG), "--seeds", "0", "--output_dir", str(tmp_path), "--epsilon", "8"]
    monkeypatch.setattr("sys.argv", ["compare.py", *arguments])
    with pytest.raises(ChildProcessError, match=r"ended with status .* \(.*did you mean '8/255'.*\); see .*log.txt"):
        compare.main()
    log = (tmp_path / CONFIG.stem / "seed0" / "log.txt").read_text()
    assert "did you mean '8/255'" in log
