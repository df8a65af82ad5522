"""tl_loops.loop over a LoopedTransformer that runs each of its blocks once."""

import pytest
import torch
from torch.testing import assert_close

import tl_loops
from tests.models import tiny_model, tiny_tokens
from tl_loops import ConfigError, LoopedSemanticsError

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


def test_several_loops_and_wrong_blocks_raise(model):
    with pytest.raises(LoopedSemanticsError, match="has one loop: give start, stop"):
        tl_loops.loop(model, repeats={1: 2})
    with pytest.raises(ConfigError, match="0 <= start < stop <= 5"):
        tl_loops.loop(model, 3, 9, 2)
