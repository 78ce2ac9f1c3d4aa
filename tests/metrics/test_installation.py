"""The metrics can be loaded from where they are installed: from a checkout, from its link, from a wheel."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest

import hf_rft.metrics


METRICS = Path(hf_rft.metrics.__file__).parent
ROOT = METRICS.parents[1]

CASES = {
    "expected_robustness": {"predictions": [[1, 1, 0]], "references": [1], "epsilons": [0, 0.25, 1]},
    "robust_accuracy": {"predictions": [1, 0], "references": [1, 1]},
}
VALUES = {"expected_robustness": 0.625, "robust_accuracy": 0.5}

# Run with the wheel's folder and the cases as arguments.
LOAD_AND_COMPUTE = """
import json, sys
from pathlib import Path

import evaluate
import hf_rft.metrics

folder = Path(hf_rft.metrics.__file__).parent
assert folder.is_relative_to(sys.argv[1]), f"imported from {folder}"
cases = json.loads(sys.argv[2])
print(json.dumps({name: evaluate.load(str(folder / name)).compute(**case)[name] for name, case in cases.items()}))
"""


def files_of(name):
    return {"README.md", "__init__.py", "app.py", "requirements.txt", "tests.py", f"{name}.py"}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("metrics", [METRICS, ROOT / "metrics"], ids=["package", "link"])
def test_source_tree(metrics, name):
    assert files_of(name) <= {path.name for path in (metrics / name).iterdir()}
    assert evaluate.load(str(metrics / name)).compute(**CASES[name])[name] == VALUES[name]


@pytest.mark.parametrize("name", CASES)
def test_path_as_in_the_readme(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert evaluate.load(f"metrics/{name}").compute(**CASES[name])[name] == VALUES[name]


@pytest.mark.slow
def test_wheel(tmp_path):
    # Built from a copy: building leaves files behind, and would pack those that an earlier build has left.
    source = tmp_path / "source"
    shutil.copytree(ROOT / "hf_rft", source / "hf_rft", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path / "wheels"), str(source)], check=True)
    (wheel,) = (tmp_path / "wheels").iterdir()
    installed = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(installed), str(wheel)], check=True)

    for name in CASES:
        files = {path.name for path in (installed / "hf_rft" / "metrics" / name).iterdir() if path.is_file()}
        assert files == files_of(name)
    result = subprocess.run(
        [sys.executable, "-c", LOAD_AND_COMPUTE, str(installed), json.dumps(CASES)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed), "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == VALUES
