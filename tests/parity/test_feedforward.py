"""Plain feedforward checkpoints against transformers, on random configurations."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tl_loops import CheckpointError, LoopedTransformer

SIZES = dict(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
)
GROUPED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 32}
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
CASES = {
    "llama": (LlamaConfig, LlamaForCausalLM, GROUPED),
    "llama with biases": (LlamaConfig, LlamaForCausalLM, {**GROUPED, "attention_bias": True}),
    "llama tied": (LlamaConfig, LlamaForCausalLM, {**GROUPED, "tie_word_embeddings": True}),
    "llama of another head width": (LlamaConfig, LlamaForCausalLM, {**GROUPED, "head_dim": 12}),
    "llama 3": (
        LlamaConfig,
        LlamaForCausalLM,
        {**GROUPED, "rope_parameters": {"rope_theta": 500.0, **LLAMA3}},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {**GROUPED, "sliding_window": None}),
    "mistral, wide window": (MistralConfig, MistralForCausalLM, {**GROUPED, "sliding_window": 32}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, GROUPED),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {**GROUPED, "head_dim": 8}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, GROUPED),
    "gpt2": (
        GPT2Config,
        GPT2LMHeadModel,
        dict(vocab_size=40, n_embd=32, n_layer=4, n_head=4, n_positions=32),
    ),
    "gpt2, other widths": (
        GPT2Config,
        GPT2LMHeadModel,
        dict(vocab_size=40, n_embd=32, n_layer=4, n_head=4, n_positions=32, n_inner=24)
        | dict(activation_function="gelu", tie_word_embeddings=False),
    ),
    "pythia": (GPTNeoXConfig, GPTNeoXForCausalLM, {**SIZES, "max_position_embeddings": 32}),
    "gpt-neox, in turn": (
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        {
            **SIZES,
            "max_position_embeddings": 32,
            "use_parallel_residual": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 300.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 35], [2, 7, 1, 8, 2, 8, 1, 39, 2, 8]])


def original(case):
    """A random model of transformers; norms and biases are not left at one and zero."""
    config_class, model_class, fields = CASES[case]
    torch.manual_seed(sorted(CASES).index(case))
    model = model_class(config_class(**fields)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            gain = "norm" in name.lower() or ".ln_" in name
            weight.normal_(1.0 if gain and name.endswith("weight") else 0.0, 0.3)
    return model


@pytest.fixture(params=CASES, scope="module")
def pair(request, tmp_path_factory):
    model = original(request.param)
    directory = tmp_path_factory.mktemp("feedforward")
    model.save_pretrained(directory)
    return model, directory


def close(ours, theirs):
    theirs = theirs.detach()
    assert_close(ours.detach(), theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


def test_logits_are_those_of_transformers(pair):
    theirs, directory = pair
    ours = LoopedTransformer.from_pretrained_no_processing(directory)
    assert ours.cfg.n_iterations == 1 and ours.cfg.n_core == 4
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    close(ours(TOKENS), expected)
    logits, cache = ours.run_with_cache(TOKENS)
    close(logits, expected)
    hidden = theirs(TOKENS, output_hidden_states=True).hidden_states
    close(cache["resid_post", 1], hidden[2])


def test_left_padding_is_that_of_transformers(pair):
    theirs, directory = pair
    ours = LoopedTransformer.from_pretrained_no_processing(directory)
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(TOKENS, attention_mask=mask, position_ids=positions).logits
        found = ours(TOKENS, attention_mask=mask)
    close(found[0, 3:], expected[0, 3:])
    close(found[1], expected[1])


@pytest.mark.filterwarnings("ignore:.*not applied")
def test_processing_keeps_the_probabilities(pair):
    theirs, directory = pair
    ours = LoopedTransformer.from_pretrained(directory)
    with torch.no_grad():
        close(ours(TOKENS).log_softmax(-1), theirs(TOKENS).logits.log_softmax(-1))


def test_a_loop_runs_the_blocks_again(pair):
    _, directory = pair
    once = LoopedTransformer.from_pretrained_no_processing(directory)
    looped = LoopedTransformer.from_pretrained_no_processing(directory, loop=(1, 3, 3))
    assert looped.cfg.notation == "(1, 2⊗3, 1)"
    assert looped.cfg.n_params == once.cfg.n_params
    stream = once(TOKENS, stop_at_layer=1)
    for _ in range(3):
        stream = once(stream, start_at_layer=1, stop_at_layer=3)
    assert_close(looped(TOKENS), once(stream, start_at_layer=3), rtol=0, atol=1e-5)
    assert_close(looped(TOKENS, n_iterations=1), once(TOKENS))


def test_decoding_with_a_cache(pair):
    _, directory = pair
    ours = LoopedTransformer.from_pretrained_no_processing(directory, loop=(1, 2, 2))
    past = ours.make_kv_cache(batch=2)
    with torch.no_grad():
        pieces = [
            ours(piece, past_kv_cache=past)
            for piece in (TOKENS[:, :4], TOKENS[:, 4:9], TOKENS[:, 9:])
        ]
        assert_close(torch.cat(pieces, 1), ours(TOKENS), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("case", "changes", "named"),
    [
        ("mistral", {"sliding_window": 8}, "'sliding_window' = 8 is below"),
        ("llama", {"mlp_bias": True}, "'mlp_bias' is True"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "'yarn'"),
        ("qwen2", {"use_sliding_window": True}, "'use_sliding_window' is True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx'"),
        ("pythia", {"rotary_pct": 0.3, "partial_rotary_factor": 0.5}, "given twice"),
        ("olmo2", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
    ],
)
def test_what_is_not_exact_is_refused_by_name(case, changes, named, tmp_path):
    original(case).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=named):
        LoopedTransformer.from_pretrained(tmp_path)
