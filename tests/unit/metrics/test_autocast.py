"""Statistics are float32 also under autocast."""

import inspect

import pytest
import torch

from tests.models import tiny_model, tiny_tokens
from tl_loops import metrics
from tl_loops.metrics.precision import without_autocast

STATES = torch.randn(6, 4, 7, 12, generator=torch.Generator().manual_seed(0))
PATTERN = STATES[0, :, :, :7].tril().exp().tril()
PATTERN = (PATTERN / PATTERN.sum(-1, keepdim=True)).tril()
W = torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(1))
CALLS = {
    "residual_entropy": lambda: metrics.residual_entropy(STATES[0]),
    "effective_rank": lambda: metrics.effective_rank(STATES[0]),
    "pairwise_cosine": lambda: metrics.pairwise_cosine(STATES),
    "pca_trajectory": lambda: metrics.pca_trajectory(STATES).coordinates,
    "kmeans": lambda: metrics.kmeans(STATES.flatten(0, -2), 5).inertia,
    "step_attention": lambda: metrics.step_attention(PATTERN, torch.arange(7) // 2),
    "attention_lipschitz_bound": lambda: metrics.attention_lipschitz_bound(
        STATES[0], STATES[1], W, W
    ),
    "step_decodability": lambda: torch.as_tensor(
        metrics.step_decodability(STATES, n_steps=5).accuracy
    ),
    "neurons": lambda: metrics.neuron_vocabulary_statistics(STATES[0, 0], W[0]).kurtosis,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_metric_is_the_same_under_autocast(name):
    expected = CALLS[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = CALLS[name]()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_every_public_metric_leaves_autocast():
    for name in metrics.__all__:
        function = getattr(metrics, name)
        if inspect.isfunction(function):
            assert "full_precision" in inspect.getsource(inspect.unwrap(function)), name


@pytest.mark.parametrize("name", ["huginn", "ouro"])
def test_decompositions_are_the_same_under_autocast(name):
    model = tiny_model(name)
    _, cache = model.run_with_cache(tiny_tokens())
    methods = ("decompose_resid", "stack_head_results", "get_full_resid_decomposition")

    def results():
        stacks = [getattr(cache, method)() for method in methods]
        projected = cache.stack_neuron_results(project_output_onto=model.W_U[:, :3])
        return [*stacks, projected, cache.get_neuron_results(1)]

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = results()
        with without_autocast():
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
    for ours, wanted in zip(actual, expected, strict=True):
        assert torch.equal(ours, wanted)
