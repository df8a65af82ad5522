"""Coordinates and names are two views of one thing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops import BlockCoordinate, LoopLayout
from tl_loops.layout.names import activation_name
from tl_loops.layout.segments import Segment

HUGINN = LoopLayout(n_prelude=2, n_core=4, n_coda=2, n_iterations=8)

layouts = st.builds(
    LoopLayout,
    n_prelude=st.integers(0, 4),
    n_core=st.integers(1, 4),
    n_coda=st.integers(0, 4),
    n_iterations=st.integers(1, 9),
)


def test_the_contract_example():
    assert HUGINN.index(iteration=3, layer=0) == 14
    assert HUGINN.coordinate(14) == BlockCoordinate("core", 3, 0)
    assert HUGINN.hook_name("pattern", iteration=3, layer=0) == "blocks.14.attn.hook_pattern"
    assert HUGINN.hook_name("state_out", iteration=3) == "iter.3.hook_state_out"
    assert HUGINN.hook_name("ln1.hook_scale", phase="coda", layer=1) == "blocks.35.ln1.hook_scale"
    assert HUGINN.index(phase="coda", layer=1) == 35
    assert (HUGINN.label(0), HUGINN.label(14), HUGINN.label(35)) == ("p0", "r3.0", "c1")
    assert HUGINN.notation(injected=True) == "(2, 4⊗8, 2)_I"
    assert LoopLayout(0, 24, 0, 4).notation(injected=False) == "(0, 24⊗4, 0)"
    assert (HUGINN.n_layers, HUGINN.n_physical_layers) == (36, 8)


def test_notation_of_repeated_layers_and_of_several_loops():
    repeated = LoopLayout(0, 4, 1, n_iterations=8, layer_repeats=2)
    assert repeated.notation(injected=False) == "(0, (2⊗2)⊗8, 1)"
    assert LoopLayout(1, 2, 1, n_iterations=1).notation(injected=False) == "(1, 2⊗1, 1)"
    segments = [Segment(2, 4, 3), Segment(4, 5), Segment(5, 6, 2)]
    several = LoopLayout.of_segments(segments, n_coda=4)
    assert several.notation(injected=True) == "(2, 2⊗3, 1, 1⊗2, 4)_I"


@settings(deadline=None)
@given(layouts)
def test_index_inverts_coordinate(layout: LoopLayout):
    for index, at in enumerate(layout.coordinates()):
        assert layout.index(iteration=at.iteration, layer=at.layer, phase=at.phase) == index


@settings(deadline=None)
@given(layouts)
def test_alias_inverts_canonical_name(layout: LoopLayout):
    for index in range(layout.n_layers):
        name = f"blocks.{index}.attn.hook_q"
        assert layout.canonical_name(layout.alias(name)) == name
    assert len({layout.alias(f"blocks.{i}.x") for i in range(layout.n_layers)}) == layout.n_layers


@settings(deadline=None)
@given(layouts, st.integers(1, 6))
def test_by_iteration_puts_layer_l_of_iteration_t_at_t_l(layout: LoopLayout, width: int):
    values = torch.arange(layout.n_layers * width).reshape(layout.n_layers, width)
    grid = layout.by_iteration(values)
    assert grid.shape == (layout.n_iterations, layout.n_core, width)
    for t in range(layout.n_iterations):
        for layer in range(layout.n_core):
            assert torch.equal(grid[t, layer], values[layout.index(iteration=t, layer=layer)])


@settings(deadline=None)
@given(layouts, st.integers(1, 9))
def test_iterations_add_no_physical_layer(layout: LoopLayout, n_iterations: int):
    other = layout.with_iterations(n_iterations)
    assert other.physical_names() == layout.physical_names()
    assert other.n_physical_layers == len(other.physical_names())


def test_by_iteration_wants_one_entry_a_block():
    with pytest.raises(ValueError, match=r"needs \[36, \.\.\.\].*got \(35, 2\)"):
        HUGINN.by_iteration(torch.zeros(35, 2))


def test_stacks_name_the_call():
    layout = LoopLayout(0, 2, 0, 4, stacks=("L", "L", "L", "H"))
    assert layout.coordinate(6) == BlockCoordinate("core", 3, 0, "H")
    assert layout.physical_name(7) == "core.H.1"
    assert layout.n_physical_layers == 4
    with pytest.raises(ValueError, match="stacks names 4 calls"):
        LoopLayout(0, 2, 0, 3, stacks=("L", "L", "L", "H"))


@pytest.mark.parametrize(
    "call",
    [
        lambda: HUGINN.index(iteration=8, layer=0),
        lambda: HUGINN.index(iteration=0, layer=4),
        lambda: HUGINN.index(phase="coda", layer=2),
        lambda: HUGINN.coordinate(36),
        lambda: HUGINN.canonical_name("iter.8.0.hook_resid_pre"),
        lambda: HUGINN.canonical_name("iter.8.hook_state_out"),
        lambda: HUGINN.canonical_name("prelude.2.hook_resid_pre"),
    ],
)
def test_out_of_range_is_refused(call):
    with pytest.raises(IndexError, match="counted from 0"):
        call()


def test_a_hook_name_out_of_range_is_named():
    with pytest.raises(IndexError, match=r"'iter.1.4.hook_z': there is no layer of the core 4: "):
        HUGINN.canonical_name("iter.1.4.hook_z")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HUGINN.index(layer=0), "needs iteration="),
        (lambda: HUGINN.index(phase="core", layer=0), "a core block needs iteration"),
        (lambda: HUGINN.index(phase="coda", iteration=1, layer=0), "the coda has no iterations"),
        (lambda: HUGINN.index(phase="middle", layer=0), "phase must be one of"),
        (lambda: HUGINN.hook_name("pattern", iteration=1), "give layer="),
        (lambda: HUGINN.hook_name("state_out"), "give iteration="),
        (lambda: activation_name("patern"), "did you mean pattern"),
        (lambda: LoopLayout(0, 0, 0, 1), "n_core must be at least 1"),
        (lambda: LoopLayout(0, 1, 0, 0), "n_iterations must be at least 1"),
        (lambda: LoopLayout(-1, 1, 0, 1), "n_prelude must be at least 0"),
    ],
)
def test_incomplete_coordinates_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_blocks_at_which_iterations_begin_and_end():
    for layout in (LoopLayout(1, 2, 2, n_iterations=3), LoopLayout(0, 1, 0, n_iterations=4)):
        for index, at in enumerate(layout.coordinates()):
            first = at.iteration if at.phase == "core" and at.layer == 0 else None
            last = at.phase == "core" and at.layer == layout.n_core - 1
            assert layout.begins_at(index) == first
            assert layout.ends_at(index) == (at.iteration if last else None)
            begun = sum(layout.begins_at(i) is not None for i in range(index))
            assert layout.next_iteration(index) == begun
