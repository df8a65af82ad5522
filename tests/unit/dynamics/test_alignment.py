"""Streamed kernel alignment is that of all tokens at once."""

import math

import pytest
import torch

from tests.feedforward import plain_model
from tests.models import tiny_model, tiny_tokens
from tl_loops import dynamics
from tl_loops.dynamics import alignment as alignment_module
from tl_loops.dynamics import kernel_alignment
from tl_loops.metrics import linear_cka

PROMPTS = [tiny_tokens(1, n, seed=n)[0] for n in (9, 5, 9, 7, 5, 8)]


def states(model, name):
    """[token, d_model] of each place that a cache holds under a name, all prompts together."""
    found = {}
    with torch.no_grad():
        for tokens in PROMPTS:
            _, cache = model.run_with_cache(tokens[None])
            for key, value in cache.items():
                if key.endswith(name):
                    found.setdefault(key, []).append(value[0])
    return [torch.cat(rows) for rows in found.values()]


@pytest.mark.parametrize("name", ["retrofitted", "hrm_text", "act"])
def test_between_iterations(name):
    model = tiny_model(name)
    found = kernel_alignment(model, PROMPTS, batch_size=2)
    every = states(model, "hook_state_out")
    expected = torch.tensor([[linear_cka(x, y) for y in every] for x in every])
    torch.testing.assert_close(found.matrix.float(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.matrix, found.matrix.T)
    torch.testing.assert_close(found.matrix.diagonal(), torch.ones(len(every)).double())
    assert found.rows == found.columns == tuple(f"t{t}" for t in range(len(every)))
    assert found.n_tokens == sum(map(len, PROMPTS))
    assert list(found.to_frame().columns) == list(found.rows)
    other = kernel_alignment(model, PROMPTS[::-1], batch_size=100)
    torch.testing.assert_close(other.matrix, found.matrix)


def test_a_large_mean_loses_no_digits():
    """Centring is exact also where the mean is a million times the deviation."""
    model = tiny_model("retrofitted").double()
    plain = kernel_alignment(model, PROMPTS)

    def shift(state, hook):
        return state + 1e6

    last = f"iter.{model.cfg.n_iterations - 1}.hook_state_out"
    with model.hooks([(last, shift)]):
        moved = kernel_alignment(model, PROMPTS)
    torch.testing.assert_close(moved.matrix, plain.matrix, rtol=0, atol=1e-6)


def test_blocks_some_of_them_and_other_activations():
    model = tiny_model("huginn")
    found = kernel_alignment(
        model, PROMPTS, activation="mlp_out", where=[0, -1], n_iterations=5, batch_size=3
    )
    assert found.rows == ("p0", "c1") and found.matrix.shape == (2, 2)
    with model.iterations(5):
        every = states(model, "hook_mlp_out")
    assert float(found.matrix[0, 1]) == pytest.approx(linear_cka(every[0], every[-1]), abs=1e-5)


def test_against_a_feedforward_model():
    model = tiny_model("retrofitted")
    plain = plain_model(
        n_layers=2, d_model=16, d_head=4, n_heads=4, n_ctx=64, d_vocab=50, act_fn="gelu", seed=0
    )
    found = kernel_alignment(model, PROMPTS, plain)
    x, y = states(model, "hook_state_out"), states(plain, "hook_resid_post")
    expected = torch.tensor([[linear_cka(a, b) for b in y] for a in x])
    torch.testing.assert_close(found.matrix.float(), expected, rtol=0, atol=1e-5)
    assert found.columns == ("0", "1") and found.rows == ("t0", "t1", "t2")
    back = kernel_alignment(plain, PROMPTS, model, batch_size=1)
    torch.testing.assert_close(back.matrix, found.matrix.T)
    alone = kernel_alignment(plain, PROMPTS)
    assert alone.rows == ("0", "1")


def test_what_does_not_vary_has_none():
    model = tiny_model("retrofitted")
    with model.hooks([("iter.0.hook_state_out", lambda state, hook: torch.ones_like(state))]):
        found = kernel_alignment(model, PROMPTS)
    assert math.isnan(found.matrix[0, 0]) and math.isnan(found.matrix[0, 2])
    assert float(found.matrix[1, 1]) == pytest.approx(1.0)


def test_bad_input(monkeypatch):
    model = tiny_model("retrofitted")
    for arguments, error, message in (
        (dict(activation="z"), ValueError, r"is not \[batch, pos, width\]"),
        (dict(activation="pattern"), ValueError, r"is not \[batch, pos, width\]"),
        (dict(activation="resid_pots"), ValueError, "did you mean"),
        (dict(where=7), IndexError, "no iteration 7"),
        (dict(batch_size=0), ValueError, "batch_size"),
    ):
        with pytest.raises(error, match=message):
            dynamics.kernel_alignment(model, PROMPTS, **arguments)
    monkeypatch.setattr(alignment_module, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="choose fewer points with where="):
        kernel_alignment(model, PROMPTS)
    assert not any(point._forward_hooks for point in model.hook_dict.values())
