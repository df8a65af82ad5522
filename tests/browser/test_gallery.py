"""Every figure and the report at three widths, light and dark: nothing is cut, covered or blank."""

from pathlib import Path

import pytest
import torch
from plotly.graph_objects import Figure

from tests.browser.gallery import NO_FIGURES, Data, figures
from tl_loops import LoopedTransformer, plots
from tl_loops.report import ReportPrompts, default_prompts, write_report

WIDTHS = (390, 768, 1440)
SCHEMES = ("light", "dark")
PROBLEMS = (Path(__file__).parent / "problems.js").read_text("utf-8")
STYLE = """<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>
<style>:root { color-scheme: light dark; } body { margin: 12px; }
@media (prefers-color-scheme: dark) { body { background: #111; color: #eee; } }
.cell { margin: 8px 0; }</style>"""


@pytest.fixture(scope="module")
def data():
    torch.set_num_threads(1)
    return Data()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    torch.set_num_threads(1)
    model = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny", device="cpu")
    out = tmp_path_factory.mktemp("report") / "report.html"
    prompts = default_prompts(model)
    few = ReportPrompts(prompts.shown, prompts.shown, prompts.what)
    return write_report(model, out, few, progress=False)


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


def problems(page, selector: str) -> list[str]:
    drawn = "[...document.querySelectorAll('.circuits-frame')].every(f => f.querySelector('{}'))"
    page.wait_for_function(drawn.format("canvas, span"))
    page.wait_for_timeout(300)  # canvases take the size of their frame
    assert page.problems == []
    return page.evaluate(f"({PROBLEMS})({selector!r})")


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


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_can_be_read(offline_page, report, width, scheme):
    page = offline_page(report, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.wait_for_selector("html[data-drawn]")
    assert problems(page, "figure") == []
    page.context.close()
