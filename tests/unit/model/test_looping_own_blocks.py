"""tl_loops.loop over a LoopedTransformer that runs each of its blocks once."""

import pytest
import torch
from torch.testing import assert_close

import tl_loops
from tests.feedforward import only_before_4, plain_model
from tests.models import tiny_model, tiny_tokens
from tl_loops import (
    ConfigError,
    LoopedSemanticsError,
    LoopedTransformer,
    LoopedTransformerConfig,
)

TOKENS = tiny_tokens()
PLAIN = dict(n_prelude=0, n_core=5, n_coda=0, n_iterations=1)


@pytest.fixture(scope="module", params=["parallel", "olmo", "layer_norm"])
def model(request):
    changes = {} if request.param == "parallel" else dict(injection=None, initial_state="embed")
    name = "olmo_grouped" if request.param == "olmo" else request.param
    return tiny_model(name, **PLAIN, **changes)


def test_weights_are_the_very_parameters(model):
    looped = tl_loops.loop(model, 1, 4, 3)
    assert looped.cfg.notation == "(1, 3⊗3, 1)" and looped.cfg.n_params == model.cfg.n_params
    theirs = {id(p) for p in model.parameters()}
    assert {id(p) for p in looped.parameters()} == theirs
    assert looped.blocks[7].attn.W_Q is model.blocks[1].attn.W_Q


def test_one_iteration_is_the_model_itself(model):
    looped = tl_loops.loop(model, 1, 4, 1)
    assert torch.equal(looped(TOKENS), model(TOKENS))
    _, ours = looped.run_with_cache(TOKENS)
    _, theirs = model.run_with_cache(TOKENS)
    assert torch.equal(ours["z", 2], theirs["z", 2])


def test_blocks_run_again(model):
    looped = tl_loops.loop(model, 1, 4, 3)
    stream = model(TOKENS, stop_at_layer=1)
    for _ in range(3):
        stream = model(stream, start_at_layer=1, stop_at_layer=4)
    assert_close(looped(TOKENS), model(stream, start_at_layer=4), rtol=0, atol=1e-5)
    looped.set_iterations(1)
    assert torch.equal(looped(TOKENS), model(TOKENS))


def test_the_model_keeps_its_hooks_and_mode(model):
    seen = []
    model.train()
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: seen.append(1))]):
        looped = tl_loops.loop(model, 1, 4, 2)
        assert looped.training
        looped(TOKENS)
        assert not seen
    model.eval()
    assert model.cfg.notation == "(0, 5⊗1, 0)"


def test_what_stands_between_the_blocks_is_not_moved():
    for changes, named in (
        (dict(n_iterations=1), "injection, initial_state|initial_state, injection"),
        (dict(n_iterations=3), "is looped already"),
    ):
        with pytest.raises(LoopedSemanticsError, match=named):
            tl_loops.loop(tiny_model("retrofitted", **changes), 1, 2, 2)
    with pytest.raises(LoopedSemanticsError, match=r"exit_gate.*norm_between_iterations"):
        tl_loops.loop(tiny_model("ouro", n_iterations=1), 1, 2, 2)


def test_wrong_blocks_raise(model):
    for several in (dict(start=3, stop=9, n_iterations=2), dict(loops=[(0, 1, 2), (3, 9, 2)])):
        with pytest.raises(ConfigError, match="0 <= start < stop <= 5"):
            tl_loops.loop(model, **several)
    for huge in (dict(start=0, stop=1, n_iterations=10**12), dict(repeats={0: 10**12})):
        with pytest.raises(ConfigError, match="at most 100,000 are supported"):
            tl_loops.loop(model, **huge)


# Several loops.

LOOPS = dict(loops=[(1, 2, 2), (3, 5, 2)])


def test_several_loops_run_the_blocks_that_they_name(model):
    looped = tl_loops.loop(model, **LOOPS)
    assert looped.cfg.notation == "(1, 1⊗2, 1, 2⊗2, 0)"
    order = [0, 1, 1, 2, 3, 4, 3, 4]
    for block, layer in zip(looped.blocks, order, strict=True):
        assert block.attn.W_Q is model.blocks[layer].attn.W_Q
    assert looped.cfg.n_params == model.cfg.n_params
    stream = model(TOKENS, stop_at_layer=1)
    logits, cache = looped.run_with_cache(TOKENS)
    for place, block in enumerate(order[1:], start=1):
        assert_close(cache["resid_pre", place], stream, rtol=0, atol=1e-5)
        assert_close(looped(stream, start_at_layer=place), logits, rtol=0, atol=1e-5)
        stream = model(stream, start_at_layer=block, stop_at_layer=block + 1)
    end = model.ln_final(stream)
    assert_close(logits, model.unembed(end), rtol=0, atol=1e-5)
    again = looped(cache["state_in", 3], start_at_iteration=3)
    assert_close(again, logits, rtol=0, atol=1e-5)
    each_alone = tl_loops.loop(model, repeats={1: 2, 2: 3})
    assert each_alone.cfg.n_core == 1 and each_alone.cfg.notation == "(1, 1⊗2, 1⊗3, 2)"


