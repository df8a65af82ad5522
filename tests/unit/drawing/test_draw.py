"""Both libraries draw what the description says; nothing is shown, written or asked for."""

import socket
import sys

import numpy as np
import plotly.graph_objects as go
import pytest
from matplotlib.figure import Figure as MatplotlibFigure

from tests.unit.plots.reading import BACKENDS, curves, heights, matrices, words
from tl_loops.drawing.figure import (
    Axis,
    Bars,
    Box,
    ColourScale,
    Figure,
    Heat,
    Line,
    Panel,
    Rule,
    Span,
)
from tl_loops.plots import draw

X = np.arange(4.0)
Y = np.array([1.0, 3.0, np.nan, 2.0])


def every_mark() -> Figure:
    lines = Panel(
        (
            Span(-0.5, 0.5, "prelude", "#7b4ea3"),
            Rule(1.5, "rule"),
            Line(X, Y, "curve", "#00643c", spread=np.ones(4), hover=["p", "q", "r", "s"]),
            Line(X, Y + 1, "other", "#f0c808", symbol=None, dashed=True),
        ),
        Axis("iteration", whole=True),
        Axis("value (nats)", log=True),
        title="lines",
    )
    heat = Panel(
        (Heat(np.arange(6.0).reshape(2, 3)), Box((-0.5, 0.5), (-0.5, 0.5), "#c2542d", "box")),
        Axis("column", ticks=((0, "<a>"), (1, "$b$"), (2, "c"))),
        Axis("row"),
        title="heat",
    )
    bars = Panel((Bars(X, Y, "bars", "#1f6fb4"),), Axis("i"), Axis("n"), title="bars")
    space = Panel(
        (Line(X, Y, "path", "#00643c", z=X),), Axis("1"), Axis("2"), Axis("3"), title="space"
    )
    note = Panel((), Axis("x"), Axis("y"), title="note", note="Nothing, in words.")
    return Figure(
        "Title & <b>",
        "subtitle $5 $6",
        (lines, heat, bars, space, note),
        columns=2,
        colours=ColourScale("unit", limits=(0.0, 5.0)),
        legend="legend",
        footnotes=("A footnote.",),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mark_is_drawn_with_its_data(backend):
    figure = draw(every_mark(), backend)
    drawn = curves(figure)
    for name, values in (("curve", Y), ("other", Y + 1), ("path", Y)):
        np.testing.assert_array_equal(drawn[name][0], X)
        np.testing.assert_array_equal(drawn[name][1], values)
    np.testing.assert_array_equal(matrices(figure)[0], np.arange(6.0).reshape(2, 3))
    if backend == "matplotlib":
        (bars,) = (c for ax in figure.get_axes() for c in ax.containers)
        np.testing.assert_array_equal([bar.get_height() for bar in bars], Y)
    told = words(figure)
    for text in ("lines", "heat", "prelude", "rule", "box", "iteration", "value (nats)", "legend"):
        assert text in told
    for text in ("Nothing, in words.", "A footnote.", "4 values are undefined", "unit"):
        assert text in told


@pytest.mark.parametrize("backend", BACKENDS)
def test_text_stays_text(backend):
    figure = draw(every_mark(), backend)
    if backend == "plotly":
        assert "Title &amp; &lt;b&gt;" in figure.layout.title.text
        assert "&lt;a&gt;" in figure.to_json()
    else:
        figure.canvas.draw()  # a formula that is none would raise here
        assert "Title & <b>" in words(figure)


@pytest.mark.parametrize("backend", BACKENDS)
def test_curves_that_share_a_name_are_in_the_legend_once(backend):
    panel = Panel(
        (Line(X, Y, "same", "#000000"), Line(X, Y, "else", "#111111")), Axis("x"), Axis("y")
    )
    figure = draw(Figure("t", "s", (panel, panel), columns=2), backend)
    if backend == "plotly":
        assert [trace.name for trace in figure.data if trace.showlegend] == ["same", "else"]
    else:
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["same", "else"]


def test_a_lonely_point_is_seen():
    lonely = Line(X, np.array([1.0, np.nan, 2.0, np.nan]), "a", "#000000", symbol=None)
    figure = Figure("t", "s", (Panel((lonely,), Axis("x"), Axis("y")),))
    assert draw(figure, "plotly").data[0].mode == "lines+markers"
    axes = draw(figure, "matplotlib").get_axes()[0]
    assert [line.get_marker() for line in axes.get_lines()] == ["None", "o"]


def test_keyword_arguments_go_to_the_library():
    interactive = draw(every_mark(), "plotly", width=700, height=500, hovermode="x")
    assert (interactive.layout.width, interactive.layout.height) == (700, 500)
    assert interactive.layout.hovermode == "x"
    static = draw(every_mark(), "matplotlib", width=700, height=500, facecolor="#eeeeee")
    assert static.get_size_inches().tolist() == [7.0, 5.0]
    assert static.get_facecolor()[0] == pytest.approx(238 / 255)
    with pytest.raises(ValueError, match="nonsense"):
        draw(every_mark(), "plotly", nonsense=1)


def test_the_default_is_plotly_where_it_is_installed(monkeypatch):
    assert isinstance(draw(every_mark()), go.Figure)
    monkeypatch.setattr("tl_loops.drawing.draw.find_spec", lambda name: None)
    assert isinstance(draw(every_mark()), MatplotlibFigure)


def test_a_missing_library_is_named_with_its_cure(monkeypatch):
    for backend in BACKENDS:
        monkeypatch.setitem(sys.modules, f"tl_loops.drawing.{backend}_figure", None)
        with pytest.raises(ImportError, match=rf"{backend}.*pip install 'tl-loops\[plots\]'"):
            draw(every_mark(), backend)
    with pytest.raises(ValueError, match="'plotly', 'matplotlib' or None"):
        draw(every_mark(), "bokeh")


def test_nothing_is_shown_written_or_asked_for(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("a figure asked for the network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "socket", refuse)
    for backend in BACKENDS:
        draw(every_mark(), backend)
    assert list(tmp_path.iterdir()) == []
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )


def test_a_notebook_shows_a_static_figure_by_itself():
    assert draw(every_mark(), "matplotlib")._repr_png_().startswith(b"\x89PNG")


def test_panels_that_move_are_frames_of_one():
    panels = tuple(
        Panel((Heat(np.full((2, 2), float(t))),), Axis("x"), Axis("y"), title=f"iteration {t}")
        for t in range(3)
    )
    moving = Figure("t", "s", panels, colours=ColourScale("u"), slider="iteration")
    figure = draw(moving, "plotly")
    assert len(figure.data) == 1
    assert [frame.name for frame in figure.frames] == [f"iteration {t}" for t in range(3)]
    assert [float(frame.data[0].z[0][0]) for frame in figure.frames] == [0.0, 1.0, 2.0]
    assert [step.label for step in figure.layout.sliders[0].steps] == [p.title for p in panels]
    assert [float(m[0, 0]) for m in matrices(draw(moving, "matplotlib"))] == [0.0, 1.0, 2.0]


def test_a_shared_axis_is_written_once():
    panels = tuple(
        Panel((Heat(np.ones((2, 2))),), Axis("position"), Axis("y"), title=str(i)) for i in range(3)
    )
    shared = Figure("t", "s", panels, columns=2, colours=ColourScale("u"), shared_x=True)
    assert [shared.at_bottom(i) for i in range(3)] == [False, True, True]
    axes = draw(shared, "matplotlib").get_axes()[:3]
    assert [ax.get_xlabel() for ax in axes] == ["", "position", "position"]
    layout = draw(shared, "plotly").layout
    assert layout.xaxis.title.text == "" and layout.xaxis2.title.text == "position"


@pytest.mark.parametrize("backend", BACKENDS)
def test_bars_stand_beside_each_other(backend):
    bars = tuple(Bars(X, X + i, f"b{i}", "#1f6fb4") for i in range(2))
    figure = draw(Figure("t", "s", (Panel(bars, Axis("x"), Axis("y")),)), backend)
    assert heights(figure) == [X.tolist(), (X + 1).tolist()]
    if backend == "matplotlib":
        first, second = figure.get_axes()[0].containers
        assert first[0].get_x() + first[0].get_width() == pytest.approx(second[0].get_x())
    else:
        assert figure.layout.barmode == "group"


def test_labels_that_would_overlap_are_turned():
    def rotation(n: int, limits: tuple[float, float]) -> float:
        axis = Axis("x", ticks=tuple((i, f"label {i}") for i in range(n)), limits=limits)
        panel = Panel((Line(X, X, "a", "#000000"),), axis, Axis("y"))
        axes = draw(Figure("t", "s", (panel,)), "matplotlib").get_axes()[0]
        return axes.get_xticklabels()[0].get_rotation()

    assert rotation(4, (-0.5, 3.5)) == 0
    assert rotation(4, (-0.5, 60.0)) == 90  # few, but close together
    assert rotation(30, (-0.5, 29.5)) == 90
