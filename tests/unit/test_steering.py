"""Steering: directions at chosen iterations, their differences, and grids of effects."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.closeness import assert_close
from tests.models import padded_tokens, tiny_model, tiny_tokens
from tl_loops.steering import (
    ablate_direction,
    difference_directions,
    steer,
    steering_effect,
)

torch.set_num_threads(1)
D_MODEL = 32


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("retrofitted")  # (1, 2⊗3, 1)_I


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -2, 5]).mean()


def close(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


def adding(vector: Tensor, positions: Any = slice(None)) -> Any:
    def hook(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, positions] += vector
        return value

    return hook


@torch.no_grad()
def test_one_direction_at_chosen_places(model):
    tokens, direction = tiny_tokens(2, 4), draw(D_MODEL)
    found = model.run_with_hooks(
        tokens,
        fwd_hooks=steer(
            model, direction, "resid_mid", iterations=[0, -1], layers=1, positions=-2, scale=3
        ),
    )
    names = ["iter.0.1.hook_resid_mid", "iter.2.1.hook_resid_mid"]
    expected = model.run_with_hooks(
        tokens, fwd_hooks=[(name, adding(3 * direction, [-2])) for name in names]
    )
    close(found, expected)
    assert (found - model(tokens)).abs().max() > 1e-2


@torch.no_grad()
def test_loop_specific_directions(model):
    tokens, rows = tiny_tokens(2, 4), draw(3, D_MODEL)
    between = model.run_with_hooks(tokens, fwd_hooks=steer(model, rows, "state_out"))
    expected = model.run_with_hooks(
        tokens, fwd_hooks=[(f"iter.{t}.hook_state_out", adding(rows[t])) for t in range(3)]
    )
    close(between, expected)
    chosen = model.run_with_hooks(tokens, fwd_hooks=steer(model, rows[:2], iterations=[2, 0]))
    hooks = [
        (f"iter.{t}.{i}.hook_resid_post", adding(row))
        for t, row in zip((2, 0), rows[:2], strict=True)
        for i in (0, 1)
    ]
    close(chosen, model.run_with_hooks(tokens, fwd_hooks=hooks))
    every = draw(3, 2, D_MODEL, seed=1)
    by_layer = model.run_with_hooks(tokens, fwd_hooks=steer(model, every, "attn_out"))
    hooks = [
        (f"iter.{t}.{i}.hook_attn_out", adding(every[t, i])) for t in range(3) for i in range(2)
    ]
    close(by_layer, model.run_with_hooks(tokens, fwd_hooks=hooks))


@torch.no_grad()
def test_steering_leaves_caches_alone(model):
    tokens = tiny_tokens(2, 4)
    _, before = model.run_with_cache(tokens)
    with model.hooks(fwd_hooks=steer(model, draw(D_MODEL), "resid_pre", iterations=1)):
        _, after = model.run_with_cache(tokens)
    # The stream in front of the first steered place is what it was.
    close(after["iter.0.hook_state_out"], before["iter.0.hook_state_out"])
    close(after["iter.1.hook_injected"], before["iter.1.hook_injected"])
    close(
        after["iter.1.0.hook_resid_pre"],
        before["iter.1.0.hook_resid_pre"] + draw(D_MODEL),
    )


@torch.no_grad()
def test_steering_while_generating(model):
    tokens, direction = tiny_tokens(1, 4), draw(D_MODEL, seed=2)
    hooks = steer(model, direction, "resid_post", layers=0, scale=4.0)
    arguments: Any = dict(max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
    with model.hooks(fwd_hooks=hooks):
        cached = model.generate(tokens, **arguments)
        full = model.generate(tokens, use_past_kv_cache=False, **arguments)
    assert torch.equal(cached, full)


@torch.no_grad()
def test_directional_ablation(model):
    tokens, direction = tiny_tokens(2, 4), draw(3, D_MODEL)
    hooks = ablate_direction(model, 7 * direction, "state_out")
    with model.hooks(fwd_hooks=hooks):
        logits, cache = model.run_with_cache(tokens)
    for t in range(3):
        state = cache[f"iter.{t}.hook_state_out"]
        inner, size = state @ direction[t], state.abs() @ direction[t].abs()
        assert (inner.abs() <= 1e-6 * size).all()  # of what was added up
    assert (logits - model(tokens)).abs().max() > 1e-2
    # Projecting out twice is projecting out once.
    twice = model.run_with_hooks(tokens, fwd_hooks=[*hooks, *hooks])
    close(twice, logits)
    with pytest.raises(ValueError, match="is zero"):
        ablate_direction(model, torch.zeros(D_MODEL))


@torch.no_grad()
def test_difference_directions(model):
    _, positive = model.run_with_cache(tiny_tokens(3, 4))
    _, negative = model.run_with_cache(tiny_tokens(2, 4, seed=9))
    found = difference_directions(model, positive, negative, "resid_post", layer=1)
    assert found.shape == (3, D_MODEL)
    for t in range(3):
        name = f"iter.{t}.1.hook_resid_post"
        close(found[t], positive[name][:, -1].mean(0) - negative[name][:, -1].mean(0))
    every = difference_directions(model, positive, negative, pos=None)
    assert every.shape == (3, 2, D_MODEL)
    name = "iter.2.0.hook_resid_post"
    close(every[2, 0], positive[name].mean((0, 1)) - negative[name].mean((0, 1)))
    unit = difference_directions(model, positive, negative, "state_in", pos=[1, 2], normalize=True)
    close(torch.linalg.vector_norm(unit[1:], dim=-1), torch.ones(2))
    # A run with the difference added has the other prompts' mean state there.
    halves = difference_directions(
        model,
        {name: value.bfloat16() for name, value in positive.items()},
        {name: value.bfloat16() for name, value in negative.items()},
        "resid_post",
        layer=1,
    )
    assert halves.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_averages_over_prompts_of_several_lengths_leave_padding_out(model, side):
    name, caches, real = "iter.1.1.hook_resid_post", [], []
    for lengths in ((5, 3, 2), (6, 2)):
        tokens, mask = padded_tokens(lengths, side)
        caches.append(model.run_with_cache(tokens, attention_mask=mask)[1])
        rows = zip(caches[-1][name], mask.bool(), strict=True)
        real.append([row[kept] for row, kept in rows])  # [pos, d_model] of each prompt

    def expected(chosen, first=0):
        plus, minus = (torch.cat([chosen(row) for row in rows[first:]]).mean(0) for rows in real)
        return plus - minus

    last, every = expected(lambda row: row[-1:]), expected(lambda row: row)
    close(difference_directions(model, *caches, layer=1)[1], last)
    close(difference_directions(model, *caches, layer=1, pos=None)[1], every)
    second = expected(lambda row: row[1:2])
    close(difference_directions(model, *caches, layer=1, pos=1)[1], second)
    # Rows of a cache keep their padding; a padded mean would be another.
    rows = [cache.apply_slice_to_batch_dim(slice(1, None)) for cache in caches]
    close(difference_directions(model, *rows, layer=1)[1], expected(lambda row: row[-1:], 1))
    counted = caches[0][name][:, -1].mean(0) - caches[1][name][:, -1].mean(0)
    assert (side == "left") == torch.allclose(counted, last, atol=1e-4)
    with pytest.raises(IndexError, match="2"):
        difference_directions(model, *caches, layer=1, pos=2)


@torch.no_grad()
@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("batch_size", [3, None])
def test_grids_of_effects(model, specific, batch_size):
    tokens = tiny_tokens(2, 4)
    direction = draw(3, D_MODEL) if specific else draw(D_MODEL)
    found = steering_effect(
        model,
        tokens,
        metric,
        direction,
        "resid_post",
        ("iteration", "pos"),
        scales=[0.0, 2],
        batch_size=batch_size,
        progress=False,
    )
    assert found.shape == (2, 3, 4)
    close(found[0], metric(model(tokens)).expand(3, 4))
    for t in range(3):
        for pos in range(4):
            vector = 2 * (direction[t] if specific else direction)
            hooks = [(f"iter.{t}.{i}.hook_resid_post", adding(vector, pos)) for i in (0, 1)]
            close(found[1, t, pos], metric(model.run_with_hooks(tokens, fwd_hooks=hooks)))
    between = steering_effect(
        model, tokens, metric, direction, "injected", ("iteration",), window=2, progress=False
    )
    hooks = [
        (f"iter.{t}.hook_injected", adding(direction[t] if specific else direction)) for t in (1, 2)
    ]
    close(between[1], metric(model.run_with_hooks(tokens, fwd_hooks=hooks)))


@torch.no_grad()
def test_bad_steering_is_refused(model):
    direction, tokens = draw(D_MODEL), tiny_tokens(2, 4)
    with pytest.raises(ValueError, match="direction must be"):
        steer(model, draw(2, D_MODEL))
    with pytest.raises(ValueError, match="direction must be"):
        steer(model, draw(5))
    with pytest.raises(IndexError, match="no iteration 3"):
        steer(model, direction, iterations=3)
    with pytest.raises(ValueError, match="no layers"):
        steer(model, direction, "state_out", layers=0)
    for name in ("pattern", "z", "post", "ln1.hook_normalized"):
        with pytest.raises(ValueError, match="residual stream"):
            steer(model, direction, name)
    with pytest.raises(ValueError, match=r"no row for blocks\.0"):
        steering_effect(model, tokens, metric, draw(3, D_MODEL), axes=("block",))
    with pytest.raises(ValueError, match="direction must be"):
        steering_effect(model, tokens, metric, draw(2, D_MODEL))
    with pytest.raises(ValueError, match="scalar"):
        steering_effect(model, tokens, lambda x: x, direction)
