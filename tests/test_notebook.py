"""The notebook runs from top to bottom, on the kernel that `make setup EXTRAS=dev` installs."""

import ast
import os

import nbclient
import nbformat
import pytest

from tests.conftest import ROOT

NOTEBOOK = ROOT / "examples" / "digits.ipynb"


@pytest.mark.slow
def test_every_cell_runs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": NOTEBOOK.parent}})
    client.execute(env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 7


def test_what_it_imports_is_there():
    """In a second: every cell takes minutes."""
    source = "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code")
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert any(node.module.startswith("utils.") for node in imports)
    for node in imports:
        names = ", ".join(alias.name for alias in node.names)
        exec(f"from {node.module} import {names}", {})


def test_it_is_committed_as_it_ran():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
