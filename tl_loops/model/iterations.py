"""How often a loop runs: for one call by a view of the model, or in place; weights stay.

A call with ``n_iterations=`` runs on a view: another object over the same weights, with blocks and
hook points for that number. The model itself is not changed, so an interrupt leaves nothing after
and several threads can call one model. Changing a model in place is all or nothing: everything new
is made first, and what was there comes back if anything stops the change.
"""

import copy
from dataclasses import dataclass
from typing import Any, SupportsIndex

from torch import nn

from tl_loops.config.checks import whole_iterations
from tl_loops.nn.unrolling import tied_copy, unroll
from tl_loops.upstream import CONTEXTS, AnyHookPoint, copy_hooks


@dataclass
class _State:
    """What of a model depends on the number of iterations."""

    n_iterations: int
    blocks: nn.ModuleList
    iter: nn.ModuleList


def at_iterations(model: Any, n_iterations: SupportsIndex | None) -> Any:
    """The model with another number of iterations, for one call; ``None``: the model itself.

    The view has the model's weights, tokenizer, flags and hooks. Blocks that both have are the same
    modules, but for the coda's, whose names differ.

    Raises:
        ConfigError: ``n_iterations`` is not an integer of at least 1, or more than there are
            weights for.
        LoopedSemanticsError: The model has several loops.
    """
    if n_iterations is None:
        return model
    n_iterations = whole_iterations(n_iterations)
    if n_iterations == model.cfg.n_iterations:
        return model
    cfg = copy.copy(model.cfg)
    cfg.set_iterations(n_iterations)
    coda = [_with_hooks(block) for block in model.blocks[model.layout.coda_start :]]
    new = _unrolled(model, cfg, coda)
    view = object.__new__(type(model))
    vars(view).update(vars(model), cfg=cfg, _modules=dict(model._modules))
    view._modules.update(blocks=new.blocks, iter=new.iter)
    view.setup()
    return view


def set_iterations(model: Any, n_iterations: SupportsIndex) -> None:
    """Change the number of iterations of a model in place; see ``model.set_iterations``."""
    n_iterations = whole_iterations(n_iterations)
    if n_iterations == model.cfg.n_iterations:
        return
    cfg = copy.copy(model.cfg)
    cfg.set_iterations(n_iterations)
    old = _State(model.cfg.n_iterations, model.blocks, model.iter)
    new = _unrolled(model, cfg, list(model.blocks[model.layout.coda_start :]))
    try:
        _assign(model, new)
    except BaseException:
        _assign(model, old)
        raise


class IterationsContext:
    """A model changed in place for a block of code; see ``model.iterations``.

    Contexts may end in any order: each takes back its own change alone. An object in place of a
    generator, which after an interrupt would end when its memory is freed.

    Args:
        model: The model.
        n_iterations: Its number of iterations in the block.
    """

    def __init__(self, model: Any, n_iterations: SupportsIndex):
        self.model, self.n_iterations = model, n_iterations
        self.contexts: list[IterationsContext] = vars(model).setdefault(CONTEXTS, [])

    def __enter__(self) -> Any:
        model = self.model
        self.before = _State(model.cfg.n_iterations, model.blocks, model.iter)
        try:
            self.contexts.append(self)
            set_iterations(model, self.n_iterations)
        except BaseException:
            self.__exit__()
            raise
        return model

    def __exit__(self, *error: object) -> None:
        try:
            self.leave()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """The last context restores the model, another hands its state to the next."""
        at = next((i for i, context in enumerate(self.contexts) if context is self), None)
        if at is None:
            return
        if at == len(self.contexts) - 1:
            _assign(self.model, self.before)
            self.contexts.pop()
            return
        self.contexts[at + 1].before = self.before
        del self.contexts[at]


def _unrolled(model: Any, cfg: Any, coda: list[nn.Module]) -> _State:
    """Blocks and hook points for a config with another number of iterations; nothing is changed."""
    old, new, blocks = model.layout, cfg.layout, model.blocks
    kept = [
        [blocks[i] for i in old.iteration_blocks(t)]
        for t in range(min(old.n_iterations, new.n_iterations))
    ]
    unrolled = unroll(new, model.physical_blocks(), reuse=kept)
    core = unrolled[new.core_start : new.coda_start]
    return _State(
        cfg.n_iterations,
        nn.ModuleList([*blocks[: old.core_start], *core, *coda]),
        nn.ModuleList(model.iteration_hooks(cfg, model.iter)),
    )


def _with_hooks(block: nn.Module) -> nn.Module:
    """A copy of a block over its weights, with the hooks that the block has."""
    twin = tied_copy(block)
    for point, other in zip(block.modules(), twin.modules(), strict=True):
        if isinstance(point, AnyHookPoint) and isinstance(other, AnyHookPoint):
            copy_hooks(point, other)
    return twin


def _assign(model: Any, state: _State) -> None:
    model.cfg.set_iterations(state.n_iterations)
    model._modules.update(blocks=state.blocks, iter=state.iter)
    model.setup()
