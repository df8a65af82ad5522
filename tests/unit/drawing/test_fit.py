"""What fits a width: panels in a row, lines of words, labels beside each other."""

import numpy as np
import pytest

from tl_loops.drawing.figure import Axis, Box, ColourScale, Figure, Heat, Line, Panel, Rule, Span
from tl_loops.drawing.fit import BAR_LENGTH, COLOUR_BAR, arranged, fit, text_width, wrapped
from tl_loops.drawing.page_figure import WIDTHS, render
from tl_loops.plots import draw

X = np.arange(8.0)


def curves(n_panels: int, n_curves: int = 2, **more) -> Figure:
    lines = tuple(Line(X, X + i, f"curve {i}", "#000000") for i in range(n_curves))
    panels = tuple(Panel(lines, Axis("x"), Axis("y"), title=str(i)) for i in range(n_panels))
    return Figure("title", "subtitle", panels, panel_size=(300, 200), **more)


def test_a_narrow_figure_has_fewer_panels_in_a_row_and_its_legend_below():
    figure = curves(4, columns=3)
    wide, middle, narrow = (fit(figure, width) for width in (1200, 640, 320))
    assert (wide.columns, middle.columns, narrow.columns) == (3, 1, 1)
    assert (wide.legend, middle.legend, narrow.legend) == ("beside", "beside", "below")
    assert narrow.under > 0 == wide.under
    for sizes in (wide, middle, narrow):
        across = sizes.columns * sizes.panel + (sizes.columns - 1) * sizes.gap
        assert sizes.left + across + sizes.right <= sizes.width


def test_words_wrap_at_a_width():
    text = "some words that are longer than what there is room for"
    for pixels in (120, 200, 500):
        lines = wrapped(text, pixels)
        assert " ".join(lines) == text
        assert max(text_width(line) for line in lines) <= pixels


def test_labels_are_thinned_or_turned_where_they_would_meet():
    numbers = Axis("t", ticks=tuple((t, str(t)) for t in range(64)), limits=(-0.5, 63.5))
    ticks, turned = arranged(numbers, 400)
    assert not turned and 10 < len(ticks) < 30
    words = Axis("t", ticks=tuple((t, f"likes_{t}") for t in range(46)), limits=(-0.5, 45.5))
    assert arranged(words, 5000) == (words.ticks, False)
    ticks, turned = arranged(words, 400)
    assert turned and 20 <= len(ticks) <= 30


def test_both_libraries_take_a_width():
    figure = curves(3, columns=3)
    narrow = draw(figure, "plotly", width=340)
    assert len({axis.domain for axis in narrow.select_xaxes()}) == 1
    assert narrow.layout.legend.orientation == "h"
    still = draw(figure, "matplotlib", width=340)
    assert len({round(ax.get_position().x0, 3) for ax in still.get_axes()}) == 1


def test_a_dark_figure_is_dark_in_both_libraries():
    heat = Figure("t", "s", (Panel((Heat(np.eye(2)),), Axis("x"), Axis("y")),),
                  colours=ColourScale("u", "weights"))  # fmt: skip
    light, dark = (draw(heat, "plotly", dark=d) for d in (False, True))
    assert light.layout.coloraxis.colorscale != dark.layout.coloraxis.colorscale
    assert dark.layout.template.layout.paper_bgcolor == "rgb(17,17,17)"
    assert sum(draw(heat, "matplotlib", dark=True).get_facecolor()[:3]) < 0.3
    assert sum(draw(heat, "matplotlib").get_facecolor()[:3]) == 3


def test_a_page_holds_numbers_once_and_a_layout_per_width():
    drawn = render(curves(3, columns=3))
    assert drawn.content is not None
    assert list(drawn.content["layouts"]) == [str(width) for width in WIDTHS]
    assert len(drawn.content["data"]) == 6
    narrowest, *wider = drawn.content["layouts"].values()
    assert all(set(layout) < {*narrowest, "legend"} for layout in wider)
    assert drawn.heights[WIDTHS[0]] > drawn.heights[WIDTHS[-1]]
    assert drawn.element().count("application/json") == 1


def test_ranges_rules_and_boxes_stand_at_every_width():
    line = Line(X, X, "a", "#000000")
    marks = (line, Span(0, 1, "prelude", "#112233"), Rule(2.5, "end"),
             Box((1, 2), (1, 2), "#112233", label="coda"))  # fmt: skip
    drawn = render(Figure("title", "", (Panel(marks, Axis("x"), Axis("y")),)))
    narrowest, *wider = drawn.content["layouts"].values()
    assert len(narrowest["shapes"]) == 3
    for layout in wider:  # which hold what differs from the narrowest
        assert layout.get("shapes", narrowest["shapes"]) == narrowest["shapes"]
        texts = [a["text"] for a in layout.get("annotations", narrowest["annotations"])]
        assert texts == [a["text"] for a in narrowest["annotations"]] == ["prelude", "end", "coda"]


def test_what_colours_are_stands_beside_their_bar_or_above_it_in_whole_words():
    unit = "probability of the top token (0 to 1)"
    heat = Figure("t", "s", (Panel((Heat(np.eye(2)),), Axis("x"), Axis("y")),),
                  colours=ColourScale(unit, "weights"))  # fmt: skip
    for width in (310, 400, 470, 900):
        sizes = fit(heat, width)
        assert " ".join(sizes.unit) == unit and len(sizes.unit) <= 2
        room = width - sizes.left - (0 if sizes.unit_above else BAR_LENGTH + 16)
        assert max(text_width(line) for line in sizes.unit) <= room
        assert sizes.under == COLOUR_BAR + 16 * len(sizes.unit) * sizes.unit_above
    assert fit(heat, 310).unit_above and not fit(heat, 900).unit_above


@pytest.mark.parametrize("n_shown", [0, 1])
def test_panels_that_show_nothing_are_words_on_a_page(n_shown):
    empty = Panel((), Axis("x"), Axis("y"), title="empty", note="Nothing to draw: <none>.")
    figure = curves(n_shown)
    drawn = render(Figure("title", "s", (*figure.panels, empty), columns=2))
    assert (drawn.content is None) == (n_shown == 0)
    assert "Nothing to draw: &lt;none&gt;." in drawn.element()
    assert ('class="plotly"' in drawn.element()) == (n_shown > 0)
