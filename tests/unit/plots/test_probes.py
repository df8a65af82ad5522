"""Figures of probes and directions hold their numbers."""

import numpy as np
import pytest
import torch

from tests.unit.plots.reading import BACKENDS, matrices, words
from tl_loops import plots
from tl_loops.probes import PromptStates, concept_directions, pair_probes, task_probes

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def states():
    values = torch.randn(3, 2, 60, 6, generator=torch.Generator().manual_seed(0))
    values[1:, :, ::2, 0] += 4.0
    return PromptStates.of(values, "resid_post")


@pytest.fixture(scope="module")
def found(states):
    return task_probes(states, [0, 1] * 30)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["accuracy", "selectivity", "control"])
def test_probes_over_iterations_and_layers(found, what, backend):
    figure = plots.plot_probes(found, what, model="mine", backend=backend)
    (matrix,) = matrices(figure)
    np.testing.assert_allclose(matrix, getattr(found, what).T)
    text = words(figure)
    assert "mine · 3 iterations" in text and "18 prompts" in text and "resid_post" in text
    assert f"{float(getattr(found, what)[2, 1]):.2f}" in text  # written in the cell


@pytest.mark.parametrize("backend", BACKENDS)
def test_transfer_has_a_panel_per_layer(found, backend):
    figure = plots.plot_probes(found, "transfer", prompts="mine", backend=backend)
    for layer, matrix in enumerate(matrices(figure)):
        np.testing.assert_allclose(matrix, found.transfer[..., layer])
    assert "tested at iteration" in words(figure) and "layer 1" in words(figure)


@pytest.mark.parametrize("backend", BACKENDS)
def test_directions(states, backend):
    halves = states.rows(range(0, 60, 2)), states.rows(range(1, 60, 2))
    directions = concept_directions(*halves, n_shuffles=3)
    (auc,) = matrices(plots.plot_probes(directions, backend=backend))
    np.testing.assert_allclose(auc, directions.auc.T)
    for layer, matrix in enumerate(
        matrices(plots.plot_probes(directions, "cosine", backend=backend))
    ):
        np.testing.assert_allclose(matrix, directions.cosine[layer])
    (norm,) = matrices(plots.plot_probes(directions, "norm", backend=backend))
    np.testing.assert_allclose(norm, directions.norm.T)
    pairs = pair_probes(*halves, n_shuffles=2)
    (accuracy,) = matrices(plots.plot_probes(pairs, backend=backend))
    np.testing.assert_allclose(accuracy, pairs.accuracy.T)
    with pytest.raises(ValueError, match="what must be one of auc, cosine, norm, got 'transfer'"):
        plots.plot_probes(directions, "transfer")


def test_the_hover_says_the_interval(found):
    (trace,) = plots.plot_probes(found, backend="plotly").data
    low, high = found.interval()[2, 1].tolist()
    assert f"r2.1 | accuracy 95% interval {low:.3f} to {high:.3f}" in str(trace.to_plotly_json())
    many = task_probes(PromptStates.of(torch.randn(20, 1, 12, 2)), [0, 1] * 6, n_shuffles=1)
    assert plots.plot_probes(many, backend="plotly").data[0].text is None
