"""The notebooks of demos/ run, agree with their scripts, and show no error."""

import os
import re
from pathlib import Path

import jupytext
import nbformat
import pytest
import torch
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from tests.models import SIZES, tiny_model
from tl_loops import LoopedTransformer

DEMOS = Path(__file__).parents[2] / "demos"
NOTEBOOKS = sorted(DEMOS.glob("*.ipynb"))
AT_MOST = 1_500_000
"""Bytes of a notebook, so that the repository stays small."""


def sources(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells if cell.source]


def test_there_are_notebooks():
    assert DEMOS / "patching_across_iterations.ipynb" in NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_the_run_of_its_script(path):
    notebook = nbformat.read(path, as_version=4)
    script = jupytext.read(path.with_suffix(".py"))
    assert sources(notebook) == sources(script), f"run `make notebooks`: {path.stem} was edited"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "run `make notebooks`"
    assert any(cell.outputs for cell in code)
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert "error" not in kinds
    assert not [o for cell in code for o in cell.outputs if o.get("name") == "stderr"]
    assert path.stat().st_size < AT_MOST


@pytest.fixture(scope="module")
def kernel():
    """One for all notebooks: most of a short one's time goes into importing torch."""
    manager = KernelManager(kernel_name="python3")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # the suite's processes share the cores
    manager.start_kernel(cwd=str(DEMOS), env=env)
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, kernel):
    notebook = jupytext.read(path.with_suffix(".py"))
    fresh = nbformat.v4.new_code_cell("%reset -f\nimport torch\ntorch.set_grad_enabled(True)")
    notebook.cells.insert(0, fresh)
    client = NotebookClient(notebook, km=kernel, timeout=300)
    client.execute(cleanup_kc=False)  # raises CellExecutionError with the cell's traceback


def test_released_models_run_on_models_of_their_kind(tmp_path, monkeypatch):
    """The notebook's cells, on small models with random weights in the place of the released."""
    monkeypatch.setitem(SIZES, "d_vocab", 80)
    tokenizer = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny").tokenizer
    stand_ins = {}
    for architecture in ("huginn", "ouro", "retrofitted"):
        model = tiny_model(architecture)
        model.set_tokenizer(tokenizer)
        model.save_pretrained(tmp_path / architecture)
        stand_ins[str(tmp_path / architecture)] = 6
    shown = []
    namespace = {"display": shown.append, "MODELS": stand_ins}
    for cell in jupytext.read(DEMOS / "released_models.py").cells:
        if cell.cell_type == "code":
            source = re.sub(r"^MODELS = \{.*?^\}", "", cell.source, flags=re.S | re.M)
            exec(compile(source, "released_models", "exec"), namespace)
    torch.set_grad_enabled(True)
    assert set(namespace["models"]) == set(stand_ins)
    assert len(shown) == 7  # two profiles a model, and Ouro's exits
