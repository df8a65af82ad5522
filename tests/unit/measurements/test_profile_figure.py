"""Profiles as figures: the numbers of the three groupings, in the paper's colours."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.plots.reading import BACKENDS, colours, curves, words
from tl_loops.drawing.colours import CODA, ITERATIONS, LAYERS, PRELUDE
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.segments import Segment
from tl_loops.measurements.profile import LoopProfile, Provenance
from tl_loops.plots import plot_fixed_points, plot_profile, plot_residual_norms
from tl_loops.runs.moments import Moments

LAYOUT = LoopLayout(n_prelude=2, n_core=3, n_coda=1, n_iterations=4)
NAN = float("nan")


def profile(
    layout: LoopLayout | None = LAYOUT, n_prompts: int = 5, metric: str = "sink_rate", **fill: Any
) -> LoopProfile:
    """Random values of one metric, and a successive difference."""
    depth = 6 if layout is None else layout.n_layers
    values = torch.rand(depth, n_prompts, generator=torch.Generator().manual_seed(0)).double()
    for block in fill.get("undefined", ()):
        values[block] = NAN
    moments = {metric: Moments.of(values)}
    if layout is not None:
        later = range(layout.index(iteration=0, layer=-1) + 1, layout.coda_start)
        moments["successive_difference"] = Moments.of(values[later] + 1).scattered(later, depth)
    what = Provenance(
        model="mine",
        weights="w",
        notation=None if layout is None else layout.notation(injected=True),
        n_iterations=None if layout is None else layout.n_iterations,
        n_prompts=n_prompts,
        n_tokens=9,
        tl_loops="0",
        options={},
    )
    return LoopProfile(moments, layout, what)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_iteration_has_the_numbers_and_the_colours(backend):
    p = profile()
    figure = plot_profile(p, "sink_rate", by="iteration", backend=backend)
    drawn, rows = curves(figure), p.by_iteration("sink_rate", outer=True)
    for t in range(4):
        x, y = drawn[f"iteration {t}"]
        np.testing.assert_allclose(x, p.pass_depth)
        np.testing.assert_allclose(y, rows[t])
    shades = colours(figure)
    assert shades["iteration 0"] == ITERATIONS[0] and shades["iteration 3"] == ITERATIONS[-1]
    told = words(figure)
    for text in ("Sink rate by iteration", "mine (2, 3⊗4, 1)_I · 4 iterations · 5 prompts"):
        assert text in told
    for text in ("relative depth in one pass (%)", "sink rate (fraction of heads)", "prelude"):
        assert text in told


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_layer_has_the_numbers_and_the_colours(backend):
    p = profile()
    figure = plot_profile(p, "sink_rate", by="layer", backend=backend)
    drawn, rows = curves(figure), p.by_layer("sink_rate")
    for layer in range(3):
        x, y = drawn[f"layer {layer}"]
        np.testing.assert_allclose(x, range(4))
        np.testing.assert_allclose(y, rows[layer])
    shades = colours(figure)
    assert shades["layer 0"] == LAYERS[0] and shades["layer 2"] == LAYERS[-1]
    assert (shades["prelude"], shades["coda"]) == (PRELUDE, CODA)
    np.testing.assert_allclose(drawn["prelude"][1], p.mean("sink_rate")[:2])
    assert (drawn["prelude"][0] == -1).all() and (drawn["coda"][0] == 4).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_unrolled_has_the_numbers_of_every_block(backend):
    p = profile()
    figure = plot_profile(p, "sink_rate", by="unrolled", std=True, backend=backend)
    x, y = curves(figure)["mean"]
    np.testing.assert_allclose(x, range(LAYOUT.n_layers))
    np.testing.assert_allclose(y, p.mean("sink_rate"))
    told = words(figure)
    assert "r0.0" in told and "c0" in told and "one standard deviation" in told


def test_a_band_is_one_deviation_to_both_sides():
    p = profile()
    figure = plot_profile(p, "sink_rate", by="unrolled", std=True, backend="plotly")
    (band,) = (trace for trace in figure.data if trace.fill == "toself")
    n = LAYOUT.n_layers
    upper, lower = np.asarray(band.y[:n]), np.asarray(band.y[n:])[::-1]
    np.testing.assert_allclose(upper - lower, 2 * p.std("sink_rate"))
    np.testing.assert_allclose((upper + lower) / 2, p.mean("sink_rate"))


def test_the_hover_tells_block_mean_deviation_and_number():
    p = profile()
    figure = plot_profile(p, "sink_rate", backend="plotly")
    trace = next(trace for trace in figure.data if trace.name == "iteration 1")
    block = LAYOUT.index(iteration=1, layer=0)
    mean, std = float(p.mean("sink_rate")[block]), float(p.std("sink_rate")[block])
    assert trace.text[2] == f"r1.0: {mean:.4g} ± {std:.2g} (5 prompts)"


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_without_a_value_at_first_start_later(backend):
    p = profile()
    x, y = curves(plot_profile(p, "successive_difference", by="layer", backend=backend))["layer 1"]
    np.testing.assert_allclose(x, [1, 2, 3])
    np.testing.assert_allclose(y, p.by_layer("successive_difference")[1][1:])
    figure = plot_profile(p, "successive_difference", by="layer", backend=backend)
    assert "undefined" not in words(figure)
    scale = (
        figure.layout.yaxis.type
        if backend == "plotly"
        else figure.get_axes()[0].get_yscale()
    )  # fmt: skip
    assert scale == "log"
    assert "prelude" not in curves(figure)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by", ["iteration", "layer", "unrolled"])
def test_undefined_values_one_iteration_and_no_prompt_are_said(backend, by):
    some = plot_profile(profile(undefined=(3,)), "sink_rate", by=by, backend=backend)
    assert "undefined (NaN) and left out" in words(some)
    every = profile(undefined=range(LAYOUT.n_layers))
    told = words(plot_profile(every, "sink_rate", by=by, backend=backend))
    assert "sink_rate is undefined (NaN)" in told
    nobody = plot_profile(profile(n_prompts=0), "sink_rate", by=by, backend=backend)
    assert "no prompt has a value of sink_rate" in words(nobody)
    once = profile(LoopLayout(0, 2, 0, 1))
    figure = plot_profile(once, "sink_rate", by=by, backend=backend)
    assert "1 iteration · 5 prompts" in words(figure)
    values = np.concatenate([y for _, y in curves(figure).values()])
    assert set(once.mean("sink_rate").tolist()) <= set(values.tolist())
    figure = plot_profile(once, "successive_difference", by=by, backend=backend)
    assert "no prompt has a value" in words(figure)


def test_a_feedforward_profile_is_unrolled():
    p = profile(layout=None)
    figure = plot_profile(p, by="iteration", backend="plotly")
    np.testing.assert_allclose(curves(figure)["mean over prompts"][1], p.mean("sink_rate"))
    assert "mine · feedforward · 5 prompts" in words(figure)


def test_iterations_of_unequal_length_are_drawn_unrolled():
    p = profile(LoopLayout.of_segments((Segment(1, 3, 2), Segment(3, 4)), 1))
    figure = plot_profile(p, "sink_rate", by="unrolled", backend="plotly")
    np.testing.assert_allclose(curves(figure)["mean"][1], p.mean("sink_rate"))
    with pytest.raises(LoopedSemanticsError, match="go by unrolled block"):
        plot_profile(p, "sink_rate", by="iteration")


def test_a_title_replaces_the_heading_only():
    told = plot_profile(profile(), title="Mine", backend="plotly").layout.title.text
    assert told.startswith("<b>Mine</b>") and "4 iterations" in told


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'iteration', 'layer' or 'unrolled'"):
        plot_profile(profile(), by="depth")
    with pytest.raises(ValueError, match="no metric 'sink_rat'"):
        plot_profile(profile(), "sink_rat")


@pytest.mark.parametrize("backend", BACKENDS)
def test_fixed_points_of_a_profile_are_its_layers(backend):
    p = profile()
    drawn = curves(plot_fixed_points(p, backend=backend))
    np.testing.assert_allclose(drawn["layer 2"][1], p.by_layer("successive_difference")[2][1:])
    with pytest.raises(ValueError, match=r"measure\(model, prompts, metrics="):
        plot_fixed_points(profile(layout=None))
    with pytest.raises(ValueError, match="no metric"):
        plot_fixed_points(p, ["nothing"])
    once = plot_fixed_points(profile(LoopLayout(0, 2, 0, 1)), backend=backend)
    assert "one iteration only" in words(once)


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_norms_of_a_profile_are_its_means(backend):
    p = profile(metric="residual_norm")
    _, y = curves(plot_residual_norms(p, backend=backend))["mean"]
    np.testing.assert_allclose(y, p.mean("residual_norm"))
    with pytest.raises(ValueError, match="no metric 'residual_norm'"):
        plot_residual_norms(profile())
