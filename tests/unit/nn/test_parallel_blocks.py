"""Blocks whose attention and MLP read the same stream."""

import pytest
import torch
from torch.testing import assert_close

from tests.models import tiny_config, tiny_model, tiny_tokens
from tl_loops import ConfigError, LoopedSemanticsError, LoopedTransformer, lens, patching

TOKENS = tiny_tokens()


@pytest.fixture(scope="module")
def model():
    return tiny_model("parallel", n_iterations=3)


def test_both_branches_read_the_stream_that_enters_the_block(model):
    _, cache = model.run_with_cache(TOKENS)
    for i, block in enumerate(model.blocks):
        entering = cache["resid_pre", i]
        assert_close(block.mlp(block.ln2(entering)), cache["mlp_out", i])
        after = entering + cache["attn_out", i] + cache["mlp_out", i]
        assert_close(after, cache["resid_post", i])


def test_there_is_no_stream_between_the_branches(model):
    _, cache = model.run_with_cache(TOKENS)
    assert not any("resid_mid" in name for name in model.hook_dict)
    with pytest.raises(KeyError, match="did you mean resid_pre, resid_post"):
        cache["resid_mid", 0]
    with pytest.raises(LoopedSemanticsError, match="attention and MLP side by side"):
        cache.accumulated_resid(incl_mid=True)


@pytest.mark.parametrize("fold", [False, True])
def test_components_sum_to_the_stream(fold):
    model = tiny_model("parallel")
    if fold:
        model.process_weights_(center_writing_weights=False, center_unembed=False, fold_ln=False)
    _, cache = model.run_with_cache(TOKENS)
    for layer in (1, 2, 5, model.cfg.n_layers):
        rows = cache.decompose_resid(layer)
        stream = cache["resid_post", layer - 1]
        assert_close(rows.sum(0), stream, rtol=0, atol=1e-5 * float(stream.abs().max()))
    whole = cache.get_full_resid_decomposition(expand_neurons=False)
    assert_close(whole.sum(0), stream, rtol=0, atol=1e-5 * float(stream.abs().max()))


def test_value_biases_stay_where_attention_has_no_output_bias():
    model = tiny_model("parallel")
    before, biases = model(TOKENS), model.b_V.clone()
    with pytest.warns(UserWarning, match="attention has no b_O to take them"):
        model.process_weights_(fold_ln=False, center_writing_weights=False, center_unembed=False)
    assert torch.equal(model(TOKENS), before) and torch.equal(model.b_V, biases)


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = LoopedTransformer.from_pretrained_no_processing(tmp_path)
    assert torch.equal(again(TOKENS), model(TOKENS))


def test_a_patched_cell_is_a_run_with_that_edit(model):
    other = TOKENS.flip(1)
    _, clean = model.run_with_cache(TOKENS[:1])
    metric = lambda logits: logits[0, -1, 7]  # noqa: E731
    grid = patching.activation_patch(
        model, other[:1], clean, metric, activation="mlp_out", axes=("block",), progress=False
    )
    for i in (0, 3, 5):
        name = f"blocks.{i}.hook_mlp_out"
        put = lambda x, hook: clean[hook.name]  # noqa: E731
        one = model.run_with_hooks(other[:1], fwd_hooks=[(name, put)])
        assert_close(grid[i], metric(one))


def test_the_last_reading_of_a_lens_is_the_output(model):
    result = lens.logit_lens(model, TOKENS, keep_logits=True)
    assert_close(result.logits[-1], model(TOKENS), rtol=1e-4, atol=1e-5)


def test_described(model):
    assert "x += attn(ln1(x)) + mlp(ln2(x))" in model.cfg.describe()


def test_other_norm_placements_raise():
    with pytest.raises(ConfigError, match="needs block_norm='pre', got 'sandwich'"):
        tiny_config("parallel", block_norm="sandwich", normalization_type="RMS")
