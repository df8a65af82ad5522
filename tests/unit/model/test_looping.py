"""Repeating blocks of TransformerLens's own models, over their own weights."""

import copy
import warnings
from typing import Any

import pytest
import torch

import tl_loops
from tests.closeness import assert_close
from tests.models import tiny_model, tiny_tokens
from tl_loops.config.checks import UNSUPPORTED
from tl_loops.config.fields import computing
from tl_loops.errors import ArgumentError, ConfigError, LoopedSemanticsError
from tl_loops.layout.layout import LoopLayout
from tl_loops.model.repeated.config import RepeatedConfig
from tl_loops.model.repeated.loop import loop
from tl_loops.upstream import HAS_HOOKED_TRANSFORMER
from tl_loops.upstream.config_fields import DETAILS_OF_THE_UNSUPPORTED

if not HAS_HOOKED_TRANSFORMER:
    pytest.skip("loops HookedTransformer, which 4.0 removed", allow_module_level=True)

from transformer_lens import HookedTransformer, HookedTransformerConfig

SIZES: dict[str, Any] = dict(
    n_layers=6,
    d_model=32,
    d_head=8,
    n_heads=4,
    d_mlp=48,
    n_ctx=32,
    d_vocab=50,
    act_fn="gelu",
    normalization_type="LN",
    seed=0,
    device="cpu",
)
LLAMA = dict(
    act_fn="silu",
    gated_mlp=True,
    normalization_type="RMS",
    positional_embedding_type="rotary",
    rotary_dim=8,
    final_rms=True,
)
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "folded": dict(normalization_type="LNPre"),
    "pythia": dict(parallel_attn_mlp=True, positional_embedding_type="rotary", rotary_dim=4),
    "llama": {**LLAMA, "n_key_value_heads": 2},
    "gemma2": {
        **LLAMA,
        "use_normalization_before_and_after": True,
        "attn_scores_soft_cap": 20.0,
        "output_logits_soft_cap": 10.0,
        "use_local_attn": True,
        "window_size": 4,
        "attn_types": ["global", "local"] * 3,
    },
    "olmo2": {**LLAMA, "original_architecture": "Olmo2ForCausalLM"},
    "qwen3": {**LLAMA, "use_qk_norm": True},
    "mixtral": {**LLAMA, "num_experts": 3, "experts_per_token": 2},
    "bloom": dict(positional_embedding_type="alibi", post_embedding_ln=True),
    "shortformer": dict(positional_embedding_type="shortformer"),
    "stanford": dict(scale_attn_by_inverse_layer_idx=True),
    "attn_only": dict(attn_only=True, d_mlp=None, act_fn=None),
    "without_norms": dict(normalization_type=None),
    "bidirectional": dict(attention_dir="bidirectional"),
}


