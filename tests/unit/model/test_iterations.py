"""Changing the number of iterations: no weight moves, no hook gets lost, every name is kept."""

import pytest
import torch

from tests.closeness import assert_close
from tests.models import ARCHITECTURES, tiny_model, tiny_tokens
from tl_loops import ConfigError, LoopedTransformer

TOKENS = tiny_tokens()


@pytest.fixture(params=ARCHITECTURES, scope="module")
def model(request):
    return tiny_model(request.param)


def test_three_ways_agree_and_leave_the_model_as_it_was(model):
    before, parameters = model(TOKENS), [id(p) for p in model.parameters()]
    names, n_iterations = list(model.hook_dict), model.cfg.n_iterations
    for n in (1, n_iterations + 2):
        call = model(TOKENS, n_iterations=n)
        with model.iterations(n) as inner:
            assert inner is model
            assert model.cfg.n_layers == model.layout.n_layers == len(model.blocks)
            assert torch.equal(model(TOKENS), call)
            assert f"iter.{n - 1}.hook_state_out" in model.hook_dict
        model.set_iterations(n)
        assert torch.equal(model(TOKENS), call)
        model.set_iterations(n_iterations)
        assert torch.equal(model(TOKENS), before)
    assert [id(p) for p in model.parameters()] == parameters
    assert list(model.hook_dict) == names


def test_a_model_made_with_n_iterations_is_the_same(model):
    other = LoopedTransformer(model.cfg)
    other.load_physical_state_dict(model.physical_state_dict())
    with model.iterations(5):
        other.set_iterations(5)
        assert torch.equal(other(TOKENS), model(TOKENS))
        again = LoopedTransformer(model.cfg, weights=model.physical_state_dict().items())
        assert torch.equal(again(TOKENS), model(TOKENS))


def test_many_iterations_add_no_weight_and_keep_every_name(model):
    n_params, n_core = sum(p.numel() for p in model.parameters()), model.cfg.n_core
    with model.iterations(128):
        assert sum(p.numel() for p in model.parameters()) == n_params == model.cfg.n_params
        assert len(model.blocks) == model.cfg.n_prelude + 128 * n_core + model.cfg.n_coda
        for index in range(model.cfg.n_layers):
            assert f"blocks.{index}.attn.hook_pattern" in model.hook_dict
        for t in range(128):
            assert f"iter.{t}.hook_state_out" in model.hook_dict


def test_hooks_survive_a_block_of_other_iterations(model):
    seen: list[str] = []
    last = model.cfg.n_iterations - 1
    model.add_hook(f"iter.{last}.0.hook_resid_pre", lambda x, hook: seen.append(hook.name))
    model.add_hook(f"iter.{last}.hook_state_out", lambda x, hook: seen.append(hook.name))
    try:
        model(TOKENS, n_iterations=1)
        assert seen == [] or last == 0
        model(TOKENS, n_iterations=last + 3)
        first = list(seen)
        model(TOKENS)
        assert seen == first * 2
        assert len(first) == 2
    finally:
        model.reset_hooks()


def test_hooks_and_caches_name_the_iterations_of_the_call(model):
    n = model.cfg.n_iterations + 2
    logits, cache = model.run_with_cache(TOKENS, n_iterations=n)
    assert_close(logits, model(TOKENS, n_iterations=n), rtol=1e-5, atol=1e-5)
    assert cache.layout.n_iterations == n
    assert f"iter.{n - 1}.0.attn.hook_pattern" in cache
    assert cache["resid_post", -1].shape == (*TOKENS.shape, model.cfg.d_model)
    seen = []
    model.run_with_hooks(
        TOKENS,
        n_iterations=n,
        fwd_hooks=[(f"iter.{n - 1}.hook_state_out", lambda x, hook: seen.append(hook.name))],
    )
    assert seen == [f"iter.{n - 1}.hook_state_out"]


def test_an_error_inside_restores_the_iterations(model):
    n_iterations = model.cfg.n_iterations
    with pytest.raises(RuntimeError, match="on purpose"), model.iterations(2):
        raise RuntimeError("on purpose")
    assert model.cfg.n_iterations == n_iterations == len(model.iter)


@pytest.mark.parametrize("bad", [0, -3])
def test_fewer_than_one_iteration_is_refused(model, bad):
    n_layers = model.cfg.n_layers
    for call in (
        lambda: model.set_iterations(bad),
        lambda: model(TOKENS, n_iterations=bad),
        lambda: model.run_with_cache(TOKENS, n_iterations=bad),
    ):
        with pytest.raises(ConfigError, match="at least 1"):
            call()
    assert model.cfg.n_layers == n_layers == len(model.blocks)


def test_two_models_of_one_config_do_not_share_it():
    from tests.models import tiny_config

    cfg = tiny_config("retrofitted")
    one, two = LoopedTransformer(cfg), LoopedTransformer(cfg)
    one.set_iterations(7)
    assert two.cfg.n_iterations == cfg.n_iterations == 3
