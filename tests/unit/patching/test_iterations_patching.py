"""Transplants of states and the order of iterations."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.closeness import assert_close
from tests.models import ARCHITECTURES, tiny_model, tiny_tokens
from tl_loops.patching import (
    activation_patch,
    repeat_schedule,
    run_schedule,
    skip_hooks,
    skip_schedule,
    swap_hooks,
    swap_schedule,
    transplant_states,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: tiny_model(name, n_iterations=3) for name in ARCHITECTURES}


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -2, 5]).mean()


def close(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


def double(value: Tensor, hook: Any) -> Tensor:
    return 2.0 * value


# Transplants.


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["ouro", "huginn"])
@pytest.mark.parametrize("activation", ["state_in", "injected", "state_out"])
def test_transplants_equal_hooked_runs(models, architecture, activation):
    model = models[architecture]
    clean, corrupted = tiny_tokens(2, 4), tiny_tokens(2, 4, seed=9)
    _, cache = model.run_with_cache(clean)
    found = transplant_states(model, corrupted, cache, metric, activation, progress=False)
    assert found.shape == (3, 3)
    for a in range(3):
        for b in range(3):
            state = cache[f"iter.{a}.hook_{activation}"]
            logits = model.run_with_hooks(
                corrupted,
                fwd_hooks=[(f"iter.{b}.hook_{activation}", lambda v, hook, s=state: s.clone())],
            )
            close(found[a, b], metric(logits))
    diagonal = activation_patch(
        model, corrupted, cache, metric, activation, ("iteration",), progress=False
    )
    close(found.diagonal(), diagonal)


@torch.no_grad()
def test_a_later_state_moved_earlier_in_the_same_run_shortens_nothing(models):
    """State a put at b continues as the longer run: n - 1 - b more iterations behind a."""
    model = models["retrofitted"]
    tokens = tiny_tokens(2, 4)
    with model.iterations(6):
        _, cache = model.run_with_cache(tokens)
    found = transplant_states(model, tokens, cache, metric, progress=False)
    assert found.shape == (6, 3)
    for a in range(4):
        for b in range(3):
            depth = a + 1 + (2 - b)
            close(found[a, b], metric(model(tokens, n_iterations=depth)))


@torch.no_grad()
def test_transplants_at_chosen_places(models):
    model = models["huginn"]
    clean, corrupted = tiny_tokens(2, 5), tiny_tokens(2, 5, seed=9)
    _, cache = model.run_with_cache(clean)
    found = transplant_states(
        model, corrupted, cache, metric, sources=[-1], targets=[0, 2], pos=[1, 3], progress=False
    )

    def hook(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, [1, 3]] = cache["iter.2.hook_state_out"][:, [1, 3]]
        return value

    expected = [
        metric(model.run_with_hooks(corrupted, fwd_hooks=[(f"iter.{b}.hook_state_out", hook)]))
        for b in (0, 2)
    ]
    close(found, torch.stack(expected)[None])


@torch.no_grad()
def test_bad_transplants_are_refused(models):
    model = models["huginn"]
    tokens = tiny_tokens(2, 4)
    _, cache = model.run_with_cache(tokens)
    _, empty = model.run_with_cache(tokens, names_filter="hook_embed")
    _, short = model.run_with_cache(tokens[:, :3])
    with pytest.raises(ValueError, match="activation must be"):
        transplant_states(model, tokens, cache, metric, "resid_pre")
    with pytest.raises(IndexError, match="no target iteration 3"):
        transplant_states(model, tokens, cache, metric, targets=[3])
    with pytest.raises(IndexError, match="no source iteration 5"):
        transplant_states(model, tokens, cache, metric, sources=[5])
    with pytest.raises(ValueError, match="holds no"):
        transplant_states(model, tokens, empty, metric)
    with pytest.raises(ValueError, match="3 positions"):
        transplant_states(model, tokens, short, metric)


# The order of iterations.


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_hooks_only_the_number_of_iterations_matters(models, architecture):
    model = models[architecture]
    tokens = tiny_tokens(2, 4)
    close(run_schedule(model, tokens, swap_schedule(model, 0, 2)), model(tokens))
    skipped = run_schedule(model, tokens, skip_schedule(model, 1))
    close(skipped, model(tokens, n_iterations=2))
    repeated = run_schedule(model, tokens, repeat_schedule(model, 1, 3))
    close(repeated, model(tokens, n_iterations=5))
    assert model.cfg.n_iterations == 3


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("skipped", [0, 1, -1, (0, 2)])
def test_skip_hooks_equal_a_shorter_run(models, architecture, skipped):
    model = models[architecture]
    tokens = tiny_tokens(2, 4)
    found = model.run_with_hooks(tokens, fwd_hooks=skip_hooks(model, skipped))
    n_left = 3 - (len(skipped) if isinstance(skipped, tuple) else 1)
    close(found, model(tokens, n_iterations=n_left))


@torch.no_grad()
def test_hooks_go_where_their_iteration_goes(models):
    model = models["huginn"]
    tokens = tiny_tokens(2, 4)
    hooks = [("iter.1.0.hook_attn_out", double), ("coda.1.hook_mlp_out", double)]

    def by_hand(places: list[int], depth: int) -> Tensor:
        placed = [(f"iter.{k}.0.hook_attn_out", double) for k in places]
        placed.append(("coda.1.hook_mlp_out", double))
        return model.run_with_hooks(tokens, fwd_hooks=placed, n_iterations=depth)

    close(run_schedule(model, tokens, [0, 1, 2], hooks), by_hand([1], 3))
    close(run_schedule(model, tokens, [1, 0, 2], hooks), by_hand([0], 3))
    close(run_schedule(model, tokens, [0, 1, 1, 2], hooks), by_hand([1, 2], 4))
    close(run_schedule(model, tokens, [0, 2], hooks), by_hand([], 2))
    between = [("iter.2.hook_state_out", double), ("hook_injection", double)]
    expected = model.run_with_hooks(
        tokens,
        fwd_hooks=[("iter.0.hook_state_out", double), ("hook_injection", double)],
        n_iterations=2,
    )
    close(run_schedule(model, tokens, [-1, 0], between), expected)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@torch.no_grad()
def test_schedule_with_cache(models):
    model = models["ouro"]
    tokens = tiny_tokens(2, 4)
    logits, cache = run_schedule(
        model,
        tokens,
        [0, 0, 1, 2],
        [("iter.0.1.hook_mlp_out", double)],
        return_cache=True,
        names_filter=lambda name: name.endswith(("hook_mlp_out", "hook_state_out")),
    )
    hooks = [(f"iter.{k}.1.hook_mlp_out", double) for k in (0, 1)]
    close(logits, model.run_with_hooks(tokens, fwd_hooks=hooks, n_iterations=4))
    assert "iter.3.hook_state_out" in cache
    assert cache.layout.n_iterations == 4


@torch.no_grad()
def test_traded_states_and_updates(models):
    model = models["ouro"]
    tokens = tiny_tokens(2, 4)
    _, cache = model.run_with_cache(tokens)
    before = {name: value.clone() for name, value in cache.items()}
    out = [cache[f"iter.{t}.hook_state_out"] for t in range(3)]
    into = [cache[f"iter.{t}.hook_state_in"] for t in range(3)]

    # What leaves the last iteration is read out, so state 0 there gives the exit at iteration 0.
    states = model.run_with_hooks(tokens, fwd_hooks=swap_hooks(model, cache, 0, 2))
    close(states, model(tokens, exit_at=0))
    seen: dict[int, Tensor] = {}

    def see(t: int) -> tuple[str, Any]:
        return f"iter.{t}.hook_state_out", lambda value, hook: seen.__setitem__(t, value)

    model.run_with_hooks(
        tokens, fwd_hooks=[*swap_hooks(model, cache, 0, 1, "update"), *map(see, range(3))]
    )
    first = into[0] + (out[1] - into[1])
    close(seen[0], first)
    close(seen[1], first + (out[0] - into[0]))
    # Trading an iteration with itself changes nothing.
    for what in ("state", "update"):
        same = model.run_with_hooks(tokens, fwd_hooks=swap_hooks(model, cache, 1, 1, what))
        close(same, model(tokens))
    assert all(torch.equal(cache[name], value) for name, value in before.items())


def test_bad_orders_are_refused(models):
    model = models["ouro"]
    tokens = tiny_tokens(2, 4)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter="iter.0.hook_state_out")
    with pytest.raises(ValueError, match="empty"):
        run_schedule(model, tokens, [])
    with pytest.raises(IndexError, match="no iteration 3"):
        run_schedule(model, tokens, [0, 3])
    with pytest.raises(ValueError, match="at least one"):
        skip_schedule(model, [0, 1, 2])
    with pytest.raises(ValueError, match="times"):
        repeat_schedule(model, 0, 0)
    with pytest.raises(IndexError):
        swap_schedule(model, 0, 7)
    with pytest.raises(ValueError, match=r"lacks 'iter\.1\.hook_state_out'"):
        swap_hooks(model, cache, 0, 1)
    with pytest.raises(ValueError, match="what must be"):
        swap_hooks(model, cache, 0, 0, "place")
