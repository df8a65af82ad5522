"""The order of iterations: skipping, repeating, reordering, and trading their states or updates.

All iterations use the same weights, so without hooks only their number matters. What distinguishes
them is what is done to them: hooks, and states or updates recorded in a run.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import require_layout
from tl_loops.layout.selection import distinct_indices
from tl_loops.runs.activations import check_held
from tl_loops.upstream import Cache, TextOrTokens

HookList = list[tuple[str, Callable]]

_AT_ITERATION = re.compile(r"^(iter\.(\d+)\.|blocks\.(\d+)\.)(.+)$")


@checked
def run_schedule(
    model: Model,
    tokens: TextOrTokens,
    schedule: Sequence[int],
    fwd_hooks: Sequence[tuple[str, Callable]] = (),
    *,
    return_cache: bool = False,
    names_filter: str | Sequence[str] | Callable[[str], bool] | None = None,
    **forward_arguments: Any,
) -> Any:
    """Run the iterations in a given order, each with the hooks that belong to it.

    Iteration ``schedule[k]`` runs at place k: hooks of iteration t act wherever t is run, as often
    as it is run, and not at all where it is left out. Hooks that are already on the model stay at
    their place instead.

    Args:
        model: A looped model.
        tokens: [batch, pos], or text.
        schedule: Iterations of the model in the order in which they run, e.g. ``[0, 1, 1, 3]``.
        fwd_hooks: Pairs of hook name (canonical or alias) and function.
        return_cache: Also return the cache; its iterations are the places of the schedule.
        names_filter: Of the cache.
        **forward_arguments: Passed on to the forward pass.

    Returns:
        The model's output; with ``return_cache`` a pair of output and cache.

    Raises:
        ValueError: The model has no loop, or the schedule is empty.
        IndexError: The schedule names an iteration that does not exist.
        LoopedSemanticsError: Iterations call different stacks, so that places are not exchangeable.
    """
    layout = require_layout(model)
    if layout.stacks is not None:
        raise LoopedSemanticsError(
            "iterations of this model call different stacks, so that they cannot change places; "
            "trade states with swap_hooks instead"
        )
    if len(schedule) == 0:
        raise ValueError("the schedule is empty: it needs at least one iteration")
    for t in schedule:
        distinct_indices("iteration", layout.n_iterations, t)
    order = [t % layout.n_iterations for t in schedule]
    placed = [pair for name, hook in fwd_hooks for pair in _place(layout, order, name, hook)]
    with model.iterations(len(order)):
        if not return_cache:
            return model.run_with_hooks(tokens, fwd_hooks=placed, **forward_arguments)
        with model.hooks(fwd_hooks=placed):
            return model.run_with_cache(tokens, names_filter=names_filter, **forward_arguments)


@checked
def skip_schedule(model: Model, iterations: int | Sequence[int]) -> list[int]:
    """The schedule without some iterations.

    Raises:
        IndexError: There is no such iteration.
        ValueError: Nothing would be left.
    """
    n = require_layout(model).n_iterations
    left_out = distinct_indices("iteration", n, iterations)
    kept = [t for t in range(n) if t not in left_out]
    if not kept:
        raise ValueError("all iterations would be skipped: leave at least one")
    return kept


@checked
def repeat_schedule(model: Model, iteration: int, times: int = 2) -> list[int]:
    """The schedule in which one iteration runs several times in a row.

    Raises:
        IndexError: There is no such iteration.
        ValueError: ``times`` is below 1.
    """
    if times < 1:
        raise ValueError(f"times must be at least 1, got {times}; skip_schedule leaves it out")
    n = require_layout(model).n_iterations
    (repeated,) = distinct_indices("iteration", n, iteration)
    return [t for t in range(n) for _ in range(times if t == repeated else 1)]


@checked
def swap_schedule(model: Model, a: int, b: int) -> list[int]:
    """The schedule in which two iterations change places.

    Raises:
        IndexError: There is no such iteration.
    """
    order = list(range(require_layout(model).n_iterations))
    first, second = (distinct_indices("iteration", len(order), t)[0] for t in (a, b))
    order[first], order[second] = order[second], order[first]
    return order


@checked
def skip_hooks(model: Model, iterations: int | Sequence[int]) -> HookList:
    """Hooks that skip iterations in a run of unchanged depth: the state passes them as it came.

    Equals :func:`run_schedule` with :func:`skip_schedule`, but hook names keep their numbers.

    Args:
        model: A looped model.
        iterations: What to skip.

    Returns:
        Pairs for ``run_with_hooks`` or ``model.hooks``.

    Raises:
        IndexError: There is no such iteration.
    """
    hooks: HookList = []
    for t in distinct_indices("iteration", require_layout(model).n_iterations, iterations):
        kept: dict[str, Tensor] = {}
        hooks.append((f"iter.{t}.hook_state_in", partial(_keep, kept)))
        hooks.append((f"iter.{t}.hook_state_out", partial(_give_back, kept)))
    return hooks


@checked
def swap_hooks(model: Model, cache: Cache, a: int, b: int, what: str = "state") -> HookList:
    """Hooks by which two iterations trade what a recorded run shows of them.

    Args:
        model: A looped model.
        cache: Cache of a run of the same prompt, with ``iter.{t}.hook_state_out`` (and, for
            updates, ``iter.{t}.hook_state_in``) of both iterations.
        a: One iteration.
        b: The other.
        what: ``"state"``: the state that leaves a becomes the recorded one of b, and vice versa.
            ``"update"``: a adds to its state what b added in the recorded run, and vice versa
            (after the norm between iterations, where there is one).

    Returns:
        Pairs for ``run_with_hooks`` or ``model.hooks``. They copy what they put in.

    Raises:
        IndexError: There is no such iteration.
        ValueError: The cache lacks a state.
    """
    layout = require_layout(model)
    if what not in ("state", "update"):
        raise ValueError(f"what must be 'state' or 'update', got {what!r}")
    first, second = (distinct_indices("iteration", layout.n_iterations, t)[0] for t in (a, b))
    points = ("hook_state_out",) if what == "state" else ("hook_state_in", "hook_state_out")
    names = [f"iter.{t}.{point}" for t in (first, second) for point in points]
    check_held(cache, model, names, "the same")
    hooks: HookList = []
    for here, there in ((first, second), (second, first)):
        out = cache[f"iter.{there}.hook_state_out"]
        if what == "state":
            hooks.append((f"iter.{here}.hook_state_out", partial(_put, out)))
        else:
            kept: dict[str, Tensor] = {}
            update = out - cache[f"iter.{there}.hook_state_in"]
            hooks.append((f"iter.{here}.hook_state_in", partial(_keep, kept)))
            hooks.append((f"iter.{here}.hook_state_out", partial(_give_back, kept, update=update)))
    return hooks


def _place(layout: LoopLayout, order: list[int], name: str, hook: Callable) -> HookList:
    """A hook at every place where its iteration runs."""
    name = layout.canonical_name(name)
    match = _AT_ITERATION.match(name)
    if match is None:
        return [(name, hook)]
    _, iteration, block, rest = match.groups()
    if iteration is not None:
        return [(f"iter.{k}.{rest}", hook) for k, t in enumerate(order) if t == int(iteration)]
    at = layout.coordinate(int(block))
    new = layout.with_iterations(len(order))
    if at.phase != "core":
        return [(f"blocks.{new.index(phase=at.phase, layer=at.layer)}.{rest}", hook)]
    places = [k for k, t in enumerate(order) if t == at.iteration]
    return [(f"blocks.{new.index(iteration=k, layer=at.layer)}.{rest}", hook) for k in places]


def _keep(kept: dict[str, Tensor], value: Tensor, hook: Any) -> None:
    kept["state"] = value


def _give_back(
    kept: dict[str, Tensor], value: Tensor, hook: Any, update: Tensor | None = None
) -> Tensor:
    state = kept.pop("state")
    return state.clone() if update is None else state + _fitting(update, state)


def _put(new: Tensor, value: Tensor, hook: Any) -> Tensor:
    return _fitting(new, value).expand_as(value).clone()


def _fitting(recorded: Tensor, state: Tensor) -> Tensor:
    """What was recorded, for a run of as many positions, and as many prompts or of one."""
    if recorded.shape[0] not in (1, state.shape[0]) or recorded.shape[1:] != state.shape[1:]:
        raise ValueError(
            f"the recorded run has states {list(recorded.shape)}, but this one {list(state.shape)}"
            ": record a run of the same prompt"
        )
    return recorded.to(state)
