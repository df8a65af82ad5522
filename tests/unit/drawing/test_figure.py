"""The description of a figure: what is said where numbers are missing, and what is thinned."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import tiny_model
from tl_loops.drawing.colours import (
    ITERATIONS,
    LAYERS,
    colour_at,
    is_dark,
    iteration_colours,
    layer_colours,
)
from tl_loops.drawing.depth import block_groups, block_ticks, phase_spans
from tl_loops.drawing.explained import explained
from tl_loops.drawing.figure import (
    Axis,
    ColourScale,
    Figure,
    Heat,
    Line,
    Panel,
    every_few,
)
from tl_loops.drawing.subject import shown_text, subject_of
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.segments import Segment
from tl_loops.tasks.fact_chain import sample_pair

NAN = float("nan")


def figure(*panels: Panel) -> Figure:
    return Figure("title", "subtitle", panels)


def line(values, log=False, **changes) -> Panel:
    y = np.array(values, dtype=float)
    mark = Line(np.arange(len(y), dtype=float), y, "a", "#000000", **changes)
    return Panel((mark,), Axis("x"), Axis("y", log=log))


def test_a_whole_figure_is_left_as_it_is():
    given = figure(line([1, 2]))
    assert explained(given).footnotes == () and explained(given).panels == given.panels


@pytest.mark.parametrize(
    ("panel", "note"),
    [
        (line([]), "there are no values"),
        (line([NAN, NAN]), "every value is undefined"),
        (line([0, 0], log=True), "every value is 0, which a logarithmic axis cannot show"),
        (Panel((), Axis("x"), Axis("y")), "there are no values"),
        (Panel((Heat(np.full((2, 2), NAN)),), Axis("x"), Axis("y")), "undefined"),
    ],
)
def test_nothing_to_draw_is_said_in_words(panel, note):
    (told,) = explained(figure(panel)).panels
    assert note in told.note and told.marks == ()


def test_some_missing_values_are_counted():
    told = explained(figure(line([1, NAN, NAN]), line([0, 1, NAN], log=True)))
    assert all(panel.marks for panel in told.panels)
    assert told.footnotes == (
        "3 values are undefined (NaN) and left out.",
        "1 value is 0 or less, which a logarithmic axis cannot show.",
    )


def test_blank_places_are_not_undefined():
    heat = Heat(np.array([[1.0, NAN]]), blank=True)
    assert explained(figure(Panel((heat,), Axis("x"), Axis("y")))).footnotes == ()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 300), st.integers(20, 900))
def test_thinned_ticks_are_apart_and_even(n, pixels):
    axis = Axis("x", ticks=tuple((i, str(i)) for i in range(n)))
    places = [place for place, _ in axis.shown_ticks(pixels)]
    assert places[0] == 0 and len(places) <= pixels / 14 + 1
    assert len({b - a for a, b in pairwise(places)}) <= 1
    if n * 14 <= pixels:
        assert len(places) == n


def test_uneven_ticks_do_not_overlap():
    axis = Axis("x", ticks=((0, "p0"), (1, "r0"), (100, "r1"), (199, "r2"), (200, "c0")))
    assert [text for _, text in axis.shown_ticks(400)] == ["p0", "r1", "r2"]


def test_a_legend_names_few_of_many_and_the_last():
    named = [i for i in range(128) if every_few(128)(i)]
    assert named[0] == 0 and named[-1] == 127 and len(named) <= 11
    assert all(every_few(8)(i) for i in range(8))


def test_colours_run_from_one_end_of_the_convention_to_the_other():
    for colours, ends in ((iteration_colours, ITERATIONS), (layer_colours, LAYERS)):
        assert colours(5)[0] == ends[0] and colours(5)[-1] == ends[-1]
        assert len(set(colours(9))) == 9
        assert len(colours(1)) == 1 and colours(0) == []
    assert colour_at(("#000000", "#ffffff"), 0.5) == "#808080"
    assert is_dark("#101010") and not is_dark("#fde725")


def test_a_diverging_scale_is_symmetric_and_never_empty():
    values = np.array([-3.0, NAN, 1.0])
    assert ColourScale.of(values, "u", "diverging").limits == (-3.0, 3.0)
    assert ColourScale.of(values, "u").limits == (-3.0, 1.0)
    for empty in (np.array([]), np.array([NAN])):
        assert ColourScale.of(empty, "u").limits == (0.0, 1.0)
    assert ColourScale.of(np.array([2.0]), "u").limits == (2.0, 3.0)
    assert ColourScale.of(np.zeros(3), "u", "diverging").limits == (-1.0, 1.0)


def test_prelude_and_coda_are_where_the_layout_says():
    layout = LoopLayout(2, 3, 1, 4)
    prelude, coda = phase_spans(layout)
    assert (prelude.start, prelude.stop) == (-0.5, 1.5)
    assert (coda.start, coda.stop) == (13.5, 14.5)
    assert phase_spans(LoopLayout(0, 3, 0, 4)) == () == phase_spans(None)
    assert [text for _, text in block_ticks(layout, range(15))] == layout.labels()
    assert [name for name, _, _ in block_groups(LoopLayout(0, 3, 1, 2))] == [
        "iteration 0", "iteration 1", "coda"
    ]  # fmt: skip
    unequal = LoopLayout.of_segments((Segment(1, 3, 2), Segment(3, 4)), 1)
    assert [blocks for _, _, blocks in block_groups(unequal)] == [[0], [1, 2], [3, 4], [5], [6]]
    long = LoopLayout(2, 4, 2, 128)
    ticks = block_ticks(long, range(long.n_layers))
    assert len(ticks) < 40 and ticks[0] == (0, "p0") and ticks[1] == (2, "r0.0")


def test_the_line_under_a_title_says_what_is_known():
    assert subject_of().line(complete=False) == ""
    unknown = "model not named · number of iterations not named · prompts not named"
    assert subject_of().line(complete=True) == unknown
    named = subject_of(model="mine", prompts=3, n_iterations=1)
    assert named.line(complete=True) == "mine · 1 iteration · 3 prompts"
    model = tiny_model("retrofitted")
    line = subject_of(model=model, prompts="a\nb").line(complete=True)
    assert model.cfg.model_name == "custom"  # what TransformerLens calls one without a name
    assert line == "model not named (1, 2⊗3, 1)_I · 3 iterations · “a↵b”"


def test_prompts_are_told_by_text_or_number():
    def told(prompts):
        return subject_of(prompts=prompts).prompts

    assert told(torch.zeros(4, 3, dtype=torch.long)) == "4 prompts"
    assert told(["one"]) == "“one”" and told(["one", "two"]) == "2 prompts"
    assert told([sample_pair()[0]]).startswith("“")
    assert len(told("word " * 100)) < 100 and "… " in told("word " * 100)
    with pytest.raises(TypeError, match="number, text or tokens"):
        told(1.5)
    assert shown_text("a\tb") == "a⇥b"


def test_a_cache_tells_model_iterations_and_prompts():
    model = tiny_model("retrofitted")
    with model.iterations(2):
        _, cache = model.run_with_cache(torch.zeros(3, 4, dtype=torch.long))
    subject = subject_of(cache)
    assert subject.n_iterations == 2 and subject.prompts == "3 prompts"
    # The model has been set back to three iterations since; the cache is of two.
    assert subject_of(cache, model=model).n_iterations == 2
