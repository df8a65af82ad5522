"""Hook names and filters by coordinate, for plain ``run_with_hooks`` and ``run_with_cache``."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.errors import shortened
from tl_loops.layout.coordinate import BlockCoordinate, Phase
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model
from tl_loops.layout.names import activation_name, iteration_spec
from tl_loops.layout.of_model import require_layout
from tl_loops.layout.selection import Selection, chosen_indices, each_index
from tl_loops.runs.activations import check_cache
from tl_loops.upstream import Cache

HookFunction = Callable[..., Any]


@checked
def at(
    model: Model,
    name: str,
    *,
    iteration: int | None = None,
    layer: int | None = None,
    phase: Phase | None = None,
) -> str:
    """The hook name of an activation at a coordinate.

    Args:
        model: A looped model.
        name: TransformerLens shorthand, a full rest of a name, or without a layer one of
            ``"state_in"``, ``"injected"``, ``"state_out"``, ``"exit_gate"``.
        iteration: Iteration of a core block; negative counts from the last.
        layer: Layer inside the phase; negative counts from the last.
        phase: ``"prelude"`` or ``"coda"`` for their layers.

    Returns:
        A canonical name such as ``"blocks.14.attn.hook_pattern"``.

    Raises:
        ValueError: The name is unknown, the coordinate incomplete, or the model has no such point.
        IndexError: The coordinate is out of range.
    """
    found = layout_of(model).hook_name(name, iteration=iteration, layer=layer, phase=phase)
    return _known(model, found)


@checked
def every_iteration(
    model: Model, name: str, layer: Selection | None = None, iterations: Selection | None = None
) -> list[str]:
    """The hook names of an activation in every iteration, in the order in which they fire.

    Args:
        model: A looped model.
        name: As in :func:`at`.
        layer: One or several layers of the core; ``None``: all. Not for points between iterations.
        iterations: Some of the iterations; ``None``: all.

    Raises:
        ValueError: As :func:`at`.
        IndexError: A layer or an iteration is out of range.
    """
    layout = layout_of(model)
    chosen = chosen_indices("iteration", layout.n_iterations, iterations)
    if iteration_spec(name) is not None:
        if layer is not None:
            raise ValueError(f"{name!r} sits between iterations and has no layers: leave layer out")
        return [at(model, name, iteration=t) for t in chosen]
    layers = chosen_indices("layer of the core", layout.n_core, layer)
    return [at(model, name, iteration=t, layer=i) for t in chosen for i in layers]


@checked
def every_block(model: Model, name: str, phase: str | None = None) -> list[str]:
    """The hook names of an activation in every unrolled block, or in those of one phase.

    Raises:
        ValueError: The name or the phase is unknown.
    """
    layout = layout_of(model)
    if phase not in (None, "prelude", "core", "coda"):
        raise ValueError(f"phase must be 'prelude', 'core', 'coda' or None, got {phase!r}")
    return [
        _known(model, f"blocks.{index}.{activation_name(name)}")
        for index, where in enumerate(layout.coordinates())
        if phase is None or where.phase == phase
    ]


@checked
def names_filter(
    model: Model,
    names: str | Sequence[str],
    *,
    iterations: Selection | None = None,
    layers: Selection | None = None,
    phases: str | Sequence[str] | None = None,
) -> Callable[[str], bool]:
    """A filter for ``run_with_cache`` that keeps some activations at some coordinates.

    Args:
        model: A looped model.
        names: Shorthands or full rests; ``"state_out"`` and the like for points between iterations,
            ``"injection"``, ``"initial_state"`` and ``"embed"`` for those of the run.
        iterations: Iterations of the core that are kept; ``None``: all.
        layers: Layers, inside their phase, that are kept; ``None``: all.
        phases: Phases that are kept; ``None``: the core if ``iterations`` is given, else all.

    Returns:
        A predicate on canonical names. It is made for the present number of iterations.

    Raises:
        ValueError: A name or a phase is unknown, or nothing is left.
        IndexError: An iteration is out of range, or a layer in every phase that is kept.
    """
    layout = layout_of(model)
    names = [names] if isinstance(names, str) else list(names)
    kept: set[str] = set()
    for name in names:
        short = name.removeprefix("hook_")
        if iteration_spec(name) is not None:
            kept.update(every_iteration(model, name, iterations=iterations))
        elif f"hook_{short}" in model.hook_dict:
            kept.add(f"hook_{short}")
        else:
            blocks = _blocks(layout, iterations, layers, phases)
            kept.update(_known(model, f"blocks.{i}.{activation_name(name)}") for i in blocks)
    return kept.__contains__


@checked
def hooks_at(names: str | Iterable[str], hook: HookFunction) -> list[tuple[str, HookFunction]]:
    """The same hook function at several names: pairs for ``run_with_hooks``.

    Raises:
        TypeError: A name is no text.
    """
    listed = [names] if isinstance(names, str) else list(names)
    for name in listed:
        if not isinstance(name, str):
            raise TypeError(f"hook names are text, got {shortened(name)}")
    return [(name, hook) for name in listed]


@checked
def with_coordinate(model: Model, hook: Callable[..., Any]) -> HookFunction:
    """A hook function that is also told where it is.

    Args:
        model: A looped model.
        hook: Called as ``hook(value, hook=hook_point, at=coordinate)``; the coordinate is a
            BlockCoordinate, for points between iterations one with the iteration and layer -1.

    Returns:
        A function with TransformerLens's signature ``(value, hook)``.
    """
    return partial(_located, model, hook)


@checked
def coordinate_of(model: Model, name: str) -> BlockCoordinate | None:
    """The coordinate of a hook name; ``None`` for points of the whole run such as ``ln_final``.

    Raises:
        ValueError: The model has no such hook point.
    """
    layout = layout_of(model)
    kind, _, rest = _known(model, layout.canonical_name(name)).partition(".")
    if kind == "blocks":
        return layout.coordinate(int(rest.split(".")[0]))
    if kind == "iter":
        t = int(rest.split(".")[0])
        stack = layout.stacks[t] if layout.stacks is not None else None
        return BlockCoordinate("core", t, -1, stack)
    return None


@checked
def stack_iterations(
    cache: Cache, model: Model, name: str, layer: int | None = None
) -> Float[Tensor, "iteration *rest"]:
    """One activation of a cache in every iteration, stacked.

    Args:
        cache: A cache of a run with the model's number of iterations.
        model: A looped model.
        name: As in :func:`at`.
        layer: Layer of the core; ``None``: all, which gives [iteration, layer, ...]. Not for points
            between iterations.

    Returns:
        [iteration, ...], e.g. [iteration, batch, pos, d_model].

    Raises:
        ValueError: As :func:`at`; or the cache does not hold it, or is one of another number of
            iterations.
    """
    layout = layout_of(model)
    names = every_iteration(model, name, layer)
    check_cache(cache, model, names)
    stacked = torch.stack([cache[n] for n in names])
    if layer is None and iteration_spec(name) is None:
        return stacked.reshape(layout.n_iterations, layout.n_core, *stacked.shape[1:])
    return stacked


@checked
def layout_of(model: Model) -> LoopLayout:
    """The layout of a looped model.

    Raises:
        NoLoopError: The model has no loop.
    """
    return require_layout(model)


def _located(model: Model, function: Callable[..., Any], value: Tensor, hook: Any) -> Any:
    return function(value, hook=hook, at=coordinate_of(model, hook.name))


def _known(model: Model, name: str) -> str:
    if name not in model.hook_dict:
        raise ValueError(f"this model has no hook point {name!r}")
    return name


def _blocks(
    layout: LoopLayout,
    iterations: Selection | None,
    layers: Selection | None,
    phases: str | Sequence[str] | None,
) -> list[int]:
    """The unrolled blocks at some coordinates."""
    if phases is None:
        phases = ("core",) if iterations is not None else ("prelude", "core", "coda")
    phases = (phases,) if isinstance(phases, str) else tuple(phases)
    sizes: dict[Any, int] = {
        "prelude": layout.n_prelude,
        "core": layout.n_core,
        "coda": layout.n_coda,
    }
    for phase in phases:
        if phase not in sizes:
            raise ValueError(f"phases are 'prelude', 'core' and 'coda', got {phase!r}")
    kept: list[int] = []
    for phase, layer in _layers(layers, {phase: sizes[phase] for phase in phases}):
        if phase == "core":
            for t in chosen_indices("iteration", layout.n_iterations, iterations):
                kept.append(layout.index(iteration=t, layer=layer))
        else:
            kept.append(layout.index(phase=phase, layer=layer))
    return kept


def _layers(layers: Selection | None, sizes: dict[str, int]) -> list[tuple[str, int]]:
    """The layers that a selection names, in every phase that has them."""
    if layers is None or isinstance(layers, slice):
        return [(p, i) for p, size in sizes.items() for i in chosen_indices("layer", size, layers)]
    found = []
    for layer in each_index("layer", layers):
        phases = [phase for phase, size in sizes.items() if -size <= layer < size]
        if not phases:
            raise IndexError(f"no phase of {', '.join(sizes)} has a layer {layer}")
        found += [(phase, layer) for phase in phases]
    return found
