"""The picture of a lens holds the numbers and words of its result, in either library."""

import numpy as np
import pytest
import torch

from tests.models import tiny_model, tiny_tokens
from tests.unit.plots.reading import BACKENDS, matrices, words
from tl_loops import lens, plots

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return tiny_model("huginn", initializer_range=0.15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", ["probability", "entropy", "kl_to_final"])
def test_cells_are_the_numbers_of_the_result(model, value, backend):
    result = lens.coda_lens(model, tiny_tokens())
    figure = plots.plot_lens(result, value, row=1, model=model, backend=backend)
    (found,) = matrices(figure)
    expected = result.top_probabilities[..., 0] if value == "probability" else None
    expected = getattr(result, value) if expected is None else expected
    np.testing.assert_allclose(found, expected[:, 1], rtol=1e-5, atol=1e-6)
    shown = words(figure)
    for label in ("r0", "r1", "r2", str(int(result.predictions[2, 1, 4]))):
        assert label in shown


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_are_panels_and_padding_is_blank(model, backend):
    mask = torch.ones(2, 9)
    mask[0, :3] = 0
    result = lens.logit_lens(model, tiny_tokens(), points="core", attention_mask=mask)
    figure = plots.plot_lens(result, facet="layer", backend=backend)
    found = matrices(figure)
    grid = result.by_iteration(result.top_probabilities[..., 0])[:, :, 0]
    assert len(found) == 2
    for layer, matrix in enumerate(found):
        assert np.isnan(matrix[:, :3]).all()
        np.testing.assert_allclose(matrix[:, 3:], grid[:, layer, 3:], rtol=1e-5, atol=1e-6)
    assert "layer 1" in words(figure)


def test_the_hover_lists_the_best_five(model):
    result = lens.coda_lens(model, tiny_tokens(), top_k=7)
    (trace,) = plots.plot_lens(result, backend="plotly").data
    told = trace.hovertext[1][4]
    for k in range(5):
        chance = float(result.top_probabilities[1, 0, 4, k])
        assert f"{int(result.top_tokens[1, 0, 4, k])}" in told and f"{chance:.3f}" in told
    assert told.count(" · ") == 4 and "entropy" in told
    assert f">{int(result.predictions[1, 0, 4])}</span>" in trace.text[1][4]


def test_refusals(model):
    result = lens.coda_lens(model, tiny_tokens())
    with pytest.raises(ValueError, match="value must be one of"):
        plots.plot_lens(result, "rank")
    with pytest.raises(ValueError, match="facet must be"):
        plots.plot_lens(result, facet="head")
    with pytest.raises(IndexError, match="prompt 2"):
        plots.plot_lens(result, row=2)
