"""Every figure at three widths, light and dark: nothing is cut, covered or blank."""

import pytest
import torch
from plotly.graph_objects import Figure

from tests.browser.gallery import NO_FIGURES, Data, figures
from tests.browser.looks import SCHEMES, WIDTHS, problems
from tl_loops import plots

STYLE = """<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>
<style>:root { color-scheme: light dark; } body { margin: 12px; }
@media (prefers-color-scheme: dark) { body { background: #111; color: #eee; } }
.cell { margin: 8px 0; }</style>"""


@pytest.fixture(scope="module")
def data():
    torch.set_num_threads(1)
    return Data()


@pytest.fixture(scope="module", params=WIDTHS)
def drawn(request, data):
    """All figures for one width, by name and number; a narrow page is told to them."""
    width = request.param
    options = {"width": width - 24} if width < 700 else {}
    return width, {
        f"{name}-{number}": call()
        for name, calls in figures(data, **options).items()
        for number, call in enumerate(calls)
    }


def page_of(drawn, dark: bool) -> str:
    cells, plotly, views = [], True, True
    for name, figure in drawn.items():
        if isinstance(figure, Figure):
            if dark:
                figure = Figure(figure).update_layout(template="plotly_dark")
            html = figure.to_html(full_html=False, include_plotlyjs=plotly, auto_play=False)
            plotly = False
        else:
            html = figure.to_html() if views else figure.element()
            views = False
        cells.append(f'<div class="cell" id="{name}">{html}</div>')
    return STYLE + "".join(cells)


def test_every_kind_of_figure_is_in_the_gallery(data):
    assert set(figures(data)) == set(plots.__all__) - NO_FIGURES


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_figure_can_be_read(offline_page, drawn, scheme, tmp_path):
    width, made = drawn
    path = tmp_path / "gallery.html"
    path.write_text(page_of(made, scheme == "dark"), encoding="utf-8")
    page = offline_page(path, viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert problems(page, ".cell") == []
    page.context.close()
