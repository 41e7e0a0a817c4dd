"""The notebook runs from top to bottom, on the kernel that `make setup EXTRAS=dev` installs."""

import ast
import os

import nbclient
import nbformat
import pytest

from tests.conftest import ROOT

NOTEBOOK = ROOT / "examples" / "digits.ipynb"
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.mark.slow
def test_every_cell_runs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": NOTEBOOK.parent}})
    client.execute(env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 7
    assert_bars(notebook)


def assert_bars(notebook) -> None:
    """The training and the sampling have each a bar that is a widget, and that has reached its end."""
    for call in ("train(", "generator.sample("):
        (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and call in cell.source]
        assert [WIDGET in output.get("data", {}) for output in cell.outputs].count(True) == 1
    states = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"].values()
    texts = [widget["state"]["value"].lstrip("\u2007 ") for widget in states if widget["model_name"] == "HTMLModel"]
    assert {"800/800", "40/40"} <= {text.partition("\u2007")[0] for text in texts}


def test_what_it_imports_is_there():
    """In a second: every cell takes minutes."""
    source = "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code")
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert any(node.module.startswith("utils.") for node in imports)
    for node in imports:
        names = ", ".join(alias.name for alias in node.names)
        exec(f"from {node.module} import {names}", {})


def test_it_is_committed_as_it_ran():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert_bars(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
