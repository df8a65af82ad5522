"""Biases that a model does not have are zeros that TransformerLens's tools may edit."""

import pytest
import torch

from tl_loops import LoopedTransformer, LoopedTransformerConfig

BIASES = ("attn.b_Q", "attn.b_V", "attn.b_O", "mlp.b_in", "mlp.b_out")
"""Without ``b_K``, which adds the same to every score of a query where nothing is rotated."""


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("name", BIASES)
def test_an_edited_bias_counts(name: str, gated: bool):
    cfg = LoopedTransformerConfig(
        n_core=2,
        n_iterations=2,
        d_model=16,
        d_head=8,
        n_heads=2,
        d_mlp=24,
        d_vocab=11,
        n_ctx=8,
        gated_mlp=gated,
        seed=0,
    )
    model = LoopedTransformer(cfg).eval()
    tokens = torch.arange(8)[None]
    module, leaf = name.split(".")
    bias = getattr(getattr(model.blocks[0], module), leaf)
    before = model(tokens)
    with torch.no_grad():
        bias += 1.0
    assert (model(tokens) - before).abs().max() > 1e-4
    with torch.no_grad():
        bias -= 1.0
    torch.testing.assert_close(model(tokens), before)


def test_an_edited_bias_of_the_logits_counts():
    cfg = LoopedTransformerConfig(
        n_core=1,
        n_iterations=2,
        d_model=16,
        d_head=8,
        n_heads=2,
        d_mlp=24,
        d_vocab=11,
        n_ctx=8,
        seed=0,
    )
    model = LoopedTransformer(cfg).eval()
    tokens = torch.arange(8)[None]
    before = model(tokens)
    model.unembed.b_U += 1.0
    torch.testing.assert_close(model(tokens), before + 1.0)
