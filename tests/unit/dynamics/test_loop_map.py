"""The map of an iteration: it is the run's, on every architecture, and differentiable."""

from itertools import pairwise

import pytest
import torch

import tl_loops
from tests.feedforward import only_before_4, plain_model
from tests.models import ARCHITECTURES, MECHANISMS, SIZES, STACKS, tiny_model, tiny_tokens
from tl_loops import LoopedSemanticsError, dynamics
from tl_loops.errors import ArgumentError
from tl_loops.metrics import loop_spectrum

TOKENS = tiny_tokens()[0]
CARRYING = ("act", "recursions", "recursions_sigmoid", "hyperloop")
WHOLE = [n for n in (*ARCHITECTURES, *MECHANISMS, *STACKS) if n not in CARRYING]


def close(found, expected, tolerance=1e-5):
    found, expected = found.detach(), expected.detach()
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("name", WHOLE)
def test_each_map_takes_the_state_to_the_next(name):
    model = tiny_model(name)
    maps = dynamics.loop_maps(model, TOKENS)
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
        states = [step(step.state) for step in maps]
        for after, step in zip(states, maps[1:], strict=False):
            close(after, step.state)
        whole = dynamics.loop_map(model, TOKENS, 0, span=len(maps))
        close(whole(whole.state), states[-1])
    last = f"iter.{len(maps) - 1}.hook_state_out"
    final = states[-1]
    if whole.stacks:
        final = final[whole.stacks.index(model.layout.stacks[-1])]
    close(final, cache[last][0])


@pytest.mark.parametrize("name", [*WHOLE])
def test_a_run_from_the_start_gives_the_same_map(name):
    """With a hook on the model nothing is skipped; numbers and products stay."""
    model = tiny_model(name)
    t = 1 if model.cfg.stacks is None else len(model.cfg.stacks) - 1
    step = dynamics.loop_map(model, TOKENS, t)
    generator = torch.Generator().manual_seed(0)
    state = step.state + 0.1 * torch.randn(step.state.shape, generator=generator)
    v = torch.randn(step.state.shape, generator=generator)
    alone = torch.func.jvp(step, (state,), (v,))
    with model.hooks([("hook_embed", lambda x, hook: None)]):
        whole = torch.func.jvp(step, (state,), (v,))
    for found, expected in zip(alone, whole, strict=True):
        close(found, expected)
    # Forwards and backwards are transposes: <w, J v> = <J^T w, v>.
    w = torch.randn(step.state.shape, generator=generator)
    x = state.clone().requires_grad_()
    (back,) = torch.autograd.grad(step(x), x, w)
    both = float((w * alone[1]).sum()), float((back * v).sum())
    assert both[0] == pytest.approx(both[1], rel=1e-3, abs=1e-3)


def test_products_are_differences():
    model = tiny_model("huginn").double()
    step = dynamics.loop_map(model, TOKENS, 1)
    v = torch.randn(step.state.shape, dtype=torch.float64)
    h = 1e-6
    difference = (step(step.state + h * v) - step(step.state - h * v)) / (2 * h)
    close(torch.func.jvp(step, (step.state,), (v,))[1], difference, 1e-6)


def test_two_stacks_have_a_joint_state():
    model = tiny_model("hrm_text")
    step = dynamics.loop_map(model, TOKENS, 2)  # calls H
    assert step.stacks == ("L", "H") and step.state.shape == (2, 9, SIZES["d_model"])
    after = step(step.state)
    assert torch.equal(after[0], step.state[0])  # L is passed on
    assert not torch.equal(after[1], step.state[1])
    cycle = dynamics.loop_map(model, TOKENS, 0, span=3)
    with torch.no_grad():
        one_by_one = cycle.state
        for t in range(3):
            one_by_one = dynamics.loop_map(model, TOKENS, t)(one_by_one)
        close(cycle(cycle.state), one_by_one)
        close(cycle(cycle.state), dynamics.loop_map(model, TOKENS, 3).state)


def test_some_positions_with_the_others_held():
    model = tiny_model("retrofitted")
    step = dynamics.loop_map(model, TOKENS, 1, pos=[2, -1])
    full = dynamics.loop_map(model, TOKENS, 1)
    assert step.pos == (2, 8) and step.state.shape == (2, SIZES["d_model"])
    close(step(step.state), full(full.state)[[2, 8]])
    moved = full.state.clone()
    moved[[2, 8]] += 1
    close(step(step.state + 1), full(moved)[[2, 8]])
    dense = torch.autograd.functional.jacobian(step, step.state).reshape(64, 64)
    spectrum = loop_spectrum(step, step.state, tolerance=1e-9)
    assert spectrum.spectral_radius == pytest.approx(
        float(torch.linalg.eigvals(dense).abs().max()), rel=1e-3
    )


