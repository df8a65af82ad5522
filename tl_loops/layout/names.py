"""Every hook point that exists: its name, where it stands, its axes, and what turns it on.

The table has the points of every looped model; mechanisms declare theirs (:func:`declare`).
Patching, lenses, position slices and the documentation read it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tl_loops.errors import did_you_mean

Place = Literal["block", "iteration", "run"]


@dataclass(frozen=True)
class HookSpec:
    """One kind of hook point.

    Attributes:
        name: What follows ``blocks.{i}.`` or ``iter.{t}.``; of points of the run the whole name.
        place: In every ``"block"``, at every ``"iteration"``, or once a ``"run"``.
        axes: Names of its axes. ``"pos"`` is the position of a token, of a pattern ``"query"`` and
            ``"key"``; ``"head"`` and ``"kv_head"`` count heads.
        flag: The config flag without which it does not fire; ``None``: it always does.
        from_iteration: The first iteration at which it fires.
    """

    name: str
    place: Place
    axes: tuple[str, ...]
    flag: str | None = None
    from_iteration: int = 0

    @property
    def short(self) -> str:
        """TransformerLens's shorthand: ``"pattern"``, ``"resid_pre"``, ``"state_out"``."""
        outer, _, last = self.name.rpartition("hook_")
        return last if outer in ("", "attn.", "mlp.") else self.name

    @property
    def pos_dim(self) -> int | None:
        """The axis of positions (of a pattern the queries'); ``None``: it has none."""
        return next((i for i, axis in enumerate(self.axes) if axis in ("pos", "query")), None)

    @property
    def head_dim(self) -> int | None:
        """The axis of heads; ``None``: it has none."""
        return next((i for i, axis in enumerate(self.axes) if axis in ("head", "kv_head")), None)

    @property
    def is_pattern(self) -> bool:
        """Whether it relates queries to keys."""
        return "key" in self.axes


def spec(name: str, place: Place, axes: str, flag: str | None = None, **more: int) -> HookSpec:
    """A :class:`HookSpec` with its axes as words."""
    return HookSpec(name, place, tuple(axes.split()), flag, **more)


_STREAM = "batch pos d_model"
_HEADS = "batch pos head d_head"
_KV_HEADS = "batch pos kv_head d_head"
_PATTERN = "batch head query key"

_BLOCK = [
    *(spec(f"hook_{name}", "block", _STREAM) for name in ("resid_pre", "resid_mid", "resid_post")),
    *(spec(f"hook_{name}", "block", _STREAM) for name in ("attn_out", "mlp_out")),
    spec("hook_attn_in", "block", "batch pos head d_model", "use_attn_in"),
    spec("hook_q_input", "block", "batch pos head d_model", "use_split_qkv_input"),
    spec("hook_k_input", "block", "batch pos kv_head d_model", "use_split_qkv_input"),
    spec("hook_v_input", "block", "batch pos kv_head d_model", "use_split_qkv_input"),
    spec("hook_mlp_in", "block", _STREAM, "use_hook_mlp_in"),
    *(spec(f"attn.hook_{name}", "block", _HEADS) for name in ("q", "z", "rot_q")),
    *(spec(f"attn.hook_{name}", "block", _KV_HEADS) for name in ("k", "v", "rot_k")),
    *(spec(f"attn.hook_{name}", "block", _PATTERN) for name in ("attn_scores", "pattern")),
    spec("attn.hook_result", "block", "batch pos head d_model", "use_attn_result"),
    *(
        spec(f"mlp.hook_{name}", "block", "batch pos d_mlp")
        for name in ("pre", "pre_linear", "post", "mid")
    ),
]
_NORMS = [
    spec(f"{norm}.hook_{part}", "block", f"batch pos {width}")
    for norm in ("ln1", "ln1_post", "ln2", "ln2_post", "attn.q_norm", "attn.k_norm")
    for part, width in (("scale", "one"), ("normalized", "d_model"))
]
_ITERATION = [
    spec(f"hook_{name}", "iteration", _STREAM) for name in ("state_in", "injected", "state_out")
] + [
    spec(f"norm.hook_{part}", "iteration", f"batch pos {width}")
    for part, width in (("scale", "one"), ("normalized", "d_model"))
]
_RUN = [
    spec("hook_embed", "run", _STREAM),
    spec("hook_pos_embed", "run", _STREAM),
    spec("unembed.hook_in", "run", _STREAM),
    spec("unembed.hook_out", "run", "batch pos d_vocab"),
] + [
    spec(f"{norm}.hook_{part}", "run", f"batch pos {width}")
    for norm in ("ln_final", "ln_coda", "ln_injection", "embed.ln")
    for part, width in (("scale", "one"), ("normalized", "d_model"))
]

HOOKS: dict[tuple[Place, str], HookSpec] = {
    (row.place, row.name): row for row in [*_BLOCK, *_NORMS, *_ITERATION, *_RUN]
}
"""The table, by place and name."""

_PLACES: tuple[tuple[Place, re.Pattern[str]], ...] = (
    ("block", re.compile(r"^blocks\.\d+\.(.+)$")),
    ("iteration", re.compile(r"^iter\.\d+\.(.+)$")),
)


def declare(rows: Iterable[HookSpec]) -> None:
    """Add the hook points of a mechanism to the table.

    Raises:
        ValueError: The table has another row of that name.
    """
    for row in rows:
        if HOOKS.setdefault((row.place, row.name), row) != row:
            raise ValueError(f"the hook point {row.name!r} is declared twice, as different things")


def find_hook(name: str) -> HookSpec | None:
    """The row of a canonical hook name such as ``"blocks.14.attn.hook_pattern"``, if it has one."""
    for place, pattern in _PLACES:
        match = pattern.match(name)
        if match is not None:
            return HOOKS.get((place, match.group(1)))
    return HOOKS.get(("run", name))


def between_iterations(name: str) -> str | None:
    """The full name (``"hook_state_out"``) of a point between iterations, from it or its shorthand.

    ``None`` where there is no such point.
    """
    full = name if name.startswith("hook_") else f"hook_{name}"
    return full if ("iteration", full) in HOOKS else None


def known_names(place: Place) -> list[str]:
    """The shorthands of all points at a place."""
    return [row.short for (where, _), row in HOOKS.items() if where == place]


def activation_name(name: str) -> str:
    """The part of a hook name after ``blocks.{i}.`` for a TransformerLens shorthand.

    Args:
        name: A shorthand such as ``"pattern"`` or ``"resid_pre"``, or a name that is already the
            full rest (``"attn.hook_pattern"``, ``"ln1.hook_scale"``), which is returned as it is.

    Raises:
        ValueError: The name is not known; near matches are suggested.
    """
    if "hook_" in name:
        return name
    shorthands = {row.short: full for (place, full), row in HOOKS.items() if place == "block"}
    if name in shorthands:
        return shorthands[name]
    known = [short for short in shorthands if "hook_" not in short]
    raise ValueError(f"unknown activation name {name!r}: {did_you_mean(name, known)}")
