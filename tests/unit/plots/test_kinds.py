"""Figures of states, patterns, neurons, patches, ranks and exits hold the numbers given."""

import numpy as np
import pytest
import torch

from tests.models import tiny_model, tiny_tokens
from tests.unit.plots.reading import BACKENDS, colours, curves, heights, matrices, words
from tl_loops import exit_curve, lens, metrics, plots
from tl_loops.drawing.colours import LAYERS
from tl_loops.layout.layout import LoopLayout
from tl_loops.metrics.neurons import NeuronClasses, NeuronStatistics, PredictionSuppression
from tl_loops.plots.trajectories import oscillations

NAN = float("nan")


@pytest.fixture(scope="module")
def model():
    return tiny_model("retrofitted")


@pytest.fixture(scope="module")
def cache(model):
    with torch.no_grad():
        return model.run_with_cache(tiny_tokens())[1]


# --- states --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_contraction_is_a_straight_line(backend):
    t = torch.arange(6.0).double()
    direction = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    states = 0.5 ** t[:, None, None, None] * direction + 3
    figure = plots.plot_fixed_points(states, model="mine", prompts=5, backend=backend)
    for layer in range(2):
        x, y = curves(figure)[f"layer {layer}"]
        np.testing.assert_allclose(x, range(1, 6))
        np.testing.assert_allclose(np.diff(np.log(y)), np.log(0.5), rtol=1e-5)
    assert "mine · 6 iterations · 5 prompts" in words(figure)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(6, 8), (6, 2, 8), (6, 2, 3, 8), (6, 2, 4, 3, 8)])
