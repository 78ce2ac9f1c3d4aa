"""The README's Python runs, with a tiny local model and dataset in place of those on the Hub."""

import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import make_model
from PIL import Image
from published import publish, save_model


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture
def local_dataset(tmp_path):
    generator = np.random.default_rng(0)
    rows = {
        "image": [Image.fromarray(generator.integers(0, 256, (20, 20), dtype=np.uint8)) for _ in range(16)],
        "label": [index % 2 for index in range(16)],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / f"{split}-0.parquet")
    return tmp_path / "data"


def test_quick_start(tmp_path, processor, local_dataset, capsys):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "trainer.train()" in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    checkpoint = tmp_path / "checkpoint"
    base = make_model("vit").vit
    base.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    for hub_name, local in (
        ("ethz/food101", local_dataset),
        ("google/vit-base-patch16-224-in21k", checkpoint),
        ('"vit-food101"', None),
        ("num_train_epochs=50", "max_steps=1, use_cpu=True, report_to='none'"),
    ):
        assert hub_name in code
        code = code.replace(hub_name, str(local) if local is not None else repr(str(tmp_path / "output")))
    exec(compile(code, "README.md", "exec"), {})
    assert "eval_expected_robustness" in capsys.readouterr().out


def test_measure_robustness(tmp_path, processor, local_dataset, capsys, monkeypatch):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "report.table()" in block)
    checkpoint = tmp_path / "checkpoint"
    make_model("vit").save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    for hub_name, local in (("ILSVRC/imagenet-1k", local_dataset), ("google/vit-base-patch16-224", checkpoint)):
        assert hub_name in code
        code = code.replace(hub_name, str(local))
    assert "select(range(500))" in code
    code = code.replace("range(500)", "range(4)")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "expected robustness" in capsys.readouterr().out
    assert {"robustness.json", "robustness_curve.png", "robustness-cache"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_load_robust_model(tmp_path, capsys):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "min_expected" in block)
    save_model(tmp_path)
    publish(tmp_path)
    for shown, tried in (("my-name/my-robust-model", str(tmp_path)), ("robustness=0.5", "robustness=0.0")):
        assert shown in code
        code = code.replace(shown, tried)
    exec(compile(code, "README.md", "exec"), {})
    assert "expected robustness" in capsys.readouterr().out


def test_metrics(monkeypatch):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "evaluate.load" in block)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(code.replace("metric.compute", "results = metric.compute"), "README.md", "exec"), names)
    # The first example is right throughout, the second up to 4/255: accuracies 1, 1 and 1/2.
    assert names["results"]["expected_robustness"] == pytest.approx(0.875)


def test_it_fits_two_screens_and_its_commands_are_one_line_each():
    assert len(README.splitlines()) <= 150
    for tag in ("main-job", "tests"):
        (command,) = re.findall(rf"<!-- run: {tag} -->\n```bash\n(.*?)\n```", README, re.S)
        assert command.startswith("python3 -m venv .venv && ") and "\n" not in command


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).is_file(), target


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README