def test_the_tools_take_several_loops(model):
    looped, other = tl_loops.loop(model, **LOOPS), tiny_tokens(seed=8)
    logits, cache = looped.run_with_cache(TOKENS)
    assert cache["iter.4.1.hook_mlp_out"] is cache["blocks.7.hook_mlp_out"]
    end = looped.cfg.readout.last_hook
    assert_close(cache.decompose_resid().sum(0), cache[end], rtol=1e-4, atol=1e-4)
    grid = tl_loops.patching.activation_patch(
        looped, other, cache, lambda x: x[0, -1, 3], axes=("block",), progress=False
    )
    assert_close(grid[0], logits[0, -1, 3])
    found = tl_loops.lens.coda_lens(looped, TOKENS, points="states", keep_logits=True).logits
    assert_close(found[-1], logits, rtol=1e-4, atol=1e-4)
    profile = tl_loops.measure(looped, [TOKENS[0]], ("residual_norm",), progress=False)
    assert profile.unrolled("residual_norm").shape == (8,)
    greedy = dict(max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)
    without = looped.generate(TOKENS, use_past_kv_cache=False, **greedy)
    assert torch.equal(looped.generate(TOKENS, **greedy), without)


def test_several_loops_are_saved_and_read(model, tmp_path):
    looped = tl_loops.loop(model, **LOOPS)
    looped.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no tokenizer files"):
        read = LoopedTransformer.from_pretrained_no_processing(tmp_path)
    assert read.layout == looped.layout and read.cfg.describe() == looped.cfg.describe()
    assert_close(read(TOKENS), looped(TOKENS), rtol=0, atol=1e-5)


def test_several_loops_raise_on_what_one_number_or_one_state_would_say(model):
    looped = tl_loops.loop(model, **LOOPS)
    for call, named in (
        (lambda: looped.set_iterations(3), "does not say which"),
        (lambda: looped(TOKENS, n_iterations=3), "does not say which"),
        (lambda: looped.cfg.n_core, "different numbers of layers"),
        (lambda: looped(TOKENS, exit_at=1), "other loops follow"),
        (lambda: tl_loops.loop(looped, 0, 1, 2), "loop the original"),
    ):
        with pytest.raises(LoopedSemanticsError, match=named):
            call()
    looped.set_iterations(5)
    for changes, named in (
        (dict(kv_sharing="first"), "models of one loop"),
        (dict(n_iterations=4), "contradicts segments, which give 5"),
        (dict(n_prelude=2), "contradicts segments, which give 1"),
        (dict(segments=[(0, 2, 2), (3, 5, 1)]), "must follow each other"),
        (dict(segments=[(0, 2, 0), (2, 5, 1)]), "at least one iteration"),
        (dict(segments=[(0, 2, 10**12)]), "at most 100,000"),
        (dict(segments=7), "do not fit"),
        (dict(norm_before_coda=True), "nothing but blocks between"),
    ):
        with pytest.raises(ConfigError, match=named):
            LoopedTransformerConfig.from_dict({**looped.cfg.to_dict(), **changes})
    with pytest.raises(ConfigError, match="models of one loop"):
        looped(TOKENS, kv_sharing="first")


@only_before_4
@pytest.mark.parametrize("how", [LOOPS, dict(repeats={1: 2, 2: 3})], ids=["loops", "repeats"])
def test_several_loops_are_those_of_a_hooked_transformer(how):
    model = tiny_model("layer_norm", **PLAIN, injection=None, initial_state="embed")
    cfg = model.cfg
    names = "d_model d_head n_heads d_mlp n_ctx d_vocab act_fn normalization_type eps".split()
    hooked = plain_model(n_layers=5, **{name: getattr(cfg, name) for name in names})
    hooked.load_state_dict(model.state_dict(), strict=False)
    ours, theirs = tl_loops.loop(model, **how), tl_loops.loop(hooked, **how)
    assert ours.layout == theirs.layout
    logits, cache = ours.run_with_cache(TOKENS)
    expected, other = theirs.run_with_cache(TOKENS)
    assert_close(logits, expected, rtol=0, atol=1e-5)
    assert set(cache) == set(other)
    for name in cache:
        assert_close(cache[name], other[name], rtol=1e-4, atol=1e-5)
