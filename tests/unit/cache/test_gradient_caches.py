"""A cache of gradients is no cache of activations: it is not decomposed as one."""

import pytest
import torch

from tests.models import any_model, tiny_tokens
from tl_loops import LoopedSemanticsError
from tl_loops.upstream import ActivationCache

TOKENS = tiny_tokens()


def gradients(model):
    """As the attribution patching demo of TransformerLens makes it."""
    model.reset_hooks()
    _, cache = model.run_with_cache(TOKENS)
    names = list(cache)
    found = {}

    def keep(gradient, hook):
        found[hook.name] = gradient.detach()

    model.add_hook(lambda name: name in names, keep, "bwd")
    model(TOKENS)[:, -1, 3].sum().backward()
    model.reset_hooks()
    return ActivationCache(found, model)


@pytest.mark.parametrize("name", ["retrofitted", "ouro", "huginn", "layer_norm", "plain"])
def test_decompositions_of_gradients_are_refused(name):
    model = any_model(name)
    cache = gradients(model)
    for call in (
        cache.decompose_resid,
        cache.stack_head_results,
        cache.stack_neuron_results,
        cache.get_full_resid_decomposition,
        lambda: cache.accumulated_resid(apply_ln=True),
    ):
        with pytest.raises(LoopedSemanticsError, match="looks like a cache of gradients"):
            call()


@pytest.mark.parametrize("name", ["retrofitted", "ouro", "huginn", "plain"])
def test_rows_of_the_stream_are_the_gradients_there(name):
    model = any_model(name)
    cache = gradients(model)
    rows, labels = cache.accumulated_resid(return_labels=True)
    assert len(rows) == len(labels) == model.cfg.n_layers + 1
    for index in range(model.cfg.n_layers):
        assert torch.equal(rows[index], cache[f"blocks.{index}.hook_resid_pre"])
