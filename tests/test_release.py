"""What a release consists of: sdist and wheel, the workflow that makes them, and how to cite them."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.slow
def test_sdist_and_wheel_are_built_checked_and_installed(tmp_path):
    clone = tmp_path / "clone"
    left_behind = (".*venv", ".git", "outputs", "build", "dist", "_build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, clone, symlinks=True, ignore=shutil.ignore_patterns(*left_behind))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment["TMPDIR"] = str(tmp_path)
    command = [clone / ".ci" / "release", tmp_path / "dist"]
    release = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert release.returncode == 0, release.stdout
    names = sorted(path.name for path in (tmp_path / "dist").iterdir())
    assert names == [f"hf_rft-{PROJECT['version']}{end}" for end in ("-py3-none-any.whl", ".tar.gz")]
    assert release.stdout.count("PASSED") == 2
    assert release.stdout.count(f"hf_rft {PROJECT['version']}\n") == 2
    assert release.stdout.count("site-packages/hf_rft/__init__.py") == 2


def test_the_workflow_runs_the_same_script_on_a_tag():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads `on` as true
    assert ".ci/release dist" in [step.get("run") for step in workflow["jobs"]["build"]["steps"]]


def test_the_citation_is_that_of_the_package_and_its_cards():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    card = (ROOT / "hf_rft" / "hub" / "model_card_template.md").read_text(encoding="utf-8")
    paper = citation["preferred-citation"]
    assert f"title={{{paper['title']}}}" in card
    assert f"year={{{paper['year']}}}" in card
