"""Which hook points of a bridge take edits: what is said of them is what a run does."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from tests.bridged.models import bridged, build_bridge
from tests.feedforward import only_from_4, plain_model
from tests.models import tiny_model
from tl_loops import LoopedSemanticsError, unroll
from tl_loops.patching import Site, ablate, activation_patch, transplant_hooks
from tl_loops.runs.activations import find_activation
from tl_loops.upstream import shown_too_late

TOKENS = torch.tensor([[3, 7, 1, 9]])
SCORES, PATTERN = "blocks.0.attn.hook_attn_scores", "blocks.0.attn.hook_pattern"


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 5].mean()


def from_hugging_face(model_class: Any, config: Any) -> Any:
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    return build_bridge(model_class(config).eval(), config)


def opt() -> Any:
    sizes = dict(hidden_size=16, ffn_dim=32, num_attention_heads=2, num_hidden_layers=2)
    config = OPTConfig(vocab_size=20, word_embed_proj_dim=16, max_position_embeddings=16, **sizes)
    return from_hugging_face(OPTForCausalLM, config)


def gpt2() -> Any:
    config = GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return from_hugging_face(GPT2LMHeadModel, config)


def llama() -> Any:
    sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    return from_hugging_face(LlamaForCausalLM, LlamaConfig(vocab_size=20, **sizes))


def native() -> Any:
    return plain_model(
        n_layers=2, d_model=16, n_ctx=16, d_head=8, n_heads=2, d_vocab=20, act_fn="gelu",
        d_mlp=32, normalization_type="LN", seed=0,
    )  # fmt: skip


@torch.no_grad()
def changes(model: Any, name: str) -> bool:
    """Whether an edit changes the logits, by trying it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edited = model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda x, hook: x * 0.5)])
    return not torch.equal(edited, model(TOKENS))


@pytest.mark.parametrize("make", [opt, gpt2, llama, pytest.param(native, marks=only_from_4)])
def test_what_is_said_to_come_too_late_changes_nothing(make):
    model = make()
    late = shown_too_late(model, [SCORES, PATTERN, "blocks.0.attn.hook_z"])
    for name in (SCORES, PATTERN):
        assert (name in late) != changes(model, name)
        if name in late:
            with pytest.raises(LoopedSemanticsError, match="only after its attention"):
                find_activation(model, name.split(".", 2)[2])
        else:
            assert find_activation(model, name.split(".", 2)[2]).kind == "pattern"
    assert "blocks.0.attn.hook_z" not in late and changes(model, "blocks.0.attn.hook_z")


@only_from_4
@torch.no_grad()
def test_tools_raise_where_scores_are_patterns():
    model, other = native(), native()
    cache = model.run_with_cache(TOKENS)[1]
    assert torch.equal(cache[SCORES], cache[PATTERN])
    tokens, site = TOKENS.flip(1), Site("attn_scores", block=0)
    given = (tokens, cache, metric)
    with pytest.raises(LoopedSemanticsError, match="'z' or 'pattern'"):
        activation_patch(model, *given, "attn_scores", progress=False)
    with pytest.raises(LoopedSemanticsError, match="instead of the scores"):
        ablate(model, tokens, metric, "attn_scores", progress=False)
    with pytest.raises(LoopedSemanticsError, match="instead of the scores"):
        transplant_hooks(other, cache, site)
    found = activation_patch(model, *given, "pattern", ("block",), progress=False)
    assert not torch.equal(found[0], found[1])


@only_from_4
@torch.no_grad()
def test_a_cache_of_patterns_gives_no_scores_to_another_model():
    cache = native().run_with_cache(TOKENS)[1]
    with pytest.raises(LoopedSemanticsError, match="instead of the scores"):
        transplant_hooks(tiny_model("ouro"), cache, Site("attn_scores", block=0))


@pytest.mark.parametrize("family", ["ouro", "huginn", "hrm_text"])
def test_unrolled_bridges_show_what_can_be_edited(family):
    bridge = bridged(family)
    unrolled = unroll(bridge)
    sources = [tap.source for tap in unrolled._taps if "attn.hook_" in tap.source]
    assert not shown_too_late(bridge, sources)
    names = [n for n in bridge.hook_dict if n.endswith(("hook_attn_scores", "hook_pattern"))]
    assert bool(shown_too_late(bridge, names)) == (family == "huginn")
    if family == "huginn":
        assert {SCORES, PATTERN} <= set(unrolled.missing)


def test_names_of_a_loop_leave_out_what_comes_too_late():
    """An Ouro whose attention leaves the work to the Hugging Face module."""
    from transformer_lens.model_bridge.generalized_components import AttentionBridge

    bridge = bridged("ouro")
    for block in bridge.blocks:
        own = type(block.attn)
        block.attn.__class__ = type("Leaving", (own,), {"forward": AttentionBridge.forward})
    unrolled = unroll(bridge)
    for name in (SCORES, PATTERN):
        assert "only after its attention" in unrolled.missing[name]
        assert name not in unrolled.hook_dict
    with pytest.raises(ValueError, match="has no activation 'attn_scores'"):
        find_activation(unrolled, "attn_scores")
    assert SCORES in unroll(bridged("ouro")).hook_dict