@pytest.mark.parametrize("name", ["retrofitted", "layer_norm", "parcae", "injected"])
def test_the_injection_is_an_argument(name):
    model = tiny_model(name)
    step = dynamics.loop_map(model, TOKENS, 0)
    assert torch.equal(step(step.state, step.injection), step(step.state))
    e = step.injection + 0.5
    alone = step(step.state, e)
    with model.hooks([("hook_embed", lambda x, hook: None)]):
        close(step(step.state, e), alone)
    assert not torch.allclose(alone, step(step.state))


def test_hooks_of_the_model_are_part_of_the_map():
    model = tiny_model("retrofitted")

    def halve(state, hook):
        return 0.5 * state

    with model.hooks([(lambda name: name.endswith("hook_state_in"), halve)]):
        maps = dynamics.loop_maps(model, TOKENS)
        for step, after in pairwise(maps):
            close(step(step.state), after.state)
        halved = maps[1](maps[1].state)
    close(halved, maps[1](0.5 * maps[1].state))


def test_a_given_and_a_fresh_initial_state():
    model = tiny_model("huginn", state_seed=None)
    start = torch.randn(9, SIZES["d_model"])
    assert torch.equal(dynamics.loop_map(model, TOKENS, 0, initial_state=start).state, start)
    step = dynamics.loop_map(model, TOKENS, 1)  # drawn once, then kept
    with model.hooks([("hook_embed", lambda x, hook: None)]):
        assert torch.equal(step(step.state), step(step.state))


def test_an_exit_in_the_config_changes_no_map():
    plain, leaving = tiny_model("ouro"), tiny_model("ouro", exit_threshold=0.5)
    expected = dynamics.loop_map(plain, TOKENS, -1)
    found = dynamics.loop_map(leaving, TOKENS, -1)
    close(found(found.state), expected(expected.state))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off(context):
    model = tiny_model("retrofitted")
    with context():
        step = dynamics.loop_map(model, TOKENS)
        found = loop_spectrum(step, step.state, tolerance=1e-2).spectral_radius
    again = loop_spectrum(step, step.state, tolerance=1e-2).spectral_radius
    assert found == pytest.approx(again, rel=1e-5)


@only_before_4
@pytest.mark.parametrize("repeats", [{2: 3}, {1: 2, 3: 2}])
def test_looped_feedforward_models(repeats):
    plain = plain_model(
        n_layers=4, d_model=16, d_head=4, n_heads=4, n_ctx=32, d_vocab=50, act_fn="gelu", seed=0
    )
    model = tl_loops.loop(plain, repeats=repeats)
    maps = dynamics.loop_maps(model, TOKENS)
    with torch.no_grad():
        for step, after in pairwise(maps):
            close(step(step.state), after.state)


@pytest.mark.parametrize("name", CARRYING)
def test_a_loop_that_carries_more_is_refused(name):
    with pytest.raises(LoopedSemanticsError, match="carries more than its state"):
        dynamics.loop_map(tiny_model(name), TOKENS)


def test_bad_arguments():
    model = tiny_model("ouro")
    step = dynamics.loop_map(model, TOKENS)
    assert repr(step) == "ModelLoopMap(iteration 3 of [9, 32])"
    for call, error, message in (
        (lambda: dynamics.loop_map(model, TOKENS, 4), IndexError, "no iteration 4"),
        (lambda: dynamics.loop_map(model, TOKENS, 3, span=2), ValueError, "span=2 does not fit"),
        (lambda: dynamics.loop_map(model, TOKENS, pos=9), IndexError, "no position 9"),
        (lambda: dynamics.loop_map(model, "text"), ValueError, "tokenizer"),
        (lambda: step(step.state[:2]), ValueError, r"state must have shape \[9, 32\]"),
        (lambda: step(step.state, step.state), ValueError, "injects nothing"),
        (lambda: dynamics.loop_map(torch.nn.Linear(1, 1), TOKENS), ArgumentError, "no loop layout"),
    ):
        with pytest.raises(error, match=message):
            call()
    injected = dynamics.loop_map(tiny_model("retrofitted"), TOKENS)
    with pytest.raises(ValueError, match="injection must have shape"):
        injected(injected.state, injected.state[:2])