def test_states_of_any_shape_are_averaged_over_tokens(shape, backend):
    states = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    n_layers = 1 if len(shape) == 2 else 2
    by_layer = states.reshape(6, n_layers, -1, 8)
    steps = by_layer.diff(dim=0).norm(dim=-1).mean(-1)
    drawn = curves(plots.plot_fixed_points(states, backend=backend))
    for layer in range(n_layers):
        np.testing.assert_allclose(drawn[f"layer {layer}"][1], steps[:, layer], rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_that_say_nothing_are_told(backend):
    once = plots.plot_fixed_points(torch.ones(1, 2, 3, 8), backend=backend)
    assert "one iteration only" in words(once)
    undefined = plots.plot_fixed_points(torch.full((4, 2, 3, 8), NAN), backend=backend)
    assert "every value is undefined (NaN)" in words(undefined)
    empty = plots.plot_fixed_points(torch.ones(0, 2, 3, 8), backend=backend)
    assert "there are no values" in words(empty)
    with pytest.raises(ValueError, match=r"\[iteration, layer"):
        plots.plot_fixed_points(torch.ones(3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [2, 3])
def test_components_are_those_of_the_metric(cache, model, n, backend):
    figure = plots.plot_pca(cache, n, model=model, backend=backend)
    stack = torch.stack([cache["resid_post", i][0, -1] for i in range(model.cfg.n_layers)])
    expected = metrics.pca_trajectory(stack, n)
    x, y = curves(figure)["path"]
    np.testing.assert_allclose(x, expected.coordinates[:, 0], atol=1e-5)
    np.testing.assert_allclose(y, expected.coordinates[:, 1], atol=1e-5)
    assert f"{100 * expected.explained_variance_ratio[0]:.0f}% of variance" in words(figure)
    assert "random walk (null)" in words(figure) and "position 8 of 9" in words(figure)
    assert {"prelude", "coda", "iteration 0", "iteration 2"} <= set(curves(figure))


@pytest.mark.parametrize("backend", BACKENDS)
def test_paths_that_say_nothing_are_told(backend):
    assert "two states" in words(plots.plot_pca(torch.ones(1, 8), backend=backend))
    states = torch.randn(5, 8)
    states[2] = NAN
    assert "1 of 5 states are not finite" in words(plots.plot_pca(states, backend=backend))
    still = plots.plot_pca(torch.ones(4, 8), backend=backend)  # no variance at all
    assert "PC 1" in words(still)


def test_a_fitted_trajectory_is_drawn_as_it_is():
    fitted = metrics.pca_trajectory(torch.randn(5, 8), 3)
    figure = plots.plot_pca(fitted, 3, model="mine", backend="plotly")
    np.testing.assert_allclose(curves(figure)["path"][1], fitted.coordinates[:, 1])
    assert "null" not in words(figure) and "5 iterations" in words(figure)
    with pytest.raises(ValueError, match="n_components=3"):
        plots.plot_pca(metrics.pca_trajectory(torch.randn(5, 8), 2), 3)
    for bad in (torch.ones(2, 3, 4), "text"):
        with pytest.raises(ValueError, match=r"\[step, d_model\]"):
            plots.plot_pca(bad)
    with pytest.raises(ValueError, match="expected 2 or 3"):
        plots.plot_pca(torch.ones(4, 8), 4)


def test_a_position_that_does_not_exist_is_refused(cache):
    with pytest.raises(IndexError, match="the prompt has 9 tokens"):
        plots.plot_pca(cache, position=9)
    with pytest.raises(ValueError, match="the cache holds 2"):
        plots.plot_pca(cache, row=2)


def path(kind: str, n: int = 64) -> torch.Tensor:
    t = torch.arange(n).double()
    if kind == "orbit":
        return torch.stack([(2 * torch.pi * t / 8).cos(), (2 * torch.pi * t / 8).sin()], -1)
    return torch.stack([1 + 0.5**t, 0.5**t], -1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_class_has_its_clearest_token(backend):
    states = torch.stack([path("orbit"), path("fixed_point")], 1)
    found = metrics.classify_trajectory(states)
    assert found.labels.tolist() == ["orbit", "fixed_point"]
    figure = plots.plot_trajectories(found, model="mine", backend=backend)
    drawn = curves(figure)
    np.testing.assert_allclose(drawn["token 0"][1], found.similarity[:, 0])
    np.testing.assert_allclose(drawn["token 1"][1], found.similarity[:, 1])
    shares = "fixed point 50.0%, orbit 50.0%, slider 0.0%, unknown 0.0%"
    assert f"Of 2 tokens: {shares}." in words(figure)
    assert "mine · 64 iterations" in words(figure)
    same = plots.plot_trajectories(states, model="mine", backend=backend)
    np.testing.assert_allclose(curves(same)["token 0"][1], drawn["token 0"][1])


def test_a_spectrum_has_its_peak_at_the_frequency():
    t = np.arange(64)
    frequency, amplitude = oscillations(0.3 * np.cos(2 * np.pi * t / 8) + 0.5)
    assert frequency[amplitude.argmax()] == 1 / 8
    assert amplitude.max() == pytest.approx(0.3, abs=0.02)
    _, flat = oscillations(0.1 * t + 2)  # a trend is no oscillation
    assert flat.max() < 1e-12
    _, alternating = oscillations(np.where(t % 2, 1.0, -1.0))
    assert alternating[-1] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_trajectories_that_say_nothing_are_told(backend):
    assert "one iteration only" in words(
        plots.plot_trajectories(torch.ones(1, 3, 4), backend=backend)
    )
    assert "no token" in words(plots.plot_trajectories(torch.ones(5, 0, 4), backend=backend))
    undefined = plots.plot_trajectories(torch.full((5, 2, 4), NAN), backend=backend)
    assert "undefined (NaN)" in words(undefined)
    with pytest.raises(ValueError, match="examples=0"):
        plots.plot_trajectories(torch.ones(5, 2, 4), examples=0)


# --- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_of_a_cache_are_those_of_the_metrics(cache, model, backend):
    stack = torch.stack([cache["resid_post", i] for i in range(model.cfg.n_layers)])
    expected = metrics.pairwise_cosine(stack).mean(-1)
    figure = plots.plot_pairs(cache, "cosine", backend=backend)
    np.testing.assert_allclose(matrices(figure)[0], expected, atol=1e-6)
    patterns = torch.stack([cache["pattern", i] for i in range(model.cfg.n_layers)])
    expected = metrics.pairwise_pattern_distance(patterns).mean(-1)
    figure = plots.plot_pairs(cache, "attention", backend=backend)
    np.testing.assert_allclose(matrices(figure)[0], expected, atol=1e-6)
    assert "r1.0" in words(figure) and "Frobenius norm" in words(figure)
    assert "2 prompts" in words(figure) and "3 iterations" in words(figure)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_matrix_of_pairs_may_have_holes(backend):
    matrix = torch.eye(4)
    matrix[1, 2] = NAN
    figure = plots.plot_pairs(matrix, model="mine", backend=backend)
    np.testing.assert_array_equal(matrices(figure)[0], matrix)
    assert "1 value is undefined" in words(figure)
    assert "no values" in words(plots.plot_pairs(torch.zeros(0, 0), backend=backend))
    with pytest.raises(ValueError, match=r"\[block, block\]"):
        plots.plot_pairs(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="'cosine' or 'attention'"):
        plots.plot_pairs(matrix, "both")


def test_a_cache_that_lacks_an_activation_is_refused(model):
    _, little = model.run_with_cache(tiny_tokens(), names_filter="blocks.0.hook_resid_post")
    with pytest.raises(ValueError, match="must keep 'resid_post' of every block"):
        plots.plot_pairs(little, "cosine")


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_norms_set_the_first_token_apart(cache, model, backend):
    figure = plots.plot_residual_norms(cache, backend=backend)
    norms = torch.stack([cache["resid_post", i] for i in range(model.cfg.n_layers)]).norm(dim=-1)
    drawn = curves(figure)
    np.testing.assert_allclose(drawn["first token"][1], norms[..., 0].mean(-1), rtol=1e-5)
    np.testing.assert_allclose(
        drawn["mean of the others"][1], norms[..., 1:].mean((1, 2)), rtol=1e-5
    )
    largest = norms[..., 1:].amax(-1).mean(-1)
    np.testing.assert_allclose(drawn["largest of the others"][1], largest, rtol=1e-5)
    one = plots.plot_residual_norms(torch.ones(3, 1, 4), backend=backend)
    assert list(curves(one)) == ["first token"]
    assert "no values" in words(plots.plot_residual_norms(torch.ones(3, 0, 4), backend=backend))
    with pytest.raises(ValueError, match=r"\[block, ..., pos, d_model\]"):
        plots.plot_residual_norms(torch.ones(3, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_stages_lie_over_the_reference(backend):
    block = torch.tensor([[0.0, 1.0, 2.0, 1.0], [0.0, 1.1, 2.1, 1.0]])
    reference = torch.tensor([0.0, 0.0, 1.0, 2.0, 1.0, 0.0])
    figure = plots.plot_stages(block, reference, model="mine", prompts=3, backend=backend)
    drawn = curves(figure)
    np.testing.assert_allclose(drawn["reference"][0], np.linspace(0, 100, 6))
    np.testing.assert_allclose(drawn["iteration 1"][1], block[1])
    assert "best window: layers 1 to 4" in words(figure)
    holes = block.clone()
    holes[0, 1] = NAN  # no alignment then, but a figure that says so
    figure = plots.plot_stages(holes, reference, backend=backend)
    assert "1 value is undefined" in words(figure) and "best window" not in words(figure)
    alignment = metrics.align_stages(block, reference)
    with pytest.raises(ValueError, match="alignment has 2 curves, but there are 1"):
        plots.plot_stages(block[:1], reference, alignment=alignment)


def neurons(n_layers: int, prediction: float) -> PredictionSuppression:
    empty = torch.zeros(n_layers, 10)
    share = torch.full((n_layers,), prediction)
    count = (share * 10).long()
    return PredictionSuppression(
        NeuronStatistics(empty, empty, empty),
        NeuronClasses(empty.bool(), empty.bool(), empty.bool()),
        count, count + 1, count, share, share + 0.1, share, {},
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_neurons_by_physical_layer(model, backend):
    n = model.cfg.n_physical_layers
    figure = plots.plot_neurons(neurons(n, 0.2), model=model, backend=backend)
    drawn = curves(figure)
    np.testing.assert_allclose(drawn["prediction"][1], [0.2] * n)
    np.testing.assert_allclose(drawn["suppression"][1], [0.3] * n, rtol=1e-6)
    assert "core.1" in words(figure) and "weights only" in words(figure)
    compared = plots.plot_neurons(neurons(n, 0.2), neurons(9, 0.4), partition=True, backend=backend)
    drawn = curves(compared)
    np.testing.assert_allclose(drawn["suppression, reference"][0], np.linspace(0, 100, 9))
    np.testing.assert_allclose(drawn["partition"][0], np.linspace(0, 100, n))


# --- attention on one page -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_floorplan_holds_every_pattern(cache, model, backend):
    figure = plots.plot_floorplan(cache, backend=backend)
    (canvas,) = matrices(figure)
    pos, heads = 9, model.cfg.n_heads
    at = 0
    for block in range(model.cfg.n_layers):
        for head in range(heads):
            square = canvas[head * 10 : head * 10 + pos, at : at + pos]
            np.testing.assert_allclose(square, cache["pattern", block][0, head], atol=1e-6)
        ends = model.layout.coordinate(block).layer == model.layout.n_core - 1
        at += 10 + (
            4 if block == 0 or (model.layout.coordinate(block).phase == "core" and ends) else 0
        )
    text = words(figure)
    for word in ("prelude", "coda", "r2.1", "H3", "9 tokens"):
        assert word in text
    assert "undefined" not in text


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_floorplan_of_many_iterations_takes_several_lines(backend):
    layout = LoopLayout(1, 2, 1, 6)
    patterns = torch.rand(layout.n_layers, 2, 5, 5)
    model = tiny_model("retrofitted", n_iterations=6)
    figure = plots.plot_floorplan(
        patterns, model=model, heads="mean", iterations_per_row=4, backend=backend
    )
    first, second = matrices(figure)
    np.testing.assert_allclose(first[:5, :5], patterns[0].mean(0), rtol=1e-6)
    np.testing.assert_allclose(second[:5, :5], patterns[9].mean(0), rtol=1e-6)


def test_a_large_pattern_keeps_its_largest_weights():
    pattern = torch.zeros(1, 1, 200, 200)
    pattern[..., 0] = 1.0
    figure = plots.plot_floorplan(pattern, tile=20, backend="plotly")
    (canvas,) = matrices(figure)
    assert (canvas[:20, 0] == 1).all() and np.nanmax(canvas[:20, 1:]) == 0
    assert "the largest of several weights" in words(figure)


@pytest.mark.parametrize("backend", BACKENDS)
def test_patterns_that_say_nothing_are_told(backend):
    undefined = plots.plot_floorplan(torch.full((2, 2, 3, 3), NAN), backend=backend)
    assert "every attention weight is undefined" in words(undefined)
    assert "no pattern" in words(plots.plot_floorplan(torch.ones(0, 2, 3, 3), backend=backend))
    with pytest.raises(ValueError, match=r"\[block, head, dest, src\]"):
        plots.plot_floorplan(torch.ones(2, 3, 3))


# --- patching ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_patching_has_one_panel_an_iteration(model, backend):
    effect = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(0))
    axes = ("iteration", "layer", "pos")
    figure = plots.plot_patching(
        effect, axes, model=model, tokens=tiny_tokens()[:1], unit="logits", backend=backend
    )
    np.testing.assert_allclose(np.stack(matrices(figure)), effect, rtol=1e-6)
    assert "iteration 2" in words(figure) and "logits" in words(figure)
    by_layer = plots.plot_patching(effect, axes, facet="layer", backend=backend)
    np.testing.assert_allclose(np.stack(matrices(by_layer)), effect.transpose(0, 1), rtol=1e-6)


def test_effects_are_white_at_zero_and_blue_above():
    effect = torch.tensor([[-1.0, 0.0, 4.0]])
    scale = plots.plot_patching(effect, ("layer", "pos"), backend="plotly").layout.coloraxis
    assert (scale.cmin, scale.cmax) == (-4.0, 4.0)
    assert [c for _, c in scale.colorscale] == [
        "#b2182b",
        "#ef8a62",
        "#f7f7f7",
        "#67a9cf",
        "#2166ac",
    ]
    axes = plots.plot_patching(effect, ("layer", "pos"), backend="matplotlib").get_axes()[0]
    image = axes.get_images()[0]
    red, green, blue, _ = image.cmap(image.norm(0.0))
    assert (red, green, blue) == pytest.approx((247 / 255,) * 3, abs=0.01)
    red, _, blue, _ = image.cmap(image.norm(4.0))
    assert blue > red


@pytest.mark.parametrize(
    ("axes", "shape", "n_panels"),
    [
        (("pos",), (9,), 1),
        (("block", "pos"), (8, 9), 1),
        (("iteration", "head"), (3, 4), 1),
        (("iteration", "layer", "head"), (3, 2, 4), 3),
        (("iteration", "layer", "pos", "head"), (3, 2, 9, 4), 6),
        (("layer", "dest_pos", "src_pos"), (2, 9, 9), 2),
    ],
)
def test_any_axes_can_be_drawn(axes, shape, n_panels):
    effect = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    figure = plots.plot_patching(effect, axes, backend="plotly")
    drawn = matrices(figure)
    assert len(drawn) == n_panels
    assert sorted(np.concatenate([m.ravel() for m in drawn])) == pytest.approx(
        sorted(effect.double().flatten().tolist())
    )


def test_an_animation_shows_one_panel_at_a_time():
    effect = torch.randn(3, 2, 9)
    axes = ("iteration", "layer", "pos")
    figure = plots.plot_patching(effect, axes, animate=True, backend="plotly")
    assert len(figure.frames) == 3
    for t, frame in enumerate(figure.frames):
        np.testing.assert_allclose(frame.data[0].z, effect[t], rtol=1e-6)
    still = plots.plot_patching(effect, axes, animate=True, backend="matplotlib")
    assert len(matrices(still)) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_undefined_and_missing_effects_are_told(backend):
    effect = torch.full((2, 3), NAN)
    assert "undefined (NaN)" in words(
        plots.plot_patching(effect, ("layer", "pos"), backend=backend)
    )
    effect[0, 0] = 1.0
    assert "5 values are undefined" in words(
        plots.plot_patching(effect, ("layer", "pos"), backend=backend)
    )
    none = plots.plot_patching(torch.ones(0, 3), ("layer", "pos"), backend=backend)
    assert "no values" in words(none)


def test_axes_and_labels_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match="axes names 2"):
        plots.plot_patching(torch.ones(2, 3, 4), ("layer", "pos"))
    with pytest.raises(ValueError, match="expected different ones of"):
        plots.plot_patching(torch.ones(2, 3), ("layer", "layer"))
    with pytest.raises(ValueError, match=r"axis_labels\(model"):
        plots.plot_patching(torch.ones(2, 2, 9), ("iteration", "layer", "pos"), model=model,
                            tokens=tiny_tokens()[:1])  # fmt: skip
    with pytest.raises(ValueError, match="facet='pos'"):
        plots.plot_patching(torch.ones(2, 3), ("layer", "pos"), facet="pos")


# --- readouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_are_geometric_means_over_prompts(model, backend):
    result = lens.logit_lens(model, tiny_tokens(), positions="last", track={"a": 3, "b": 7})
    figure = plots.plot_ranks(result, model=model, backend=backend)
    drawn = curves(figure)
    for name in ("a", "b"):
        expected = result.tracked[name].rank[..., 0].double().log().mean(-1).exp()
        np.testing.assert_allclose(drawn[name][1], expected, rtol=1e-5)
    assert (
        "2 prompts" in words(figure) and "3 iterations" in words(figure) and "r0.0" in words(figure)
    )
    by_layer = plots.plot_ranks(result, by="layer", backend=backend)
    points = [i for i, p in enumerate(result.points) if (p.phase, p.layer) == ("core", 1)]
    expected = result.tracked["a"].rank[points, :, 0].double().log().mean(-1).exp()
    np.testing.assert_allclose(curves(by_layer)["layer 1"][1], expected, rtol=1e-5)
    assert {"layer 0", "layer 1"} == set(curves(by_layer))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_of_entities(model, backend):
    tracks = lens.track_entities(model, tiny_tokens(), {"a": 3, "b": 7})
    drawn = curves(plots.plot_ranks(tracks, backend=backend))
    np.testing.assert_allclose(drawn["b"][1], 10 ** tracks.mean_log_rank()[1], rtol=1e-5)
    with pytest.raises(ValueError, match="pass track="):
        plots.plot_ranks(lens.logit_lens(model, tiny_tokens()))
    with pytest.raises(ValueError, match="'depth' or 'layer'"):
        plots.plot_ranks(tracks, by="token")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_top_rank_is_on_top(model, backend):
    tracks = lens.track_entities(model, tiny_tokens(), {"a": 3})
    figure = plots.plot_ranks(tracks, backend=backend)
    if backend == "plotly":
        bottom, top = figure.layout.yaxis.range
        assert bottom > top and figure.layout.yaxis.type == "log"
    else:
        axes = figure.get_axes()[0]
        assert axes.yaxis.get_inverted() and axes.get_yscale() == "log"


@pytest.mark.parametrize("backend", BACKENDS)
def test_exit_probabilities_are_averaged_over_tokens(backend):
    gates = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0))
    probability = metrics.exit_distribution(gates)
    figure = plots.plot_exits(probability, model="mine", backend=backend)
    (drawn,) = heights(figure)
    np.testing.assert_allclose(drawn, probability.mean((1, 2)), rtol=1e-5)
    expected = metrics.expected_exit_iteration(gates).mean()
    assert f"Expected exit: iteration {expected:.2f}." in words(figure)
    with pytest.raises(ValueError, match="exit_distribution"):
        plots.plot_exits(gates)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exit_iterations_are_counted(backend):
    exits = {"kl": torch.tensor([0, 0, 2, 3]), "cosine": torch.tensor([3, 3])}
    figure = plots.plot_exits(exits, n_iterations=4, backend=backend)
    assert heights(figure) == [[0.5, 0.0, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0]]
    (one,) = heights(plots.plot_exits(exits["kl"], backend=backend))
    assert one == [0.5, 0.0, 0.25, 0.25]
    with pytest.raises(ValueError, match="there are 3 iterations"):
        plots.plot_exits(exits, n_iterations=3)
    nobody = plots.plot_exits(torch.zeros(0, dtype=torch.long), n_iterations=3, backend=backend)
    assert "there are no values" in words(nobody)
    undefined = plots.plot_exits(torch.full((3, 2), NAN), backend=backend)
    assert "undefined (NaN)" in words(undefined)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exit_curves_are_the_curves(model, backend):
    curve = exit_curve(model, list(tiny_tokens()), progress=False)
    figure = plots.plot_exit_curves(curve, model=model, std=True, backend=backend)
    drawn = curves(figure)
    np.testing.assert_allclose(drawn["Loss"][1], curve.loss)
    np.testing.assert_allclose(drawn["Flips: changed since the one before"][0], [1, 2])
    assert "2 prompts" in words(figure)
    once = exit_curve(model, list(tiny_tokens()), n_iterations=1, progress=False)
    assert "one iteration only" in words(plots.plot_exit_curves(once, backend=backend))


# --- anything ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_curves(model, backend):
    values = {"one": torch.rand(3), "two": torch.tensor([1.0, NAN, 3.0])}
    figure = plots.plot_curves(
        values, "mine", x=[0.0, 5.0, 10.0], colours="layers", backend=backend
    )
    x, y = curves(figure)["two"]
    np.testing.assert_array_equal(x, [0, 5, 10])
    np.testing.assert_array_equal(y, values["two"])
    assert colours(figure)["one"] == LAYERS[0]
    depth = {"a": torch.rand(model.cfg.n_layers)}
    figure = plots.plot_curves(depth, "mine", x="blocks", model=model, backend=backend)
    assert "prelude" in words(figure) and "r2.1" in words(figure)
    assert "no values" in words(plots.plot_curves({}, "mine", backend=backend))
    for bad in (dict(x=[1.0]), dict(x="blocks"), dict(colours="rainbow")):
        with pytest.raises(ValueError, match="expected"):
            plots.plot_curves(values, "mine", **bad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_matrix(backend):
    values = torch.tensor([[1.0, NAN], [-2.0, 3.0]])
    figure = plots.plot_matrix(
        values, ["r0", "r1"], ["c0", "c1"], "mine", unit="u", scale="diverging", backend=backend
    )
    np.testing.assert_array_equal(matrices(figure)[0], values)
    assert "c1" in words(figure)
    with pytest.raises(ValueError, match="2 rows and 1 columns"):
        plots.plot_matrix(values, ["r0", "r1"], ["c0"], "mine")


# --- a cache or a tensor -------------------------------------------------------------------------


def test_a_cache_and_its_tensors_give_the_same_curves(model, cache):
    about = {"model": model, "prompts": 2, "backend": "plotly"}
    layers = cache.stack_activation("resid_post", by_iteration=True)
    ends = cache.stack_activation("state_out")
    blocks = torch.stack([cache["resid_post", i] for i in range(model.cfg.n_layers)])
    patterns = torch.stack([cache["pattern", i][0] for i in range(model.cfg.n_layers)])
    cosines = metrics.pairwise_cosine(blocks).mean(-1)
    for function, values in (
        (plots.plot_fixed_points, layers),
        (plots.plot_trajectories, ends),
        (plots.plot_residual_norms, blocks),
        (plots.plot_pca, blocks[:, 0, -1]),
        (plots.plot_floorplan, patterns),
        (plots.plot_pairs, cosines),
    ):
        of_cache, of_tensor = function(cache, **about), function(values, **about)
        drawn, again = (curves(f) or dict(enumerate(matrices(f))) for f in (of_cache, of_tensor))
        assert drawn.keys() == again.keys() and drawn
        for name in drawn:
            np.testing.assert_allclose(drawn[name], again[name], rtol=1e-5, atol=1e-6)


def test_a_cache_that_has_no_iterations_or_lacks_them_is_told():
    model = tiny_model("retrofitted")
    _, cache = model.run_with_cache(tiny_tokens(), names_filter=lambda name: "pattern" in name)
    with pytest.raises(ValueError, match="must keep 'resid_post' of every iteration"):
        plots.plot_fixed_points(cache)
    with pytest.raises(ValueError, match="must keep 'state_out' of every iteration"):
        plots.plot_trajectories(cache)