def feedforward(kind: str, **changes: Any) -> HookedTransformer:
    """A HookedTransformer of one of :data:`KINDS` with all of its weights drawn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = HookedTransformerConfig(**{**SIZES, **KINDS[kind], **changes})
        model = HookedTransformer(cfg)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * draw if name.endswith(".w") else 0.2 * draw)
    return model.eval()


def unrolled_logits(model: HookedTransformer, order: list[int], tokens: torch.Tensor):
    """The blocks of a model in any order: a plain statement of what a loop computes."""
    resid, _, shortformer, mask = model.input_to_embed(tokens)
    for layer in order:
        resid = model.blocks[layer](resid, shortformer_pos_embed=shortformer, attention_mask=mask)
    if model.cfg.normalization_type is not None:
        resid = model.ln_final(resid)
    logits = model.unembed(resid)
    cap = model.cfg.output_logits_soft_cap
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


@pytest.mark.parametrize("kind", KINDS)
def test_one_iteration_is_the_original_bit_for_bit(kind: str):
    model, tokens = feedforward(kind), tiny_tokens()
    looped = loop(model, 2, 4, 1)
    expected, before = model.run_with_cache(tokens)
    logits, cache = looped.run_with_cache(tokens)
    assert torch.equal(logits, expected)
    assert set(before) <= set(cache)
    between = {f"iter.0.hook_{n}" for n in ("state_in", "injected", "state_out")}
    assert set(cache) - set(before) == between | {"hook_initial_state"}
    for name in before:
        assert torch.equal(cache[name], before[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_blocks_compute_what_their_order_says(kind: str):
    model, tokens = feedforward(kind), tiny_tokens()
    for looped, order in (
        (loop(model, 2, 4, 3), [0, 1, 2, 3, 2, 3, 2, 3, 4, 5]),
        (loop(model, 0, 6, 2), [*range(6), *range(6)]),
        (loop(model, repeats={1: 2, 2: 3}), [0, 1, 1, 2, 2, 2, 3, 4, 5]),
        (loop(model, loops=[(0, 1, 2), (2, 5, 2)]), [0, 0, 1, 2, 3, 4, 2, 3, 4, 5]),
    ):
        assert torch.equal(looped(tokens), unrolled_logits(model, order, tokens))
        assert looped.cfg.n_layers == len(order)
        assert [int(block.attn.layer_id) for block in looped.blocks] == order


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_the_originals_own(kind: str):
    model = feedforward(kind)
    looped = loop(model, 2, 4, 3)
    own = {name: p for name, p in model.named_parameters()}
    assert {id(p) for p in looped.parameters()} == {id(p) for p in own.values()}
    assert looped.cfg.n_params == sum(p.numel() for p in own.values())
    for index, block in enumerate(looped.blocks):
        layer = [0, 1, 2, 3, 2, 3, 2, 3, 4, 5][index]
        for name, parameter in block.named_parameters():
            assert parameter is own[f"blocks.{layer}.{name}"]
            assert parameter.data_ptr() == own[f"blocks.{layer}.{name}"].data_ptr()
    physical = dict(looped.physical_named_parameters())
    assert sum(p.numel() for p in physical.values()) == looped.cfg.n_params
    assert physical["core.1.attn.W_Q"] is model.blocks[3].attn.W_Q


def test_the_original_is_left_alone():
    model, tokens = feedforward("gpt2"), tiny_tokens()
    before, hooks = model(tokens), set(model.hook_dict)
    looped = loop(model, 1, 3, 4)
    looped.set_use_attn_result(True)
    looped.add_hook("iter.1.0.hook_attn_out", lambda x, hook: x * 0, is_permanent=True)
    looped(tokens)
    assert torch.equal(model(tokens), before)
    assert set(model.hook_dict) == hooks and not model.cfg.use_attn_result
    assert model.cfg.n_layers == 6


def test_hooks_and_aliases_name_each_pass():
    looped, tokens = loop(feedforward("gpt2"), 2, 4, 3), tiny_tokens()
    _, cache = looped.run_with_cache(tokens)
    assert cache["iter.1.0.attn.hook_pattern"] is cache["blocks.4.attn.hook_pattern"]
    assert cache["pattern", 1, 0] is cache["pattern", 4]
    assert torch.equal(cache["iter.1.hook_state_out"], cache["blocks.5.hook_resid_post"])
    assert torch.equal(cache["hook_initial_state"], cache["blocks.1.hook_resid_post"])
    assert cache["coda.1.hook_resid_post"] is cache["blocks.9.hook_resid_post"]

    def zero(x, hook):
        x[:] = 0
        return x

    edited = looped.run_with_hooks(tokens, fwd_hooks=[("iter.1.hook_state_in", zero)])
    with looped.hooks([("iter.1.hook_state_in", zero)]):
        again, edited_cache = looped.run_with_cache(tokens)
    assert torch.equal(edited, again)
    # An edit in place reaches the iteration alone, not what an earlier block has written.
    assert edited_cache["blocks.3.hook_resid_post"].abs().sum() > 0
    assert edited_cache["blocks.4.hook_resid_pre"].abs().sum() == 0


def test_iterations_change_without_a_copy():
    model, tokens = feedforward("llama"), tiny_tokens()
    looped = loop(model, 1, 4, 2)
    expected = {n: loop(model, 1, 4, n)(tokens) for n in (1, 2, 5)}
    for n in (1, 5, 2):
        assert torch.equal(looped(tokens, n_iterations=n), expected[n])
        with looped.iterations(n):
            assert torch.equal(looped(tokens), expected[n])
        looped.set_iterations(n)
        assert torch.equal(looped(tokens), expected[n])
        assert looped.cfg.notation == f"(1, 3⊗{n}, 2)"
    assert {id(p) for p in looped.parameters()} == {id(p) for p in model.parameters()}
    with pytest.raises(ConfigError, match="at least 1"):
        looped.set_iterations(0)


def test_hooks_of_iterations_that_remain_stay():
    looped, tokens = loop(feedforward("gpt2"), 2, 4, 2), tiny_tokens()
    seen = []
    looped.add_hook("iter.0.1.hook_mlp_out", lambda x, hook: seen.append(hook.name))
    looped.set_iterations(3)
    looped(tokens)
    assert seen == ["blocks.3.hook_mlp_out"]


@pytest.mark.parametrize("kind", ["gpt2", "pythia", "llama", "gemma2", "olmo2", "attn_only"])
def test_the_stream_decomposes(kind: str):
    looped, tokens = loop(feedforward(kind), 2, 4, 3), tiny_tokens()
    _, cache = looped.run_with_cache(tokens)
    stack, labels = cache.decompose_resid(return_labels=True)
    end = cache["blocks.9.hook_resid_post"]
    assert_close(stack.sum(0), end, rtol=1e-4, atol=1e-4)
    assert "r2.1_attn_out" in labels and ("r2.1_mlp_out" in labels) == (kind != "attn_only")
    heads = cache.stack_head_results(layer=-1, incl_remainder=True)
    assert_close(heads.sum(0), end, rtol=1e-4, atol=1e-4)
    full = cache.get_full_resid_decomposition(expand_neurons=False)
    assert_close(full.sum(0), end, rtol=1e-4, atol=1e-4)
    states = cache.decompose_resid(state_out=1)
    assert_close(states.sum(0), cache["iter.1.hook_state_out"], rtol=1e-4, atol=1e-4)
    if kind not in ("attn_only", "gemma2"):  # a capped readout is not linear
        W_U, b_U = looped.unembed.W_U, looped.unembed.b_U
        normed = cache.decompose_resid(apply_ln=True)
        logits = normed.sum(0) @ W_U + b_U
        assert_close(logits, looped(tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["pythia", "attn_only"])
def test_there_is_no_stream_between_attention_and_mlp_side_by_side(kind: str):
    looped = loop(feedforward(kind), 2, 4, 2)
    _, cache = looped.run_with_cache(tiny_tokens())
    with pytest.raises(LoopedSemanticsError, match="mlp_input"):
        cache.decompose_resid(3, mlp_input=True)
    with pytest.raises(LoopedSemanticsError, match="incl_mid"):
        cache.accumulated_resid(incl_mid=True)


def test_experts_have_no_one_set_of_neurons():
    looped = loop(feedforward("mixtral"), 2, 4, 2)
    _, cache = looped.run_with_cache(tiny_tokens())
    with pytest.raises(LoopedSemanticsError, match="experts"):
        cache.stack_neuron_results(-1)
    with pytest.raises(LoopedSemanticsError, match="experts"):
        looped.tl_parameters()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "pythia", "bloom"])
def test_cached_decoding_is_the_uncached_one(kind: str):
    looped, tokens = loop(feedforward(kind), 2, 4, 3), tiny_tokens()
    arguments: dict[str, Any] = dict(
        max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False
    )
    with_cache = looped.generate(tokens, **arguments)
    assert torch.equal(looped.generate(tokens, use_past_kv_cache=False, **arguments), with_cache)
    fewer = looped.generate(tokens, n_iterations=2, **arguments)
    assert torch.equal(loop(feedforward(kind), 2, 4, 2).generate(tokens, **arguments), fewer)


def test_a_run_can_stop_and_start_anywhere():
    looped, tokens = loop(feedforward("gpt2"), 2, 4, 3), tiny_tokens()
    logits, cache = looped.run_with_cache(tokens)
    for block in range(1, 10):
        resid = looped(tokens, stop_at_layer=block)
        assert torch.equal(resid, cache[f"blocks.{block}.hook_resid_pre"])
        assert torch.equal(looped(resid, start_at_layer=block), logits)
    state = cache["iter.1.hook_state_in"]
    assert torch.equal(looped(state, start_at_iteration=1), logits)
    other = torch.randn_like(state)
    given, its = looped.run_with_cache(tokens, initial_state=other)
    assert torch.equal(its["iter.0.hook_state_in"], other)
    assert torch.equal(given, looped(other, start_at_iteration=0))
    with pytest.raises(ValueError, match="initial_state must be"):
        looped(tokens, initial_state=other[:1])


def test_gradients_of_every_pass_add_up():
    model, tokens = feedforward("llama"), tiny_tokens()
    looped = loop(model, 2, 4, 3)
    looped(tokens, return_type="loss").backward()
    shared = model.blocks[2].attn.W_Q.grad
    assert shared is not None and shared.abs().sum() > 0
    # The same by copies of the blocks that are no longer tied.
    order = [0, 1, 2, 3, 2, 3, 2, 3, 4, 5]
    untied = copy.deepcopy(model)
    untied.zero_grad()
    untied.blocks = torch.nn.ModuleList([copy.deepcopy(model.blocks[i]) for i in order])
    untied.cfg.n_layers = len(order)
    for block in untied.blocks:
        block.zero_grad()
    untied.setup()
    untied(tokens, return_type="loss").backward()
    summed = sum(untied.blocks[i].attn.W_Q.grad for i in (2, 4, 6))
    assert_close(shared, summed, rtol=1e-4, atol=1e-6)


def test_an_edit_of_a_weight_shows_in_both():
    model, tokens = feedforward("gpt2"), tiny_tokens()
    looped = loop(model, 2, 4, 2)
    with torch.no_grad():
        model.blocks[2].mlp.W_in.zero_()
    expected = unrolled_logits(model, [0, 1, 2, 3, 2, 3, 4, 5], tokens)
    assert torch.equal(looped(tokens), expected)


def test_several_loops_have_names():
    looped, tokens = loop(feedforward("gpt2"), loops=[(1, 2, 2), (3, 5, 2)]), tiny_tokens()
    layout = looped.layout
    assert looped.cfg.notation == "(1, 1⊗2, 1, 2⊗2, 1)"
    assert layout.labels() == [
        "p0", "r0A.0", "r1A.0", "r2B.0", "r3C.0", "r3C.1", "r4C.0", "r4C.1", "c0"
    ]  # fmt: skip
    assert layout.physical_names() == [
        "prelude.0", "core.A.0", "core.B.0", "core.C.0", "core.C.1", "coda.0"
    ]  # fmt: skip
    for index in range(layout.n_layers):
        at = layout.coordinate(index)
        assert layout.index(iteration=at.iteration, layer=at.layer, phase=at.phase) == index
        name = f"blocks.{index}.attn.hook_pattern"
        assert layout.canonical_name(layout.alias(name)) == name
    _, cache = looped.run_with_cache(tokens)
    assert cache["iter.4.1.hook_mlp_out"] is cache["blocks.7.hook_mlp_out"]
    assert torch.equal(cache["iter.3.hook_state_out"], cache["blocks.5.hook_resid_post"])
    stack = cache.decompose_resid()
    assert_close(stack.sum(0), cache["blocks.8.hook_resid_post"])
    for refused in (
        lambda: layout.n_core,
        lambda: layout.by_iteration(torch.zeros(layout.n_layers)),
        lambda: looped.set_iterations(3),
        lambda: looped(tokens, n_iterations=3),
    ):
        with pytest.raises(LoopedSemanticsError, match=r"loops|numbers of layers"):
            refused()
    assert "core C   2 x [ blocks 3 to 4 ]" in looped.cfg.describe()
    equal = loop(feedforward("gpt2"), repeats={1: 2, 2: 3}).layout
    assert equal.n_core == 1 and equal.by_iteration(torch.arange(9)).shape == (5, 1)


def test_tools_take_a_looped_feedforward_model():
    looped, tokens = loop(feedforward("gpt2"), 2, 4, 3), tiny_tokens(1)
    other = tiny_tokens(1, seed=8)
    profile = tl_loops.measure(looped, [tokens[0], other[0]], progress=False)
    assert profile.layout == LoopLayout(2, 2, 2, 3)
    assert profile.by_iteration("mixing_score").shape[0] == 3
    _, clean = looped.run_with_cache(tokens)
    logits = looped(tokens)
    grid = tl_loops.patching.activation_patch(
        looped,
        other,
        clean,
        lambda x: x[0, -1, 3],
        activation="state_in",
        axes=("iteration", "pos"),
        progress=False,
    )
    assert grid.shape == (3, tokens.shape[1])
    whole = tl_loops.patching.activation_patch(
        looped, other, clean, lambda x: x[0, -1, 3], axes=("block",), progress=False
    )
    assert_close(whole[0], logits[0, -1, 3])
    ragged = loop(feedforward("gpt2"), loops=[(1, 2, 2), (3, 5, 2)])
    blocks = tl_loops.measure(ragged, [tokens[0]], progress=False)
    assert blocks.unrolled("mixing_score").shape == (9,)
    with pytest.raises(LoopedSemanticsError, match="numbers of layers"):
        blocks.by_iteration("mixing_score")


def test_lenses_read_a_looped_feedforward_model():
    looped, tokens = loop(feedforward("llama"), 2, 4, 3), tiny_tokens()
    _, cache = looped.run_with_cache(tokens)
    last = looped.unembed(looped.ln_final(cache["blocks.9.hook_resid_post"]))
    assert_close(last, looped(tokens))
    states, labels = cache.accumulated_resid(apply_ln=True, incl_states=True, return_labels=True)
    assert_close(states[-1] @ looped.unembed.W_U + looped.unembed.b_U, last)
    assert "r2_state_out" in labels


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "pythia"])
def test_the_coda_lens_of_the_last_state_is_the_logits(kind: str):
    tokens = tiny_tokens()
    for looped in (
        loop(feedforward(kind), 2, 4, 3),
        loop(feedforward(kind), 2, 6, 3),
        loop(feedforward(kind), loops=[(1, 2, 2), (3, 5, 2)]),
    ):
        found = tl_loops.lens.coda_lens(looped, tokens, points="states", keep_logits=True).logits
        assert found is not None
        assert_close(found[-1], looped(tokens), rtol=1e-4, atol=1e-4)
    looped = loop(feedforward(kind), 2, 6, 3)
    _, cache = looped.run_with_cache(tokens)
    for t in range(3):
        early = looped(tokens, n_iterations=t + 1)
        assert_close(looped.state_logits(cache["state_out", t]), early)
    with pytest.raises(LoopedSemanticsError, match="a coda stands between"):
        loop(feedforward(kind), 2, 4, 3).state_logits(cache["state_out", 0])


def test_what_cannot_be_right_is_refused():
    model = feedforward("gpt2")
    looped = loop(model, 2, 4, 2)
    for arguments in (dict(start=0, stop=1, n_iterations=2), dict(repeats={0: 2})):
        with pytest.raises(LoopedSemanticsError, match="repeats blocks already"):
            loop(looped, **arguments)
    with pytest.raises(LoopedSemanticsError, match="set_iterations"):
        loop(tiny_model("ouro"), 0, 1, 2)
    with pytest.raises(LoopedSemanticsError, match="got Linear"):
        loop(torch.nn.Linear(2, 2), 0, 1, 2)
    model.cfg.n_devices = 2
    with pytest.raises(LoopedSemanticsError, match="2 devices"):
        loop(model, 0, 1, 2)
    model.cfg.n_devices = 1
    for call in (
        lambda: looped.to(torch.float64),
        lambda: looped.to("meta"),
        lambda: looped.half(),
        lambda: looped.process_weights_(),
        lambda: looped.load_and_process_state_dict({}),
        lambda: looped.save_pretrained("somewhere"),
    ):
        with pytest.raises(LoopedSemanticsError, match="original"):
            call()
    assert looped.to("cpu") is looped and looped.to(torch.float32) is looped


def test_sharing_keys_is_refused_and_no_argument_is_ignored():
    from tl_loops.model.kv_sharing_effect import kv_sharing_effect

    looped, tokens = loop(feedforward("gpt2"), 2, 4, 3), tiny_tokens()
    for call in (
        lambda: looped(tokens, kv_sharing="first"),
        lambda: looped.generate(tokens, 2, kv_sharing="ring:2"),
        lambda: looped.make_kv_cache(2, "shared"),
        lambda: kv_sharing_effect(looped, tokens, "shared"),
    ):
        with pytest.raises(ConfigError, match="an option of LoopedTransformer"):
            call()
    with pytest.raises(ConfigError, match="kv_sharing must be 'none' or one of"):
        looped(tokens, kv_sharing="frist")
    with pytest.raises(TypeError, match="no argument 'initial_state'"):
        looped.generate(tokens, 2, stop_at_eos=False, initial_state=None)
    cache = looped.make_kv_cache(2)
    mask = torch.ones_like(tokens)
    pieces = [
        looped(tokens[:, part], past_kv_cache=cache, attention_mask=mask[:, part])
        for part in (slice(0, 4), slice(4, 9))
    ]
    assert_close(torch.cat(pieces, 1), looped(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "say what repeats"),
        (dict(start=1), "say what repeats"),
        (dict(start=1, stop=2, n_iterations=2, repeats={1: 2}), "say what repeats"),
        (dict(start=4, stop=4, n_iterations=2), "start < stop"),
        (dict(start=0, stop=7, n_iterations=2), "<= 6"),
        (dict(start=-1, stop=3, n_iterations=2), "0 <= start"),
        (dict(start=0, stop=2, n_iterations=0), "at least once"),
        (dict(start=0, stop=2, n_iterations=True), "an integer or None"),
        (dict(repeats={}), "nothing repeats"),
        (dict(repeats={9: 2}), "<= 6"),
        (dict(loops=[(0, 3, 2), (2, 4, 2)]), "do not overlap"),
        (dict(loops=[(3, 4, 2), (0, 1, 2)]), "in order"),
        (dict(loops=[(3, 4)]), "a loop is"),
    ],
)
def test_bad_arguments_say_what_is_wrong(arguments: dict[str, Any], message: str):
    with pytest.raises((ConfigError, ArgumentError), match=message):
        loop(feedforward("gpt2"), **arguments)


def test_looped_feedforward_models_that_differ_are_described_otherwise():
    described = [loop(feedforward(kind), 2, 4, 3).cfg.describe() for kind in KINDS]
    assert len(set(described)) == len(described)
    assert "x += attn(ln1(x)) + mlp(ln2(x))" in described[list(KINDS).index("pythia")]
    adjacent = feedforward("llama", rotary_adjacent_pairs=True)
    assert "dimensions 2i and 2i + 1" in loop(adjacent, 2, 4, 3).cfg.describe()
    further = DETAILS_OF_THE_UNSUPPORTED | UNSUPPORTED.keys()
    for name in set(computing(RepeatedConfig)) & further:
        cfg = copy.copy(loop(feedforward("gpt2"), 2, 4, 3).cfg)
        before = cfg.describe()
        setattr(cfg, name, "another value")
        assert cfg.describe() != before, name
