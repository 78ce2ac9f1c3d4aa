import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import yaml
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer

import hf_rft.metrics
from hf_rft.cli import push_metric


METRICS = Path(hf_rft.metrics.__file__).parent
CASES = {
    "expected_robustness": {"predictions": [[1, 1, 0], [2, 2, 2]], "references": [1, 2], "epsilons": [0, 0.25, 1]},
    "robust_accuracy": {"predictions": [1, 0], "references": [1, 1], "clean_predictions": [1, 1]},
}


@pytest.fixture(scope="module")
def hub():
    """With both metrics of the user `my-name` on it: one public, one private."""
    with HubServer(user="my-name") as hub:
        for name in CASES:
            files = {path.name: path.read_bytes() for path in (METRICS / name).glob("[!_]*.*")}
            hub.create("spaces", f"my-name/{name}", files, sdk="gradio", private=name == "robust_accuracy")
        yield hub


@pytest.fixture
def empty_hub(monkeypatch, tmp_path):
    """Where `push_metric` pushes to: what talks to the Hub is a process of its own, which gets this environment."""
    with HubServer(user="my-name") as hub:
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        yield hub


# A Space has neither hf_rft nor what only hf_rft needs.
HIDE = """
import sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name in ("torch", "transformers") else find_spec(name, *rest)
sys.modules["hf_rft"] = None  # an editable installation is found otherwise
"""


def run(hub, tmp_path, code, *arguments):
    """Run Python as in a Space, in a process of its own with an empty cache; what it prints last, as JSON."""
    environment = {**hub.environment(tmp_path / "home", READ_TOKEN), "GRADIO_ANALYTICS_ENABLED": "False"}
    command = [sys.executable, "-c", HIDE + code, *arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- Pushing ---


def test_both_metrics(empty_hub, capsys):
    push_metric.main(["--namespace", "my-name"])
    printed = capsys.readouterr().out
    assert list(empty_hub.repositories) == [("spaces", f"my-name/{name}") for name in CASES]
    for name in CASES:
        space = empty_hub.repo("spaces", f"my-name/{name}")
        assert (space.sdk, space.private) == ("gradio", False)
        files = space.files()
        names = {".gitattributes", "README.md", "app.py", "requirements.txt", "tests.py", f"{name}.py"}
        assert files.keys() == names
        for file in names - {".gitattributes"}:
            assert files[file] == (METRICS / name / file).read_bytes()
        assert f"/spaces/my-name/{name}/commit/{space.branches['main']}" in printed
        assert f'evaluate.load("my-name/{name}")' in printed


def test_options(empty_hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    options = ["--private", "--revision", "dev", "--token", WRITE_TOKEN, "--timeout", "60"]
    push_metric.main(["--namespace", "my-name", "--metrics", "robust_accuracy", *options])
    space = empty_hub.repo("spaces", "my-name/robust_accuracy")
    assert list(empty_hub.repositories.values()) == [space]
    assert space.private
    assert "app.py" in space.files("dev") and "app.py" not in space.files("main")
    assert 'evaluate.load("my-name/robust_accuracy", revision="dev")' in capsys.readouterr().out


def test_again(empty_hub, capsys):
    """What did not change is not pushed; the Space stays private."""
    push_metric.main(["--namespace", "my-name", "--metrics", "robust_accuracy", "--private"])
    push_metric.main(["--namespace", "my-name", "--metrics", "robust_accuracy"])
    assert empty_hub.repo("spaces", "my-name/robust_accuracy").private
    assert empty_hub.count("commit") == 1


@pytest.mark.parametrize(
    ("namespace", "token", "message"),
    [
        ("google", WRITE_TOKEN, '403.*rights.*namespace "google"'),
        ("my-name", READ_TOKEN, "403.*rights.*namespace"),
        ("my-name", None, "401.*hf auth login.*token with write access"),
    ],
    ids=["namespace of others", "read-only token", "no token"],
)
def test_not_allowed(empty_hub, monkeypatch, namespace, token, message):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit) as exit_info:
        push_metric.main(["--namespace", namespace])
    # Text as the code: Python prints it and ends with status 1.
    assert re.search(f"(?s){namespace}/expected_robustness.*{message}", str(exit_info.value.code))
    assert empty_hub.count("create") == 1 and not empty_hub.repositories


# --- What is on the Hub then ---

LOAD_AND_COMPUTE = """
import json

import evaluate
from huggingface_hub import snapshot_download

cases = json.loads(sys.argv[1])
by_name = {name: evaluate.load(f"my-name/{name}") for name in cases}
folders = {name: snapshot_download(f"my-name/{name}", repo_type="space") for name in cases}
by_path = {name: evaluate.load(f"{folder}/{name}.py") for name, folder in folders.items()}
results = [{name: loaded[name].compute(**case) for name, case in cases.items()} for loaded in (by_name, by_path)]
print(json.dumps(results))
"""


def test_evaluate_loads_them(hub, tmp_path):
    """By name, and from a folder with the downloaded Space."""
    by_name, by_path = run(hub, tmp_path, LOAD_AND_COMPUTE, json.dumps(CASES))
    expected = {name: evaluate.load(str(METRICS / name)).compute(**case) for name, case in CASES.items()}
    assert by_name == by_path == expected


# The page as a Space runs it: in the Space's own folder.
TRY_PAGE = """
import json
from pathlib import Path

from huggingface_hub import snapshot_download

folder = snapshot_download("my-name/expected_robustness", repo_type="space")
sys.path.insert(0, folder)
import app

assert Path(app.__file__).parent == Path(folder)
example = app.build_interface().examples[0]
print(json.dumps([example, app.compute(*example)]))
"""


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio, which a Space brings")
def test_page_computes_the_known_case(hub, tmp_path):
    (predictions, references, epsilons), results = run(hub, tmp_path, TRY_PAGE)
    metric = evaluate.load(str(METRICS / "expected_robustness"))
    assert results == metric.compute(
        predictions=json.loads(predictions),
        references=json.loads(references),
        epsilons=[float(epsilon) for epsilon in epsilons.split(",")],
    )


@pytest.mark.parametrize("name", CASES)
def test_requirements_cover_the_page(name):
    """The Space installs gradio as the card says, and what requirements.txt lists."""
    folder = METRICS / name
    assert yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])["sdk"] == "gradio"
    imported = set()
    for node in ast.walk(ast.parse((folder / "app.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    required = {re.split("[^a-z_]", line)[0] for line in (folder / "requirements.txt").read_text().splitlines()}
    beside = {path.stem for path in folder.glob("*.py")}
    assert imported - set(sys.stdlib_module_names) - beside == {"gradio", "evaluate"}
    assert "evaluate" in required
