"""The random initial state: a function of seed and position, with the published distribution."""

import math

import pytest
import torch

from tests.closeness import assert_close
from tests.models import tiny_config, tiny_model, tiny_tokens
from tl_loops.mechanisms.initial_state import InitialState, example_phase

TOKENS = tiny_tokens()


def state(model, tokens, **kwargs):
    _, cache = model.run_with_cache(tokens, names_filter="hook_initial_state", **kwargs)
    return cache["hook_initial_state"]


def test_two_runs_and_two_prompts_share_it():
    model = tiny_model("huginn")
    assert torch.equal(state(model, TOKENS), state(model, TOKENS))
    assert torch.equal(state(model, TOKENS), state(model, tiny_tokens(seed=8)))
    assert torch.equal(state(tiny_model("huginn"), TOKENS), state(model, TOKENS))


def test_it_depends_on_the_position_alone():
    model = tiny_model("huginn")
    long = state(model, tiny_tokens(3, 30))
    for length in (1, 2, 9, 17):
        fresh = tiny_model("huginn")
        assert torch.equal(state(fresh, tiny_tokens(1, length))[0], long[0, :length])
    assert torch.equal(long[0], long[2])
    assert len({tuple(row) for row in long[0, :, :3].tolist()}) == 30


def test_left_padding_moves_it_along():
    model = tiny_model("huginn")
    padded = torch.cat([TOKENS[:, :4], TOKENS], dim=1)
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    shifted = state(model, padded, attention_mask=mask)
    assert torch.equal(shifted[0, 4:], state(model, TOKENS)[0])


def test_seeds_differ_and_none_draws_afresh():
    one, two = tiny_model("huginn", state_seed=1), tiny_model("huginn", state_seed=2)
    assert not torch.allclose(state(one, TOKENS), state(two, TOKENS))
    fresh = tiny_model("huginn", state_seed=None)
    assert not torch.allclose(state(fresh, TOKENS), state(fresh, TOKENS))
    torch.manual_seed(4)
    drawn = state(fresh, TOKENS)
    torch.manual_seed(4)
    assert torch.equal(state(fresh, TOKENS), drawn)


def test_a_fixed_seed_leaves_the_global_generator_alone():
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    state(tiny_model("huginn"), TOKENS)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("seed", [0, None])
def test_it_is_a_normal_cut_at_three_standard_deviations(seed):
    cfg = tiny_config("huginn", d_model=64, d_head=16, initial_state_std=0.5, state_seed=seed)
    torch.manual_seed(0)
    n = 2000
    drawn = InitialState(cfg, cfg.initial_state)(torch.zeros(1, n, 64), torch.arange(n)[None])
    assert drawn.abs().max() <= 1.5
    assert drawn.mean().abs() < 5 * 0.5 / math.sqrt(n * 64)
    # Variance of a standard normal cut at ±c: 1 - 2 c φ(c) / (2 Φ(c) - 1).
    c = 3.0
    phi = math.exp(-c * c / 2) / math.sqrt(2 * math.pi)
    variance = 0.25 * (1 - 2 * c * phi / math.erf(c / math.sqrt(2)))
    assert float(drawn.var()) == pytest.approx(variance, rel=0.02)


def test_inference_mode_first_does_not_spoil_gradients_later():
    model = tiny_model("huginn")
    with torch.inference_mode():
        inside = model(TOKENS)
    loss = model(TOKENS, return_type="loss")
    loss.backward()
    assert_close(inside.clone(), model(TOKENS))


@pytest.mark.parametrize(("rule", "expected"), [("zeros", 0.0), ("embed", None)])
def test_the_other_rules(rule, expected):
    model = tiny_model("retrofitted", initial_state=rule)
    _, cache = model.run_with_cache(TOKENS)
    reference = cache["hook_injection"] if expected is None else torch.zeros(())
    assert torch.equal(cache["hook_initial_state"], reference.expand(2, 9, 32))
    learned = tiny_model("retrofitted", initial_state="learned")
    assert torch.equal(state(learned, TOKENS)[1, 3], learned.initial_state.state)


def hashed(n_pos, d_model, phase):
    """The published hash, one number at a time where float32 is exact, the sine by torch."""
    i = torch.arange(d_model, dtype=torch.float32)
    rows = []
    for p in range(n_pos):
        x = i * torch.tensor(0.013579) + torch.tensor(float(p)) * torch.tensor(0.021713)
        x = (x + torch.tensor(phase)) + torch.tensor(0.123457)
        u = torch.sin(x) * torch.tensor(43758.5453123)
        u = (u - torch.floor(u)).clamp(1e-6, 1 - 1e-6)
        rows.append(torch.erfinv(u * 2 - 1))
    return torch.stack(rows) * math.sqrt(2)


def test_the_hashed_state_is_the_published_hash_of_channel_and_position():
    for phase in (0.0, 1.25):
        model = tiny_model("huginn", initial_state="hashed_normal", state_phase=phase)
        found = state(model, TOKENS)
        assert torch.equal(found[0], found[1])
        assert_close(found[0] / 0.6, hashed(9, 32, phase), rtol=1e-5, atol=1e-5)
        assert torch.equal(state(model, TOKENS[:1, :4])[0], found[0, :4])
    padded = torch.cat([TOKENS[:, :4], TOKENS], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    assert torch.equal(state(model, padded, attention_mask=mask)[:, 4:], found)


def test_the_hashed_state_is_close_to_normal():
    cfg = tiny_config(
        "huginn", d_model=256, d_head=64, initial_state="hashed_normal", initial_state_std=0.5
    )
    n = 500
    drawn = InitialState(cfg, cfg.initial_state)(torch.zeros(1, n, 256), torch.arange(n)[None])
    assert drawn.mean().abs() < 0.01
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.02)
    # Quarters of a normal distribution.
    for share, quantile in ((0.25, -0.67449), (0.5, 0.0), (0.75, 0.67449)):
        assert float((drawn < 0.5 * quantile).float().mean()) == pytest.approx(share, abs=0.01)


def test_examples_of_the_published_evaluation_have_phases_of_their_own():
    assert example_phase(0, seed=0) == 0.0
    turn = 2 * math.pi / 16_777_213
    assert example_phase(0) == pytest.approx(42 * 130_363 % 16_777_213 * turn, rel=1e-6)
    assert example_phase(5, 1) == pytest.approx((5 * 104_729 + 130_363) * turn, rel=1e-6)
    phases = [example_phase(i) for i in range(50)]
    assert len(set(phases)) == 50 and all(0 <= phase < 2 * math.pi for phase in phases)
    assert example_phase(16_777_213) == example_phase(0)
