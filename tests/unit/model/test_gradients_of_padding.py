"""Gradients at padding are zeros, and those of real tokens are those without padding."""

import pytest
import torch

from tl_loops import LoopedTransformer, LoopedTransformerConfig

SIZES = dict(d_model=16, d_head=8, n_heads=2, d_mlp=32, d_vocab=20, n_ctx=12, seed=0)
MODELS = {
    "injection and coda": dict(n_prelude=1, n_core=2, n_coda=1, n_iterations=2, injection="concat"),
    "window of the first pass": dict(n_core=2, n_iterations=2, first_pass_window=2),
}
SHORT = torch.tensor([[3, 9, 4, 7]])
PADDED = torch.tensor([[5, 6, 7, 8, 9, 3, 4], [0, 0, 0, 3, 9, 4, 7]])
MASK = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])


@pytest.fixture(params=MODELS)
def model(request):
    cfg = LoopedTransformerConfig(initializer_range=0.3, **MODELS[request.param], **SIZES)
    return LoopedTransformer(cfg)


def gradients(model, tokens, row, names, mask=None):
    """By hook name, of one logit at the last token of a row."""
    found = {}
    keep = [(lambda name: name.endswith(names), lambda x, hook: found.update({hook.name: x}))]
    with model.hooks(bwd_hooks=keep):
        model(tokens, attention_mask=mask)[row, -1, 5].backward()
    weights = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return found, weights


@pytest.mark.parametrize("names", [("hook_attn_scores", "hook_pattern", "hook_q"), ("hook_q",)])
def test_left_padding_leaves_gradients_as_they_are(model, names):
    padded, weights = gradients(model, PADDED, 1, names, MASK)
    alone, own_weights = gradients(model, SHORT, 0, names)
    assert padded.keys() == alone.keys()
    assert len(padded) >= len(model.blocks)
    for name, gradient in padded.items():
        mine = gradient[1]
        real = mine[..., 3:, 3:] if gradient.shape[-1] == 7 else mine[3:]
        torch.testing.assert_close(real, alone[name][0], rtol=1e-4, atol=1e-6, msg=name)
        assert bool(gradient.isfinite().all()), name
        if not name.endswith("pattern"):  # What a weight on padding would do is a number, too.
            assert float(mine.norm()) == pytest.approx(float(real.norm()), rel=1e-4), name
    for ours, right in zip(weights, own_weights, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-6)


def test_the_cache_with_gradients_holds_no_nan(model):
    _, cache = model.run_with_cache(PADDED, attention_mask=MASK, incl_bwd=True, return_type="loss")
    gradients = [name for name in cache.keys() if name.endswith("_grad")]
    assert any("attn_scores" in name for name in gradients)
    assert not any(bool(cache[name].isnan().any()) for name in gradients)
