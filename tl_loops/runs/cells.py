"""Cells: edited runs, what they give, and the small pieces that running them takes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.layout.model import Model
from tl_loops.upstream import KeyValueCache, KeyValueCacheEntry

Edit = Callable[[Tensor], None]
"""Edits in place a private copy of one cell's rows of an activation. Positions in front may be left
out: what is there are the last ones."""

Score = Callable[["CellOutput"], Any]


@dataclass
class Cell:
    """One edited run.

    Attributes:
        edits: Canonical hook name and edit, in the order in which they act at one hook point.
        first_pos: No edit changes anything at an earlier position.
    """

    edits: Sequence[tuple[str, Edit]]
    first_pos: int = 0


@dataclass
class CellOutput:
    """What a cell's run gives.

    Attributes:
        logits: [batch, read, d_vocab], at the positions that are read.
        read: The activations that were asked for, [batch, pos, ...], by hook name.
    """

    logits: Float[Tensor, "batch read d_vocab"]
    read: dict[str, Tensor] = field(default_factory=dict)


class hooked:
    """``model.hooks`` without its visit to every hook point of the model when it ends.

    A run has as many stages as there are blocks, so that visit would cost more than the stages.

    Args:
        model: The model.
        hooks: Canonical hook names and hooks.
        before_others: Whether they act before hooks that are on the model already.
    """

    def __init__(
        self, model: Model, hooks: Sequence[tuple[str, Callable]], before_others: bool = False
    ):
        self.model, self.hooks, self.before_others = model, hooks, before_others

    def __enter__(self) -> None:
        self.level = self.model.context_level + 1
        self.points = [self.model.hook_dict[name] for name, _ in self.hooks]
        try:
            for point, (_, hook) in zip(self.points, self.hooks, strict=True):
                point.add_hook(hook, level=self.level, prepend=self.before_others)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        for point in self.points:
            point.remove_hooks("fwd", level=self.level)


def named_hooks(
    names: Iterable[str], function: Callable[[str, Tensor], Any]
) -> list[tuple[str, Callable]]:
    """Hooks that call a function with the name that was asked for.

    ``hook.name`` may be another: a bridge of TransformerLens has several names for a hook point.
    """
    return [(name, partial(_call_with_name, function, name)) for name in names]


def _call_with_name(
    function: Callable[[str, Tensor], Any], name: str, value: Tensor, hook: Any
) -> Any:
    return function(name, value)


def show_to(show: Callable[[Tensor], None], value: Tensor, hook: Any) -> None:
    """Show an activation to a function and leave it as it is."""
    show(value)


def both(
    first: Callable[[Tensor], None], second: Callable[[Tensor], None]
) -> Callable[[Tensor], None]:
    """A function that shows an activation to two."""

    def show(value: Tensor) -> None:
        first(value)
        second(value)

    return show


def nothing(value: Tensor, hook: Any) -> None:
    """Look at nothing: a hook that only makes its hook point fire."""


def after_prefix(base: Tensor, n_past: int, new: Tensor) -> Tensor:
    """The base run's first positions with a cell's after them."""
    return torch.cat([base[:, :n_past], new], dim=1) if n_past else new


def empty_past(model: Model, tokens: Int[Tensor, "batch pos"]) -> KeyValueCache:
    """A cache of keys and values without positions, for a run of these prompts."""
    cfg = model.cfg
    heads = cfg.n_key_value_heads or cfg.n_heads
    if getattr(cfg, "ungroup_grouped_query_attention", False):
        heads = cfg.n_heads
    like = next(model.parameters())
    entries = []
    for _ in range(cfg.n_layers):
        empty = like.new_empty(tokens.shape[0], 0, heads, cfg.d_head)
        entries.append(KeyValueCacheEntry(empty, empty))
    return KeyValueCache(entries, torch.ones_like(tokens[:, :0]))


def scalar(value: Any, like: Tensor) -> Tensor:
    """A score in float32 (float64 where it is one), on the device of ``like``."""
    value = value if isinstance(value, Tensor) else torch.as_tensor(value)
    if value.is_complex():
        raise ValueError("metric must give a real number, got a complex one")
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    return value.to(like.device, dtype).reshape(())
