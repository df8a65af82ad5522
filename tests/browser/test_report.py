"""The report in a real browser without a network: every figure is there and holds something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Page

from tests.browser.looks import SCHEMES, WIDTHS, problems
from tl_loops import LoopedTransformer
from tl_loops.report import MOST_BYTES, write_report

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of the command, as users run it; tests/unit/report has its parts with their types checked."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    command = [sys.executable, "-m", "tl_loops", "report", "--n-iterations", "4", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def page(offline_page, report):
    return opened(offline_page, report)


def opened(offline_page, report, **options):
    page = offline_page(report, **options)
    page.wait_for_selector("html[data-drawn]")
    page.wait_for_selector(".attention-view canvas, .attention-view table, .attention-view img")
    return page


def test_it_is_one_small_file_that_asks_for_nothing(page: Page, report):
    assert page.requests == [report.as_uri()]
    assert page.problems == []
    assert report.stat().st_size <= MOST_BYTES


def test_every_figure_is_drawn(page: Page):
    figures = page.locator("figure")
    titles = figures.locator("figcaption").all_inner_texts()
    assert len(titles) == len(set(titles)) >= 21
    for figure in figures.all():
        box = figure.bounding_box()
        assert box is not None
        assert box["width"] > 150
        assert box["height"] > 60
    plotted = page.locator("figure.plot").all()
    assert len(plotted) == int(page.locator("html").get_attribute("data-drawn") or 0) >= 17
    for figure in plotted:
        assert figure.locator("svg .xtick").count() > 1
        marks = ".scatterlayer .trace path, .barlayer .point path, .heatmaplayer image"
        assert figure.locator(marks).count() > 0, figure.inner_text()
    for view in page.locator(".attention-view").all():
        assert "r" in view.inner_text()
        assert view.locator("canvas, svg, img, table").count() > 0


def test_sections_and_contents_agree(page: Page):
    links = [link.get_attribute("href") for link in page.locator("nav a").all()]
    assert links == [f"#{s.get_attribute('id')}" for s in page.locator("main section").all()]
    assert len(links) == 14
    findings = page.locator("#summary li").all()
    assert len(findings) >= 4
    for finding in findings:
        assert finding.locator("a").get_attribute("href") in links


def test_a_point_tells_its_number_on_hover(page: Page):
    figure = page.locator("#readout figure.plot")
    figure.scroll_into_view_if_needed()
    box = figure.locator(".scatterlayer .points path").nth(2).bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#readout .hoverlayer .hovertext")
    assert "exit after iteration: 2" in (figure.locator(".hoverlayer").text_content() or "")


def test_a_cell_of_the_patching_grid_tells_its_place(page: Page):
    figure = page.locator("#patching figure.plot")
    figure.scroll_into_view_if_needed()
    box = figure.locator(".heatmaplayer image").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 5)
    page.wait_for_selector("#patching .hoverlayer .hovertext")
    assert "r0" in (figure.locator(".hoverlayer").text_content() or "")


def test_it_fits_a_phone_and_follows_the_dark_scheme(offline_page, report):
    page = opened(offline_page, report, viewport={"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 391
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    text = "getComputedStyle(document.querySelector('.plotly .xtick text')).fill"
    before = page.evaluate(text)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(colour) != light
    page.wait_for_function(f"{text} !== '{before}'")
    page.emulate_media(color_scheme="dark", media="print")  # paper is white
    page.wait_for_function(f"{text} === 'rgb(27, 31, 36)'")


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_covered_or_blank(offline_page, report, width):
    page = opened(offline_page, report, viewport={"width": width, "height": 900})
    texts = "[...document.querySelectorAll('.plotly .xtick text')]"
    colours = f"{texts}.map(text => getComputedStyle(text).fill)"
    for scheme in SCHEMES:
        before = page.evaluate(colours)
        page.emulate_media(color_scheme=scheme)
        if scheme == "dark":
            page.wait_for_function(
                f"before => {colours}.every((c, i) => c !== before[i])", arg=before
            )
        assert problems(page, "figure") == []
    page.context.close()


def test_text_from_prompts_is_escaped(browser, report, tmp_path):
    model = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny", device="cpu")
    evil = "<img src=x onerror=alert(1)> </script> Ann likes Bob . 1 hops from Ann :"
    out = write_report(model, tmp_path / "evil.html", [evil], n_iterations=2, progress=False)
    page = browser.new_page()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(out.as_uri())
    assert dialogs == []
    assert page.locator("img[onerror]").count() == 0
    assert "<img src=x" in page.locator("#answers").inner_text()
    page.close()
