"""What each `evaluate` module brings besides its script: the card, the Space, the requirements, known cases."""

import ast
import doctest
import importlib
import inspect
import re
import sys
from pathlib import Path

import evaluate
import pytest
import yaml

import hf_rft.metrics
from hf_rft.metrics.expected_robustness.app import compute as compute_expected_robustness
from hf_rft.metrics.robust_accuracy.app import compute as compute_robust_accuracy


NAMES = ("expected_robustness", "robust_accuracy")
METRICS = Path(hf_rft.metrics.__file__).parent
ROOT = METRICS.parents[1]


@pytest.fixture(params=NAMES)
def folder(request):
    return METRICS / request.param


def card(folder):
    """Front matter and text of the metric card."""
    _, front_matter, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front_matter), text


def known_cases(folder):
    """The cases of `tests.py`, as inputs and result."""
    cases = importlib.import_module(f"hf_rft.metrics.{folder.name}.tests").test_cases
    assert cases
    return [
        {"inputs": {name: case[name] for name in case if name != "result"}, "result": case["result"]} for case in cases
    ]


def run_doctest(name, text):
    test = doctest.DocTestParser().get_doctest(text, {"evaluate": evaluate}, name, None, None)
    report = []
    results = doctest.DocTestRunner().run(test, out=report.append)
    assert results.failed == 0, "".join(report)
    return results.attempted


def test_front_matter(folder):
    fields, _ = card(folder)
    assert fields["title"].lower().replace(" ", "_") == folder.name
    assert (fields["sdk"], fields["app_file"], fields["pinned"]) == ("gradio", "app.py", False)
    assert fields["tags"] == ["evaluate", "metric"]
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {fields["colorFrom"], fields["colorTo"]} <= colors
    assert re.fullmatch(r"\d+\.\d+\.\d+", fields["sdk_version"])
    assert fields["emoji"]
    # One description, in the card and in the script.
    script = importlib.import_module(f"hf_rft.metrics.{folder.name}.{folder.name}")
    assert fields["description"].split() == script._DESCRIPTION.split()


def test_sections(folder):
    _, text = card(folder)
    sections = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert sections == ["Metric description", "How to use", "Limitations and bias", "Citation"]


def test_examples_of_the_card(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, text = card(folder)
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert run_doctest(folder.name, "\n".join(blocks)) >= 6


def test_examples_of_the_docstring(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run_doctest(folder.name, evaluate.load(str(folder)).inputs_description) == 3


def test_card_names_every_input_and_output(folder):
    _, text = card(folder)
    metric = evaluate.load(str(folder))
    inputs, outputs = text.split("### Inputs")[1].split("### Output values")
    listed = re.findall(r"^- \*\*(\w+)\*\*", inputs, flags=re.MULTILINE)
    assert listed == list(inspect.signature(metric._compute).parameters)
    returned = {name for case in known_cases(folder) for name in metric.compute(**case["inputs"])}
    assert set(re.findall(r"\*\*(\w+)\*\*", outputs)) == returned


def test_known_cases(folder):
    metric = evaluate.load(str(folder))
    for case in known_cases(folder):
        results = metric.compute(**case["inputs"])
        for name, value in case["result"].items():
            assert results[name] == pytest.approx(value), name


def test_script_needs_what_its_requirements_list_and_nothing_else(folder):
    tree = ast.parse((folder / f"{folder.name}.py").read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    required = {re.split("[^a-z]", line)[0] for line in (folder / "requirements.txt").read_text().splitlines()}
    assert imported - set(sys.stdlib_module_names) == required


def test_space_computes_what_the_metric_does():
    metric = evaluate.load(str(METRICS / "expected_robustness"))
    results = metric.compute(predictions=[[0, 0, 0], [1, 1, 0]], references=[0, 1], epsilons=[0, 4 / 255, 0.1])
    assert compute_expected_robustness("[[0, 0, 0], [1, 1, 0]]", "[0, 1]", "0, 4/255,0.1") == results

    metric = evaluate.load(str(METRICS / "robust_accuracy"))
    results = metric.compute(predictions=[0, 0], references=[0, 1], clean_predictions=[0, 1])
    assert compute_robust_accuracy("[0, 0]", "[0, 1]", "[0, 1]") == results
    assert compute_robust_accuracy("[0, 0]", "[0, 1]", " ") == metric.compute(predictions=[0, 0], references=[0, 1])


@pytest.mark.parametrize(
    ("compute", "texts", "message"),
    [
        (compute_expected_robustness, ("[[0, 0]", "[0]", "0, 1"), "`predictions` must be a JSON list"),
        (compute_expected_robustness, ("[[0, 0]]", "", "0, 1"), "`references` must be a JSON list"),
        (compute_expected_robustness, ("[[0, 0]]", "[0]", "0, a"), "`epsilons` must be numbers or fractions .*'a'"),
        (compute_expected_robustness, ("[[0, 0]]", "[0]", "0, 1/0"), "`epsilons` must be numbers or fractions"),
        (compute_expected_robustness, ("[[0, 0.7]]", "[0]", "0, 1"), "`predictions` must hold class indices"),
        (compute_robust_accuracy, ("[0", "[0]", ""), "`predictions` must be a JSON list"),
        (compute_robust_accuracy, ("[0]", "x", ""), "`references` must be a JSON list"),
        (compute_robust_accuracy, ("[0]", "[0]", "x"), "`clean_predictions` must be a JSON list"),
        (compute_robust_accuracy, ("[0]", "[0, 1]", ""), "`predictions` holds 1 examples, `references` 2"),
    ],
)
def test_errors_of_the_space(compute, texts, message):
    with pytest.raises(ValueError, match=message):
        compute(*texts)
