"""Odd arguments of every public tool give the right numbers, or one clear error of ours."""

import dataclasses
import os
import traceback
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor

import tl_loops
from tests.fuzz.calls import CALLS
from tests.fuzz.kinds import arguments_of
from tests.fuzz.loop_calls import score
from tests.fuzz.public_names import (
    ELSEWHERE,
    METHODS,
    NOT_HERE,
    OF_THE_PACKAGE,
    ROOMS,
    public_functions,
)
from tests.fuzz.test_arguments import raised_here
from tests.fuzz.world import World, world
from tests.type_checks import by_beartype
from tl_loops import patching, steering, training
from tl_loops.drawing.views import CircuitsView
from tl_loops.errors import LoopedSemanticsError

CLEAR = (
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    LoopedSemanticsError,
    OSError,
    # As their docstrings say, of what a Jacobian holds or a series does.
    FloatingPointError,
    RuntimeError,
)
FULL = "FUZZ_EXAMPLES" in os.environ
"""Every call by ``make fuzz``; otherwise some calls of some functions of every room."""


@pytest.fixture(autouse=True)
def unchecked():
    """As users run it: without the checks of types that the other tests run with."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_no_annotation_is_checked_here():
    @by_beartype
    def twice(n: int) -> int:
        return 2 * n

    assert twice("a") == "aa"
    jaxtyping.config.update("jaxtyping_disable", False)
    with pytest.raises(jaxtyping.TypeCheckError):
        twice("a")


def numbers(result: Any) -> Iterator[np.ndarray]:
    """Every number of a result, in its order."""
    if isinstance(result, Tensor):
        yield result.detach().double().numpy()
    elif isinstance(result, (bool, int, float, np.number)):
        yield np.asarray(result, dtype=np.float64)
    elif isinstance(result, np.ndarray) and result.dtype != object:
        yield result.astype(np.float64) if result.dtype.kind in "biuf" else np.zeros(0)
    elif isinstance(result, CircuitsView):
        assert result.to_html()
        yield from numbers([part.props for part in result.parts])
    elif hasattr(result, "to_plotly_json"):
        assert result.to_json()
        yield from numbers([trace.to_plotly_json() for trace in result.data])
    elif isinstance(result, training.TrainingLog):
        yield np.asarray(result.column("loss"))  # not the tokens per second
    elif isinstance(result, Mapping):
        yield from (x for key in result for x in numbers(result[key]))
    elif isinstance(result, (list, tuple)):
        yield from (x for one in result for x in numbers(one))
    elif dataclasses.is_dataclass(result):
        yield from numbers(vars(result))


def run(name: str, w: World, arguments: Mapping[str, Any]) -> list[np.ndarray]:
    """The numbers of a call; of hooks those of a run with them."""
    result = public_functions()[name](**arguments)
    if isinstance(result, list) and result and isinstance(result[0], tuple):
        if callable(result[0][-1]) and "model" in arguments:
            with torch.no_grad():
                gate = {"weighted_exit": True} if arguments["model"].cfg.exit_gate else {}
                result = arguments["model"].run_with_hooks(w.tokens, fwd_hooks=result, **gate)
    return list(numbers(result))


def plain(name: str, w: World) -> list[np.ndarray]:
    """The numbers of the plain call, made once."""
    if name not in w.results:
        w.results[name] = run(name, w, CALLS[name](w))
    return w.results[name]


def cases(name: str) -> Iterator[tuple[str, str]]:
    """Every odd call of a function: the argument and what is odd about it."""
    for parameter, _, kind in arguments_of(name):
        for odd in kind(_value(name, parameter), world()):
            yield parameter, odd[0]


def _value(name: str, parameter: str) -> Any:
    given = CALLS[name](world())
    if parameter in given:
        return given[parameter]
    return next(default for key, default, _ in arguments_of(name) if key == parameter)


def check(name: str, parameter: str, oddity: str) -> str:
    """Make one odd call: ``"numbers"`` or ``"error"``."""
    w = world()
    kind = next(kind for key, _, kind in arguments_of(name) if key == parameter)
    odds = {key: (odd, ends) for key, odd, ends in kind(_value(name, parameter), w)}
    odd, ends = odds[oddity]
    expected = plain(name, w)
    try:
        found = run(name, w, {**CALLS[name](w), parameter: odd})
    except Exception as error:
        words = str(error)
        assert isinstance(error, CLEAR), "".join(traceback.format_exception(error))
        named = "unexpected keyword argument" in words  # Python's own sentence about a name
        assert named or raised_here(error), "".join(traceback.format_exception(error))
        assert len(words) > 15, words
        rounded = ends == "near" and name.startswith("metrics.")
        assert rounded or ends in ("error", "either"), words
        return "error"
    assert ends != "error", f"{name} took {parameter}={odd!r}"
    # How near a metric is in half precision tests/fuzz/test_arguments.py says.
    if ends == "same" or (ends == "near" and not name.startswith("metrics.")):
        close = dict(rtol=1e-4, atol=1e-5) if ends == "same" else dict(rtol=0.1, atol=0.1)
        assert len(found) == len(expected)
        for ours, right in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, right, **close)
    return "numbers"


def test_every_public_name_is_in_a_room():
    names = set(ROOMS) | set(OF_THE_PACKAGE) | set(METHODS) | set(NOT_HERE)
    errors = {name for name in tl_loops.__all__ if name.endswith("Error")}
    missing = set(tl_loops.__all__) - names - errors
    assert not missing, f"add them to tests/fuzz/public_names.py: {sorted(missing)}"


def test_every_public_function_has_a_case():
    missing = set(public_functions()) - set(CALLS) - set(ELSEWHERE)
    assert not missing, f"add them to CALLS of tests/fuzz/calls.py: {sorted(missing)}"
    assert all(ELSEWHERE.values())
    assert not (set(CALLS) | set(ELSEWHERE)) - set(public_functions())
    for name in CALLS:
        unknown = [parameter for parameter, _, kind in arguments_of(name) if kind is None]
        assert not unknown, f"say in KINDS of tests/fuzz/calls.py what {name} takes as {unknown}"


# A report takes seconds.
SAMPLE = [name for name in list(CALLS)[::7] if not name.startswith("report.")]


@pytest.mark.parametrize("name", CALLS if FULL else SAMPLE)
def test_odd_arguments_of(name):
    for case in cases(name):
        if FULL or zlib.crc32(f"{name} {case}".encode()) % 19 == 0:
            check(name, *case)


SHAPES = {
    "one token": dict(n_pos=1),
    "one prompt": dict(rows=1),
    "one iteration": dict(n_iterations=1),
    "one of all": dict(rows=1, n_pos=1, n_iterations=1),
    "as usual": dict(),
}
RUNS = [(shape, name) for shape in SHAPES for name in CALLS]


@pytest.mark.parametrize(("shape", "name"), RUNS if FULL else RUNS[::37])
def test_an_odd_run_gives_the_numbers_of_float64(shape, name):
    results = []
    for dtype in (torch.float32, torch.float64):
        w = world(**SHAPES[shape], dtype=dtype)
        try:
            results.append(run(name, w, CALLS[name](w)))
        except CLEAR as error:
            assert raised_here(error), "".join(traceback.format_exception(error))
            results.append(type(error))
    ours, right = results
    if isinstance(right, type):
        assert ours is right
        return
    assert len(ours) == len(right)
    # Adam takes steps of the learning rate also where the gradient is rounding alone.
    atol = 3e-3 if name == "lens.train_tuned_lens" else 1e-4
    for x, y in zip(ours, right, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=atol)


def patched(w: World, name: str, value: Any) -> float:
    """The metric of one full run in which a function gives the whole of an activation anew."""
    with torch.no_grad():
        hooks = [(name, lambda x, hook: value(x))]
        return float(score(w.model.run_with_hooks(w.tokens, fwd_hooks=hooks)))


@pytest.mark.parametrize("shape", SHAPES if FULL else ["one of all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cells_are_full_runs(shape, dtype):
    w = world(**SHAPES[shape], dtype=dtype)
    close = dict(rtol=1e-4, atol=1e-5) if dtype != torch.bfloat16 else dict(rtol=0.05, atol=0.05)
    direction = CALLS["steering.steer"](w)["direction"].to(dtype)
    arguments = CALLS["patching.activation_patch"](w)
    del arguments["clean_cache"], arguments["where"]
    moved = {"tokens": arguments.pop("corrupted_tokens"), **arguments}
    given = dict(corrupted_tokens=w.tokens, clean_cache=w.cache, **arguments)
    grid = patching.activation_patch(**given, axes=("block",))
    zeroed = patching.ablate(**moved, activation="attn_out", axes=("block",))
    carried = patching.transplant_states(**given)
    steered = steering.steering_effect(**moved, direction=direction, axes=("iteration", "layer"))
    for found in (grid, zeroed, carried, steered):
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for block in (0, -1):
        names = [
            f"blocks.{block % w.model.cfg.n_layers}.hook_{x}" for x in ("resid_pre", "attn_out")
        ]
        right = patched(w, names[0], lambda x, name=names[0]: w.cache[name])
        np.testing.assert_allclose(float(grid[block]), right, **close)
        right = patched(w, names[1], torch.zeros_like)
        np.testing.assert_allclose(float(zeroed[block]), right, **close)
    last = w.n_iterations - 1
    right = patched(w, f"iter.{last}.hook_state_out", lambda x: w.cache["iter.0.hook_state_out"])
    np.testing.assert_allclose(float(carried[0, last]), right, **close)
    name = w.model.hook_name(f"iter.{last}.1.hook_resid_post")
    right = patched(w, name, lambda x: x + direction)
    np.testing.assert_allclose(float(steered[last, 1]), right, **close)
