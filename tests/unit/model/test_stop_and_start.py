"""A run that stops and starts again: every hook point fires in one half, and nothing is lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tl_loops
from tests.closeness import assert_close
from tests.feedforward import only_before_4, plain_model
from tests.models import STACKS, tiny_model, tiny_tokens
from tl_loops import HookNameError, LoopedSemanticsError
from tl_loops.mechanisms.injection import KINDS

TOKENS = tiny_tokens(batch=1, pos=4)
LN_INJECTION = ("ln_injection.hook_scale", "ln_injection.hook_normalized")


def may_be_hooked(model, name):
    try:
        model.check_hooks_to_add(model.hook_dict[name], name, print)
    except HookNameError:
        return False
    return True


@torch.no_grad()
def halves_are_one_pass(model):
    """Stop at every block and start there again: the logits, and each hook point in one half."""
    logits, cache = model.run_with_cache(TOKENS)
    assert {*cache} == {name for name in model.hook_dict if may_be_hooked(model, name)}
    for index in range(model.cfg.n_layers + 1):
        at = model.layout.coordinate(index) if index < model.cfg.n_layers else None
        needs = {}
        if model.cfg.injection is not None:
            needs["injection"] = cache["hook_injection"]
        if model.cfg.stacks is not None and at is not None and at.phase == "core":
            needs["other_state"] = cache["other_in", at.iteration]
        stream, first = model.run_with_cache(TOKENS, stop_at_layer=index)
        again, second = model.run_with_cache(stream, start_at_layer=index, **needs)
        assert_close(again, logits, rtol=1e-4, atol=1e-5)
        twice = {name for name in second if name in first}
        if twice:  # the norm of the e that is given
            assert model.cfg.injection == "add_normed" and twice == {*LN_INJECTION}
        assert [*first, *(name for name in second if name not in twice)] == [*cache], index


LOOPS = st.fixed_dictionaries(
    dict(
        n_prelude=st.integers(0, 2),
        n_core=st.integers(1, 2),
        n_coda=st.integers(0, 1),
        n_iterations=st.integers(1, 3),
        injection=st.sampled_from(KINDS),
        norm_between_iterations=st.booleans(),
        block_norm=st.sampled_from(["pre", "sandwich"]),
    )
)
STACKED = st.fixed_dictionaries(
    dict(
        n_prelude=st.integers(0, 1),
        n_core=st.integers(1, 2),
        n_coda=st.integers(0, 1),
        n_iterations=st.just(6),
        stacks=st.sampled_from([("fast", "slow"), ("L", "L", "H")]),
        shared_stacks=st.booleans(),
        injection=st.sampled_from(KINDS),
        slow_injection=st.booleans(),
        initial_state=st.sampled_from(["embed", "learned"]),
        slow_initial_state=st.sampled_from(["embed", "learned"]),
        norm_between_iterations=st.booleans(),
    )
).filter(lambda sizes: sizes["injection"] is not None or not sizes["slow_injection"])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(sizes=LOOPS)
def test_every_hook_point_fires_in_one_half(sizes):
    halves_are_one_pass(tiny_model("ouro", exit_gate=not sizes["n_coda"], **sizes))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(sizes=STACKED)
def test_every_hook_point_of_two_stacks_fires_in_one_half(sizes):
    halves_are_one_pass(tiny_model("retrofitted", **sizes))


@pytest.mark.parametrize("name", ["huginn", *STACKS])
def test_every_hook_point_of_an_architecture_fires_in_one_half(name):
    halves_are_one_pass(tiny_model(name))


PLAIN = dict(n_prelude=0, n_core=4, n_coda=0, n_iterations=1)


@pytest.mark.parametrize("loops", [[(0, 2, 2), (2, 4, 2)], [(0, 1, 2), (1, 3, 3)]])
def test_every_hook_point_of_several_loops_fires_in_one_half(loops):
    model = tiny_model("layer_norm", **PLAIN, injection=None, initial_state="embed")
    halves_are_one_pass(tl_loops.loop(model, loops=loops))


@only_before_4
@pytest.mark.parametrize("loop", [(0, 4, 2), (1, 4, 2), (1, 3, 2)])
def test_every_hook_point_of_a_looped_hooked_transformer_fires_in_one_half(loop):
    sizes = dict(n_layers=4, d_model=16, d_head=8, n_heads=2, d_mlp=16, n_ctx=8, d_vocab=50)
    halves_are_one_pass(tl_loops.loop(plain_model(**sizes, act_fn="gelu"), *loop))


@pytest.mark.parametrize("name", ["act", "recursions", "hyperloop"])
def test_the_end_of_a_loop_that_mixes_states_needs_the_states(name):
    model = tiny_model(name, n_coda=0)
    stream = model(TOKENS, stop_at_layer=model.cfg.n_layers)
    with pytest.raises(LoopedSemanticsError, match="carries more than its state"):
        model(stream, start_at_layer=model.cfg.n_layers)
    model = tiny_model(name)
    stream = model(TOKENS, stop_at_layer=model.cfg.n_layers)
    again = model(stream, start_at_layer=model.cfg.n_layers)
    assert_close(again, model(TOKENS), rtol=1e-5, atol=1e-5)
