"""The Python of the pages runs, page by page, with tiny local models and images in place of those on the Hub."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import make_model
from PIL import Image
from published import publish, save_model

from hf_rft.attacks import ATTACKS
from hf_rft.cli.main import COMMANDS
from hf_rft.cli.recipes import find_file
from hf_rft.losses import LOSSES
from hf_rft.schedules import SCHEDULES


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if "_build" not in path.parts)
# These stand on their own; the others go on from "Your own images".
FROM_THE_START = ["getting_started.md", "how_to/own_images.md", "how_to/evaluation_to_quote.md"]
# What is shown -> what is tried.
REPLACED = {
    '"google/vit-base-patch16-224-in21k"': '"checkpoint"',
    '"google/vit-base-patch16-224"': '"checkpoint"',
    '"ethz/food101"': '"parquet_images"',
    '"ILSVRC/imagenet-1k"': '"parquet_images"',
    "range(500)": "range(4)",
    "num_train_epochs=50": "num_train_epochs=1, use_cpu=True",
    "n_trials=20": "n_trials=2",
    'hub_model_id="my-name/my-robust-model"': 'hub_model_id="user/robust"',  # on the Hub of hub_server.py
    'load_robust_model(\n    "my-name/my-robust-model"': 'load_robust_model("published"',
    'threat_model=ThreatModel("linf", "4/255")': 'threat_model=ThreatModel("linf", "2/255")',
    "min_expected_robustness=0.5": "min_expected_robustness=0.0",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.S | re.M)


def run(page: str, namespace: dict) -> dict:
    for code in blocks(page, "python"):
        for shown, tried in REPLACED.items():
            code = code.replace(shown, tried)
        exec(compile(code, page, "exec"), namespace)
    return namespace


@pytest.fixture
def folder(tmp_path, monkeypatch, processor):
    """A working directory with images, a checkpoint and a published model."""
    generator = np.random.default_rng(0)
    rows = {"image": [], "label": []}
    for split, count in (("train", 8), ("test", 4)):
        for label, name in enumerate(("cat", "dog")):
            path = tmp_path / "my_images" / split / name
            path.mkdir(parents=True)
            for index in range(count):
                image = Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8))
                image.save(path / f"{index}.png")
                rows["image"].append(image)
                rows["label"].append(label)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            tmp_path / "parquet_images" / f"{split}.parquet"
        )
    make_model("vit").vit.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    save_model(tmp_path / "published")
    publish(tmp_path / "published")
    (tmp_path / "metrics").symlink_to(ROOT / "metrics")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page != "contributing.md"])
def test_python_runs(folder, request, page):
    if page == "how_to/sharing.md":
        request.getfixturevalue("hub")
    run(page, {} if page in FROM_THE_START else run("how_to/own_images.md", {}))
    if page == "how_to/tracking.md":
        assert list(folder.glob("my_robust_model/**/events.out.tfevents*"))
        assert list((folder / "trackio").glob("robust-fine-tuning*"))
        assert list((folder / "trackio").rglob("*.png")), "pictures of adversarial examples"


def commands() -> list[list[str]]:
    text = "\n".join(block for page in PAGES for block in blocks(page, "bash"))
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("hf-rft ")]


def test_every_replacement_is_needed():
    text = "\n".join(block for page in PAGES for block in blocks(page, "python"))
    assert [shown for shown in REPLACED if shown not in text] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_command_lines_have_known_flags(command, monkeypatch, capsys):
    used = {word for words in commands() if words[1] == command for word in words if word.startswith("--")}
    module = importlib.import_module(f"hf_rft.cli.{command.replace('-', '_')}")
    monkeypatch.setattr(sys, "argv", [f"hf-rft {command}", "--help_all" if command == "train" else "--help"])
    with pytest.raises(SystemExit):
        module.main()
    known = re.findall(r"--\w+", capsys.readouterr().out)
    assert used <= set(known)


def test_recipes_and_settings_that_are_named_exist():
    words = [pair for command in commands() for pair in zip(command, command[1:], strict=False)]
    for flag, group in (("--config", None), ("--accelerate_config", "accelerate_configs")):
        names = [value for word, value in words if word == flag]
        assert names and all(find_file(flag, name, group) for name in names)


def test_every_attack_loss_and_schedule_is_in_the_paper_index():
    index = (DOCS / "paper_index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*?) \|.*?\| `([\w/.]*)`, `([\w/.]*)` \|$", index, re.M)
    assert len(rows) == index.count("\n| ") - 2  # header and rule
    for _, implemented, tested in rows:
        assert (ROOT / "hf_rft" / implemented).exists() and (ROOT / "tests" / tested).is_file(), (implemented, tested)
    papers = set(re.findall(r"^\* \*\*(.*?)\*\*: \*.*\*, .*\.$", index, re.M))
    assert papers and all(any(paper in row for row in index.split("## ")[0].splitlines()) for paper in papers)
    for kind, table in (("attack", ATTACKS), ("loss", LOSSES), ("schedule", SCHEDULES)):
        named = {name for method, *_ in rows if kind in method for name in re.findall(r"`(\w+)`", method)}
        assert set(table) <= named


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_nobody_else(tmp_path):
    options = ["--fail-on-warning", "--keep-going", "--quiet", "--doctree-dir", str(tmp_path / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(tmp_path / "site")]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="(\w+:)?//|<link[^>]* href="(\w+:)?//', page.read_text())
        assert not loaded, page
