"""Nanbeige and IQuest-Coder Loop: checkpoints in the released format against their equations."""

import pytest
import torch
import torch.nn.functional as F

from tests.closeness import assert_close
from tests.equations import attend, causal, draw, llama_layer, llama_shapes, rms, write
from tests.models import tiny_config, tiny_tokens
from tl_loops import CheckpointError, ConfigError, HookNameError, LoopedSemanticsError
from tl_loops.families.iquest import IQUEST_LOOP
from tl_loops.families.nanbeige import NANBEIGE
from tl_loops.families.registry import recognise
from tl_loops.model.check import check_model
from tl_loops.model.looped import LoopedTransformer
from tl_loops.upstream import KeyValueCache

TOKENS = tiny_tokens(pos=11)
CLOSE = dict(rtol=1e-4, atol=1e-4)
COMMON = dict(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
NANBEIGE_CONFIG = dict(COMMON, model_type="nanbeige", num_loops=2, rope_theta=70_000_000.0)
IQUEST_CONFIG = dict(COMMON, model_type="iquestloopcoder", loop_num=2, loop_window_size=4)


def shapes(config):
    d, vocab = config["hidden_size"], config["vocab_size"]
    found = llama_shapes(config, config["num_hidden_layers"])
    found |= {"model.embed_tokens.weight": (vocab, d), "lm_head.weight": (vocab, d)}
    found["model.norm.weight"] = (d,)
    if config["model_type"] == "iquestloopcoder":
        heads, e = config["num_attention_heads"], config["head_dim"]
        for layer in range(config["num_hidden_layers"]):
            found[f"model.gate_projections.{layer}.weight"] = (heads, e)
            found[f"model.gate_projections.{layer}.bias"] = (heads,)
    return found


def nanbeige(config, weights, tokens, loops):
    x = weights["model.embed_tokens.weight"][tokens]
    for t in range(loops):
        for layer in range(config["num_hidden_layers"]):
            x = llama_layer(config, weights, f"model.layers.{layer}", x)
        if t == loops - 1 or not config.get("skip_loop_final_norm"):
            x = rms(x, weights["model.norm.weight"], config["rms_norm_eps"])
    return F.linear(x, weights["lm_head.weight"])


def iquest(config, weights, tokens, loops):
    n_pos, window = tokens.shape[1], config["loop_window_size"]
    near = causal(n_pos) & ~causal(n_pos).roll(window, 0).tril(-window)
    assert near[-1].sum() == window and near[0].sum() == 1
    first = {}

    def mixing(t, layer):
        gate = [weights[f"model.gate_projections.{layer}.{part}"] for part in ("weight", "bias")]

        def mix(q, k, v):
            if t == 0:
                first[layer] = k, v
                return attend(q, k, v, causal(n_pos))
            g = torch.sigmoid((q * gate[0]).sum(-1) + gate[1])[..., None]
            return g * attend(q, *first[layer], causal(n_pos)) + (1 - g) * attend(q, k, v, near)

        return mix

    x = weights["model.embed_tokens.weight"][tokens]
    for t in range(loops):
        for layer in range(config["num_hidden_layers"]):
            x = llama_layer(config, weights, f"model.layers.{layer}", x, mixing(t, layer))
    x = rms(x, weights["model.norm.weight"], config["rms_norm_eps"])
    return F.linear(x, weights["lm_head.weight"])


STATED = {"nanbeige": (NANBEIGE_CONFIG, nanbeige), "iquest": (IQUEST_CONFIG, iquest)}


def load(directory, config, **arguments):
    weights = draw(shapes(config))
    write(directory, config, weights)
    with pytest.warns(UserWarning, match="tokenizer"):
        model = LoopedTransformer.from_pretrained_no_processing(
            directory, device="cpu", **arguments
        )
    return model, weights


@pytest.fixture(params=STATED)
def loaded(request, tmp_path):
    config, stated = STATED[request.param]
    model, weights = load(tmp_path, config)
    return config, stated, model, weights


def test_logits_are_those_of_the_published_equations(loaded, tmp_path):
    config, stated, model, weights = loaded
    for loops in (2, 1, 4):
        expected = stated(config, weights, TOKENS, loops)
        assert_close(model(TOKENS, n_iterations=loops), expected, **CLOSE)
        cached, _ = model.run_with_cache(TOKENS, n_iterations=loops)
        assert_close(cached, expected, **CLOSE)
    with pytest.warns(UserWarning):
        folded = LoopedTransformer.from_pretrained(tmp_path, device="cpu")
    assert_close(folded(TOKENS), stated(config, weights, TOKENS, 2), **CLOSE)


def test_cached_decoding_and_padding_change_nothing(loaded):
    config, stated, model, weights = loaded
    expected = stated(config, weights, TOKENS, 2)
    past = KeyValueCache.init_cache(model.cfg, "cpu", 2)
    pieces = [TOKENS[:, :3], TOKENS[:, 3:5], *TOKENS[:, 5:].split(1, dim=1)]
    decoded = torch.cat([model(piece, past_kv_cache=past) for piece in pieces], dim=1)
    assert_close(decoded, expected, **CLOSE)
    padded = F.pad(TOKENS, (5, 0), value=7)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    assert_close(model(padded, attention_mask=mask)[:, 5:], expected, **CLOSE)
    cached, _ = model.run_with_cache(padded, attention_mask=mask)
    assert_close(cached[:, 5:], expected, **CLOSE)


def test_right_padding_changes_nothing_before_it(loaded):
    config, stated, model, weights = loaded
    padded = F.pad(TOKENS, (0, 6), value=7)
    mask = torch.ones_like(padded)
    mask[:, -6:] = 0
    logits = model(padded, attention_mask=mask)[:, : TOKENS.shape[1]]
    assert_close(logits, stated(config, weights, TOKENS, 2), **CLOSE)


def test_every_promise_is_kept(loaded):
    model = loaded[2]
    findings = list(check_model(model))
    assert not [finding for finding in findings if finding.status == "failed"], findings
    model.zero_grad()
    model(TOKENS, return_type="loss").backward()
    for name, parameter in model.physical_named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_describe_and_recognition():
    assert recognise(NANBEIGE_CONFIG, "config.json", list) is NANBEIGE
    assert recognise(IQUEST_CONFIG, "config.json", list) is IQUEST_LOOP
    text = tiny_config("ouro", first_pass_window=5).describe()
    assert "A(q, K_0, V_0)" in text and "last 5" in text


# Nanbeige.


def test_nanbeige_may_skip_the_norm_between_passes(tmp_path):
    config = dict(NANBEIGE_CONFIG, skip_loop_final_norm=True)
    model, weights = load(tmp_path, config)
    assert not model.cfg.norm_between_iterations
    assert_close(model(TOKENS), nanbeige(config, weights, TOKENS, 2), **CLOSE)


def test_nanbeiges_loss_weights_decide_over_the_number_of_loops():
    def loops(**changes):
        fields = NANBEIGE.config_fields({**NANBEIGE_CONFIG, **changes}, "config.json")
        return fields["n_iterations"]

    assert loops() == 2
    assert loops(loop_loss_weights=[0.1, 0.2]) == 3
    assert loops(loop_loss_weights=[]) == 2
    assert loops(num_loops=None) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_layernorm": True}, "'qk_layernorm' is True"),
        ({"enable_double_loop_split": True}, "'enable_double_loop_split' is True"),
        ({"loop_share_kv": True}, "'loop_share_kv' is True"),
        ({"enable_depth_attention": True}, "'enable_depth_attention' is True"),
        ({"enable_hyper_connection": True}, "'enable_hyper_connection' is True"),
        ({"enable_mhc": True}, "'enable_mhc' is True"),
        ({"emb_neighbor_num": 2}, "'emb_neighbor_num' is 2"),
        ({"insert_ngram_layer_idx": [1]}, r"'insert_ngram_layer_idx' is \[1\]"),
        ({"loop_middle_layers": 3}, "'loop_middle_layers' is 3"),
        ({"kv_channels": 64}, "'kv_channels' is 64, but 'head_dim' is 8"),
        ({"num_loops": 0}, "'num_loops' must be at least 1"),
        ({"loop_loss_weights": 3}, "'loop_loss_weights' must be a list"),
        ({"attention_bias": True}, "'attention_bias' is True"),
    ],
)
def test_nanbeiges_other_mathematics_is_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message):
        NANBEIGE.config_fields({**NANBEIGE_CONFIG, **changes}, "config.json")


