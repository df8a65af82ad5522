"""LoopUS: a checkpoint in the released format against the published equations (2605.11011)."""

import pytest
import torch
import torch.nn.functional as F

from tests.closeness import assert_close
from tests.equations import draw, llama_layer, llama_shapes, rms, write
from tests.models import tiny_config, tiny_tokens
from tl_loops import CheckpointError, ConfigError, LoopedSemanticsError, lens
from tl_loops.families.loopus import LOOPUS
from tl_loops.model.check import check_model
from tl_loops.model.looped import LoopedTransformer
from tl_loops.upstream import KeyValueCache

TOKENS = tiny_tokens(pos=11)
CLOSE = dict(rtol=1e-4, atol=1e-4)
BASE = dict(
    model_type="qwen3",
    vocab_size=50,
    hidden_size=40,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
CONFIG = dict(
    model_type="lds",
    base_config_dict=BASE,
    encoder_layer_indices=[0],
    reasoning_layer_indices=[1, 2],
    decoder_layer_indices=[3, 4],
    N=3,
    hidden_size=40,
    q_threshold=0.9,
    halting_strategy="threshold",
)
PARTS = {"encoder": 1, "reasoning": 2, "decoder": 2}


def shapes(base=BASE):
    d, vocab, e = base["hidden_size"], base["vocab_size"], base["head_dim"]
    rank = -(-d // 16)
    found = {
        "encoder.embed_tokens.weight": (vocab, d),
        "reasoning.gate.A_log": (d,),
        "reasoning.gate.dt_input_proj.weight": (rank, d),
        "reasoning.gate.delta_proj.weight": (d, rank),
        "reasoning.gate.delta_proj.bias": (d,),
        "q_head.0.weight": (d,),
        "q_head.0.bias": (d,),
        "q_head.1.weight": (1, d),
        "q_head.1.bias": (1,),
        "decoder.norm.weight": (d,),
        "decoder.lm_head.weight": (vocab, d),
    }
    for part, n_layers in PARTS.items():
        found |= llama_shapes(base, n_layers, f"{part}.layers.")
        for layer in range(n_layers if base["model_type"] == "qwen3" else 0):
            for norm in ("q_norm", "k_norm"):
                found[f"{part}.layers.{layer}.self_attn.{norm}.weight"] = (e,)
    return found


def stated(weights, tokens, n_iterations, base=BASE):
    """Logits, and the head's logits after each iteration, by the published equations."""

    def layers(part, x):
        for layer in range(PARTS[part]):
            x = llama_layer(base, weights, f"{part}.layers.{layer}", x)
        return x

    gate = {k.removeprefix("reasoning.gate."): w for k, w in weights.items() if ".gate." in k}
    x = layers("encoder", weights["encoder.embed_tokens.weight"][tokens])
    halts = []
    for _ in range(n_iterations):
        new = layers("reasoning", x)
        low = F.linear(new - x, gate["dt_input_proj.weight"])
        delta = F.softplus(F.linear(low, gate["delta_proj.weight"], gate["delta_proj.bias"]))
        keep = torch.exp(delta * -torch.exp(gate["A_log"]))
        x = keep * new + (1 - keep) * x
        # The released forward pass reads the head on what the gate lets through.
        norm = F.layer_norm(x, x.shape[-1:], weights["q_head.0.weight"], weights["q_head.0.bias"])
        halts.append(F.linear(norm, weights["q_head.1.weight"], weights["q_head.1.bias"]))
    x = rms(layers("decoder", x), weights["decoder.norm.weight"], base["rms_norm_eps"])
    return F.linear(x, weights["decoder.lm_head.weight"]), halts


def load(directory, config=CONFIG):
    weights = draw(shapes(config["base_config_dict"]))
    write(directory, config, weights)
    with pytest.warns(UserWarning, match="tokenizer"):
        return LoopedTransformer.from_pretrained_no_processing(directory, device="cpu"), weights


@pytest.mark.parametrize("base", ["qwen3", "llama"])
def test_logits_and_halting_logits_are_those_of_the_published_equations(tmp_path, base):
    config = {**CONFIG, "base_config_dict": {**BASE, "model_type": base}}
    model, weights = load(tmp_path, config)
    assert model.cfg.notation == "(1, 2⊗3, 2)"
    for n_iterations in (3, 1, 5):
        logits, halts = stated(weights, TOKENS, n_iterations, config["base_config_dict"])
        assert_close(model(TOKENS, n_iterations=n_iterations), logits, **CLOSE)
        cached, cache = model.run_with_cache(TOKENS, n_iterations=n_iterations)
        assert_close(cached, logits, **CLOSE)
        assert_close(cache.stack_activation("halt_logit"), torch.stack(halts), **CLOSE)
    with pytest.warns(UserWarning):
        folded = LoopedTransformer.from_pretrained(tmp_path, device="cpu")
    logits, _ = stated(weights, TOKENS, 3, config["base_config_dict"])
    assert_close(folded(TOKENS), logits, **CLOSE)


def test_cached_decoding_and_left_padding_change_nothing(tmp_path):
    model, weights = load(tmp_path)
    expected, _ = stated(weights, TOKENS, 3)
    past = KeyValueCache.init_cache(model.cfg, "cpu", 2)
    pieces = [TOKENS[:, :4], *TOKENS[:, 4:].split(1, dim=1)]
    decoded = torch.cat([model(piece, past_kv_cache=past) for piece in pieces], dim=1)
    assert_close(decoded, expected, **CLOSE)
    padded = F.pad(TOKENS, (4, 0), value=7)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    assert_close(model(padded, attention_mask=mask)[:, 4:], expected, **CLOSE)


def test_every_promise_is_kept_and_gradients_reach_every_weight(tmp_path):
    model, _ = load(tmp_path)
    findings = list(check_model(model))
    assert not [finding for finding in findings if finding.status == "failed"], findings
    halts = []
    names = [(f"iter.{t}.hook_halt_logit", lambda x, hook: halts.append(x)) for t in range(3)]
    with model.hooks(names):
        loss = model(TOKENS, return_type="loss")
    (loss + sum(h.mean() for h in halts)).backward()
    for name, parameter in model.physical_named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_gate_that_is_edited_keeps_the_old_state(tmp_path):
    model, _ = load(tmp_path)
    _, cache = model.run_with_cache(TOKENS)
    shut = [("iter.1.hook_state_gate", lambda g, hook: torch.zeros_like(g))]
    with model.hooks(shut):
        _, edited = model.run_with_cache(TOKENS)
    assert_close(edited["state_out", 1], cache["state_out", 0])
    g, new, old = cache["state_gate", 1], cache["iter.1.1.hook_resid_post"], cache["state_in", 1]
    assert_close(cache["state_out", 1], g * new + (1 - g) * old)


def test_what_the_gate_makes_no_sum_is_refused(tmp_path):
    model, weights = load(tmp_path)
    _, cache = model.run_with_cache(TOKENS)
    with pytest.raises(LoopedSemanticsError, match="gates or hyper-connections mix the states"):
        cache.decompose_resid()
    with pytest.raises(LoopedSemanticsError, match="a gate mixes in again"):
        model(cache["state_in", 1], start_at_iteration=1)
    # The coda lens starts behind the loop, which is whole again.
    read = lens.coda_lens(model, TOKENS, positions="all", keep_logits=True)
    assert_close(read.logits[0], stated(weights, TOKENS, 1)[0], **CLOSE)
    assert_close(read.logits[-1], stated(weights, TOKENS, 3)[0], **CLOSE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lma_window": 3}, "'lma_window' is 3"),
        ({"reasoning_layer_indices": []}, "'reasoning_layer_indices' is empty"),
        ({"encoder_layer_indices": None}, "'encoder_layer_indices' must be a list of layers"),
        ({"decoder_layer_indices": [-2]}, "'decoder_layer_indices' must be a list of layers"),
        ({"base_config_dict": {**BASE, "model_type": "gemma2"}}, "'gemma2', which is not impl"),
        ({"base_config_dict": {**BASE, "attention_bias": True}}, "'attention_bias' is True"),
        ({"base_config_dict": None}, "required field 'num_attention_heads' is missing"),
        ({"N": None}, "required field 'N' is missing"),
    ],
)
def test_other_mathematics_is_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message):
        LOOPUS.config_fields({**CONFIG, **changes}, "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(state_gate_rank=0), "state_gate_rank must be at least 1"),
        (dict(halt_head=True, hyper_connections=2), "exclude router and hyper_connections"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config("retrofitted", **changes)


def test_describe_states_the_gate():
    assert "x = g·x + (1 - g)·s" in tiny_config("ouro", state_gate_rank=3).describe()
