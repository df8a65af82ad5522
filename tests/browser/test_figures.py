"""Figures and views in a real browser without a network: drawn, not blank, with hover."""

import re

import pytest
import torch
from playwright.sync_api import Locator, Page

from tl_loops import LoopedTransformer, lens, measure, plots, tasks

VIEWS = 4


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """Three interactive figures and four views on one page, each script once."""
    torch.set_num_threads(1)
    model = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny", device="cpu")
    prompts = [prompt.text for prompt in tasks.fact_chain_prompts(4, seed=1)]
    tokens = model.to_tokens(prompts[0])
    with model.iterations(3), torch.no_grad():
        profile = measure(model, prompts, "mixing_score", progress=False)
        _, cache = model.run_with_cache(tokens)
        read = lens.coda_lens(model, tokens, keep_logits=True)
        effect = torch.randn(3, 2, tokens.shape[1], generator=torch.Generator().manual_seed(0))
        figures = [
            profile.plot("mixing_score"),
            plots.plot_patching(
                effect, ("iteration", "layer", "pos"), model=model, tokens=tokens, animate=True
            ),
            plots.plot_floorplan(cache),
        ]
        views = [
            plots.attention_heads(cache, tokens, iterations=(0, 2), layers=0),
            plots.attention_patterns(cache, tokens, iterations=(0, 2)),
            plots.colored_tokens(tokens, torch.arange(tokens.shape[1]), "Position", model=model),
            plots.token_log_probs(read, tokens, model, iterations=(0, 2)),
        ]
    body = [
        figure.to_html(full_html=False, include_plotlyjs=number == 0, auto_play=False)
        for number, figure in enumerate(figures)
    ]
    # As a notebook is exported: the first view brings the script, the others wait for it.
    body += [view.to_html() if number == 0 else view.element() for number, view in enumerate(views)]
    assert len(views) == VIEWS
    path = tmp_path_factory.mktemp("figures") / "figures.html"
    path.write_text(f"<!doctype html><meta charset=utf-8>{''.join(body)}", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def page(offline_page, page_file):
    page = offline_page(page_file, viewport={"width": 1200, "height": 900})
    page.wait_for_selector(".js-plotly-plot .xtick")
    page.wait_for_selector(".circuits-view canvas")
    return page


def pixels(image: Locator) -> str:
    """What an image of a heatmap holds, as a data address."""
    return image.evaluate("e => e.href.baseVal")


def test_nothing_is_asked_of_the_network_and_nothing_fails(page: Page, page_file):
    asked = [url for url in page.requests if not url.startswith(("data:", "blob:"))]
    assert asked == [page_file.as_uri()]
    assert page.problems == []


def test_the_scripts_are_there_once(page_file):
    html = page_file.read_text("utf-8")
    assert html.count("var CircuitsVis") == 1
    assert len(re.findall(r"plotly\.js v\d", html)) == 1


def test_curves_are_drawn_in_their_colours(page: Page):
    figure = page.locator(".js-plotly-plot").nth(0)
    lines = figure.locator(".scatterlayer path.js-line").all()
    assert len(lines) == 3
    strokes = {line.evaluate("e => getComputedStyle(e).stroke") for line in lines}
    assert len(strokes) == 3 and "rgb(34, 122, 128)" in strokes
    assert all((line.bounding_box() or {"width": 0})["width"] > 100 for line in lines)
    for text in ("Mixing score by iteration", "prelude", "mixing score (nats)"):
        assert text in figure.inner_text() or figure.locator(f"text='{text}'").count()


def test_a_hover_tells_the_block_and_its_value(page: Page):
    figure = page.locator(".js-plotly-plot").nth(0)
    point = figure.locator(".trace.scatter").nth(1).locator("path.point").nth(1)
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2 - 3, box["y"] + box["height"] / 2)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector(".hoverlayer .hovertext")
    assert re.search(r"r\d\.0: \d.* \(4 prompts\)", page.locator(".hoverlayer").first.inner_html())


def test_heatmaps_are_not_blank(page: Page):
    for number in (1, 2):
        image = page.locator(".js-plotly-plot").nth(number).locator(".hm image").first
        box = image.bounding_box()
        assert box is not None and box["width"] > 200
        assert len(pixels(image)) > 300


def test_the_slider_moves_through_the_iterations(page: Page):
    figure = page.locator(".js-plotly-plot").nth(1)
    image = figure.locator(".hm image").first
    assert "iteration 0" in figure.locator(".slider-group").inner_html()
    before = pixels(image)
    rail = figure.locator(".slider-rail-touch-rect")
    rail.scroll_into_view_if_needed()
    box = rail.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2)
    page.wait_for_timeout(500)
    assert pixels(image) != before
    assert figure.locator("text=▶").count() == 1


def test_every_view_is_drawn_and_shown_whole(page: Page):
    views = page.locator(".circuits-view")
    assert views.count() == VIEWS
    for number in (0, 1):
        frames = views.nth(number).locator(".circuits-frame")
        assert frames.count() == 2
        for frame in frames.all():
            box = frame.bounding_box()
            assert box is not None and box["height"] >= 360 and box["width"] >= 360
            canvas = frame.locator("canvas").first
            ink = canvas.evaluate(
                "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
            )
            assert ink > 10  # more than one colour
    for number in (2, 3):
        assert "hops" in views.nth(number).inner_text()
        assert "run that cell" not in views.nth(number).inner_text()


def test_a_hover_lists_the_top_tokens(page: Page):
    view = page.locator(".circuits-view").nth(3)
    view.locator(".circuits-frame").first.locator("span span").nth(5).hover()
    page.wait_for_selector("text=Log Prob")
    assert "Rank" in page.locator("body").inner_text()


def test_text_from_prompts_runs_nothing(browser, tmp_path):
    evil = ["<svg/onload=alert(1)>", "<img/src=x/onerror=alert(2)>", "</script><b>"]
    attention = torch.eye(3)[None]
    figure = plots.plot_matrix(torch.eye(3), evil, evil, "<b onmouseover=alert(3)>")
    body = [
        plots.colored_tokens(evil, torch.zeros(3), evil[0]).to_html(),
        plots.attention_view(evil, attention, [evil[1]]).element(),
        figure.to_html(full_html=False, include_plotlyjs=True),
    ]
    out = tmp_path / "evil.html"
    out.write_text("<!doctype html><meta charset=utf-8>" + "".join(body), encoding="utf-8")
    page = browser.new_page()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(out.as_uri())
    page.wait_for_selector(".circuits-view canvas")
    page.wait_for_timeout(500)
    assert dialogs == []
    assert page.locator("[onload], [onerror], [onmouseover]").count() == 0
    assert "<svg/onload=alert(1)>" in page.locator(".circuits-view").first.inner_text().replace(
        "\u200b", ""
    )
    page.close()
