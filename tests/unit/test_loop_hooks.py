"""Names and filters by coordinate for plain run_with_hooks and run_with_cache."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models import tiny_model, tiny_tokens
from tl_loops.layout.coordinate import BlockCoordinate
from tl_loops.loop_hooks import (
    at,
    coordinate_of,
    every_block,
    every_iteration,
    hooks_at,
    names_filter,
    stack_iterations,
    with_coordinate,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("huginn")  # (2, 2⊗3, 2)_I


def test_at(model):
    assert at(model, "pattern", iteration=1, layer=0) == "blocks.4.attn.hook_pattern"
    assert at(model, "resid_post", iteration=-1, layer=-1) == "blocks.7.hook_resid_post"
    assert at(model, "resid_pre", phase="coda", layer=1) == "blocks.9.hook_resid_pre"
    assert at(model, "ln1.hook_scale", phase="prelude", layer=0) == "blocks.0.ln1.hook_scale"
    assert at(model, "state_out", iteration=2) == "iter.2.hook_state_out"
    with pytest.raises(ValueError, match="did you mean"):
        at(model, "patern", iteration=0, layer=0)
    with pytest.raises(ValueError, match=r"no hook point 'iter\.0\.hook_exit_gate'"):
        at(model, "exit_gate", iteration=0)
    with pytest.raises(IndexError, match="no iteration 3"):
        at(model, "state_out", iteration=3)
    with pytest.raises(ValueError, match="layer="):
        at(model, "z", iteration=0)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_at_is_the_inverse_of_the_coordinate(model, data):
    phase = data.draw(st.sampled_from(["prelude", "core", "coda"]))
    layer = data.draw(st.integers(0, 1))
    iteration = data.draw(st.integers(0, 2)) if phase == "core" else None
    name = at(model, "z", phase=phase, layer=layer, iteration=iteration)
    assert coordinate_of(model, name) == BlockCoordinate(phase, iteration, layer)
    assert coordinate_of(model, model.layout.alias(name)) == BlockCoordinate(
        phase, iteration, layer
    )


def test_every_iteration_and_block(model):
    assert every_iteration(model, "z", 0) == [f"blocks.{i}.attn.hook_z" for i in (2, 4, 6)]
    assert every_iteration(model, "z") == [f"blocks.{i}.attn.hook_z" for i in range(2, 8)]
    assert every_iteration(model, "state_in", iterations=[2, 0]) == [
        "iter.2.hook_state_in",
        "iter.0.hook_state_in",
    ]
    assert every_iteration(model, "mlp_out", [1, 0], -1) == [
        "blocks.7.hook_mlp_out",
        "blocks.6.hook_mlp_out",
    ]
    assert every_block(model, "resid_mid") == [f"blocks.{i}.hook_resid_mid" for i in range(10)]
    assert every_block(model, "q", "coda") == ["blocks.8.attn.hook_q", "blocks.9.attn.hook_q"]
    with pytest.raises(ValueError, match="no layers"):
        every_iteration(model, "hook_state_out", layer=1)
    with pytest.raises(ValueError, match="phase"):
        every_block(model, "q", "middle")


def cached(model: Any, **arguments: Any) -> set[str]:
    with torch.no_grad():
        chosen = names_filter(model, **arguments)
        _, cache = model.run_with_cache(tiny_tokens(1, 3), names_filter=chosen)
    return set(cache.keys())


def test_names_filter(model):
    assert cached(model, names="z") == set(every_block(model, "z"))
    assert cached(model, names=["z", "state_out"], iterations=[0, -1], layers=1) == {
        "blocks.3.attn.hook_z",
        "blocks.7.attn.hook_z",
        "iter.0.hook_state_out",
        "iter.2.hook_state_out",
    }
    assert cached(model, names=["resid_pre", "injection"], phases=["prelude", "coda"]) == {
        *(f"blocks.{i}.hook_resid_pre" for i in (0, 1, 8, 9)),
        "hook_injection",
    }
    assert cached(model, names="hook_initial_state") == {"hook_initial_state"}
    with pytest.raises(IndexError, match="no phase of prelude, core, coda has a layer 2"):
        names_filter(model, "z", layers=2)
    with pytest.raises(IndexError, match="iteration"):
        names_filter(model, "z", iterations=3)
    with pytest.raises(ValueError, match="unknown activation"):
        names_filter(model, "zz")
    with pytest.raises(ValueError, match="phases are"):
        names_filter(model, "z", phases="middle")


def test_layers_of_phases_of_different_depth():
    model = tiny_model("retrofitted")  # (1, 2⊗3, 1)_I
    kept = names_filter(model, "resid_pre", layers=1)
    names = [name for name in model.hook_dict if kept(name)]
    assert names == [f"blocks.{i}.hook_resid_pre" for i in (2, 4, 6)]


def test_hooks_in_a_plain_run(model):
    tokens = tiny_tokens(2, 4)
    seen: list[tuple[Any, Any]] = []

    def look(value: Tensor, hook: Any, at: BlockCoordinate | None) -> None:
        seen.append((hook.name, at))

    def zero_odd_iterations(value: Tensor, hook: Any, at: BlockCoordinate) -> Tensor:
        return torch.zeros_like(value) if at.iteration in (1,) else value

    names = ["ln_final.hook_scale", *every_iteration(model, "state_out")]
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=hooks_at(names, with_coordinate(model, look)))
        found = model.run_with_hooks(
            tokens,
            fwd_hooks=hooks_at(
                every_iteration(model, "attn_out"), with_coordinate(model, zero_odd_iterations)
            ),
        )
        expected = model.run_with_hooks(
            tokens,
            fwd_hooks=[
                (f"iter.1.{i}.hook_attn_out", lambda v, hook: torch.zeros_like(v)) for i in (0, 1)
            ],
        )
    assert seen[:3] == [
        (f"iter.{t}.hook_state_out", BlockCoordinate("core", t, -1)) for t in range(3)
    ]
    assert ("ln_final.hook_scale", None) in seen
    assert torch.equal(found, expected)
    single = hooks_at("iter.0.hook_state_in", look)
    assert single == [("iter.0.hook_state_in", look)]


def test_stack_iterations(model):
    with torch.no_grad():
        _, cache = model.run_with_cache(tiny_tokens(2, 4))
    states = stack_iterations(cache, model, "state_out")
    assert states.shape == (3, 2, 4, 32)
    assert torch.equal(states[1], cache["iter.1.hook_state_out"])
    patterns = stack_iterations(cache, model, "pattern")
    assert patterns.shape == (3, 2, 2, 4, 4, 4)
    assert torch.equal(patterns[2, 1], cache["pattern", 7])
    assert torch.equal(stack_iterations(cache, model, "pattern", 1), patterns[:, 1])


def test_plain_models_are_refused():
    class Plain:
        layout = None

    with pytest.raises(ValueError, match="has no loop"):
        at(Plain(), "z", layer=0)