# IQuest.


def test_the_first_pass_is_seen_and_edited_in_the_second(tmp_path):
    model, _ = load(tmp_path, IQUEST_CONFIG)
    layout = model.layout
    second = layout.index(iteration=1, layer=0)
    names = [f"blocks.{second}.attn.first_pass.{n}" for n in ("hook_gate", "hook_pattern")]
    logits, cache = model.run_with_cache(TOKENS)
    gate, everything = (cache[name] for name in names)
    assert gate.shape == (2, 11, 4) and bool(((gate > 0) & (gate < 1)).all())
    assert_close(everything.sum(-1), torch.ones(2, 4, 11))
    near = cache["pattern", second]
    assert_close(near.sum(-1), torch.ones(2, 4, 11))
    assert near[..., 10, :7].abs().max() == 0 and near[..., 10, 7:].min() > 0
    assert everything[..., 10, :].min() > 0
    z = gate[..., None] * torch.einsum("bhqk,bkhe->bqhe", everything, heads(cache["v", 0]))
    z = z + (1 - gate[..., None]) * torch.einsum("bhqk,bkhe->bqhe", near, heads(cache["v", second]))
    assert_close(cache["z", second], z)
    # With all gates closed the second pass reads its own window alone.
    closed = [(names[0], lambda g, hook: torch.zeros_like(g))]
    assert not torch.allclose(model.run_with_hooks(TOKENS, fwd_hooks=closed), logits, atol=1e-3)
    with pytest.raises(HookNameError, match="fires from iteration 1 on"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("iter.0.0.attn.first_pass.hook_gate", print)])
    with pytest.raises(LoopedSemanticsError, match="keys of iteration 0"):
        model(cache["state_in", 1], start_at_iteration=1)


def heads(v):
    return v.repeat_interleave(2, dim=2)


def test_decompositions_of_the_mixed_heads_are_exact(tmp_path):
    model, _ = load(tmp_path, IQUEST_CONFIG)
    _, cache = model.run_with_cache(TOKENS)
    assert_close(cache.decompose_resid().sum(0), cache["resid_post", -1], **CLOSE)
    stack = cache.stack_head_results(incl_remainder=True)
    assert_close(stack.sum(0), cache["resid_post", -1], **CLOSE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(first_pass_window=0), "first_pass_window must be at least 1"),
        (dict(first_pass_window=3, attention_dir="bidirectional"), "needs causal attention"),
    ],
)
def test_windows_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config("ouro", **changes)


def test_iquests_config_is_checked():
    for key in ("loop_num", "loop_window_size"):
        with pytest.raises(CheckpointError, match=f"'{key}' must be at least 1"):
            IQUEST_LOOP.config_fields({**IQUEST_CONFIG, key: 0}, "config.json")
