"""An exported notebook without a network: figures and views are drawn and tell their numbers."""

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter

CELLS = [
    """
import plotly.io
import torch
from tl_loops import LoopedTransformer, plots, tasks

plotly.io.renderers.default = "notebook"  # the library comes with the notebook
torch.set_num_threads(1)
model = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny", n_iterations=2)
tokens = model.to_tokens(tasks.sample_pair()[0].text)
_, cache = model.run_with_cache(tokens)
""",
    "plots.plot_residual_norms(cache).show()",
    "plots.plot_floorplan(cache, backend='matplotlib')",
    "plots.attention_patterns(cache, tokens)",
    "plots.colored_tokens(tokens, torch.arange(tokens.shape[1]), 'Position', model=model)",
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source.strip()) for source in CELLS],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    page, _ = HTMLExporter().from_notebook_node(notebook)
    path = tmp_path_factory.mktemp("notebook") / "notebook.html"
    path.write_text(page, encoding="utf-8")
    return path


def test_every_figure_is_drawn_and_tells_its_numbers(offline_page, exported):
    page = offline_page(exported)
    page.wait_for_selector(".plotly .scatterlayer .points path")
    page.wait_for_selector(".circuits-view table, .circuits-view canvas, .circuits-view svg")
    assert page.locator(".circuits-view").count() == 2
    image = page.locator("img[src^='data:image/png']").first
    box = image.bounding_box()
    assert box is not None and box["width"] > 300
    drawn = "image => image.complete && image.naturalWidth > 300"
    assert image.evaluate(drawn)
    point = page.locator(".scatterlayer .points path").nth(1).bounding_box()
    assert point is not None
    page.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    page.wait_for_selector(".hoverlayer .hovertext")
    token = page.locator(".circuits-view").last.locator("span", has_text="likes").first
    token.hover()
    assert page.problems == []
