"""The one table of hook points: name, place, axes, flag and moment of every one that exists."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from tl_loops.errors import did_you_mean

Place = Literal["block", "iteration", "run"]
Moment = Literal["start", "loop", "before", "first", "after", "coda", "end"]
Branch = Literal["attn", "mlp"]
"""The two branches of a block."""

_STREAM = ("batch", "pos", "d_model")
_SCALE = ("batch", "pos", "one")
_Q, _K = ("batch", "pos", "head", "d_head"), ("batch", "pos", "kv_head", "d_head")
_Q_IN, _K_IN = ("batch", "pos", "head", "d_model"), ("batch", "pos", "kv_head", "d_model")
_PATTERN = ("batch", "head", "query", "key")
_MLP = ("batch", "pos", "d_mlp")
_BLOCK = re.compile(r"^(?:blocks\.(\d+)|iter\.(\d+))\.(.+)$")


@dataclass(frozen=True)
class HookSpec:
    """One hook point, wherever it stands.

    Attributes:
        name: Its name after ``blocks.{i}.`` or ``iter.{t}.``; for the run the whole name.
        place: In every ``"block"``, at every ``"iteration"``, or once in a ``"run"``.
        axes: Names of its tensor's axes. ``"one"`` has one entry that holds for all.
        flag: The config field that must be on for it to fire.
        first_iteration: The iteration from which on it fires.
        head_when: Config fields, the values with which it has a head axis after the positions, and
            the name of that axis; ``None``: none. The first that holds counts.
        moment: When it fires. Run: at the ``"start"``, entering the ``"loop"``, before the
            ``"coda"``, at the ``"end"``. Iteration: ``"before"`` its blocks, in the
            ``"first"`` of them, or ``"after"`` them.
        residual: Whether its tensor is the residual stream itself, which a lens can read.
    """

    name: str
    place: Place
    axes: tuple[str, ...]
    flag: str | None = None
    first_iteration: int = 0
    head_when: tuple[tuple[str, Any, str | None], ...] = ()
    moment: Moment = "after"
    residual: bool = False

    @property
    def short(self) -> str:
        """The shorthand: ``"pattern"``, ``"state_out"``; of a hook point in a module, its name."""
        module, _, short = self.name.rpartition("hook_")
        return short if module in ("", "attn.", "mlp.") else self.name

    @property
    def pos_dim(self) -> int | None:
        """The tensor axis of positions (queries of a pattern); ``None`` if it has none."""
        for axis in ("pos", "query"):
            if axis in self.axes:
                return self.axes.index(axis)
        return None

    def axes_on(self, cfg: Any) -> tuple[str, ...]:
        """The axes under a config, which may split a norm's input by heads."""
        for field, value, head in self.head_when:
            if getattr(cfg, field, None) == value:
                return (*self.axes[:2], *((head,) if head else ()), *self.axes[2:])
        return self.axes


_SPECS: dict[tuple[Place, str], HookSpec] = {}


def declare(*specs: HookSpec) -> None:
    """Add hook points to the table.

    Raises:
        ValueError: One of that name and place is there and is different.
    """
    for spec in specs:
        if _SPECS.setdefault((spec.place, spec.name), spec) != spec:
            raise ValueError(f"hook point {spec.name!r} ({spec.place}) is declared twice")


def spec(name: str, place: Place, axes: str, flag: str | None = None, **more: Any) -> HookSpec:
    """A row of the table, with its axes as words."""
    return HookSpec(name, place, tuple(axes.split()), flag, **more)


def norm_specs(
    name: str, place: Place, axes: tuple[str, ...] = _STREAM, **more: Any
) -> tuple[HookSpec, HookSpec]:
    """The rows of a norm's two hook points."""
    return (
        HookSpec(f"{name}.hook_scale", place, (*axes[:-1], "one"), **more),
        HookSpec(f"{name}.hook_normalized", place, axes, **more),
    )


def _norm(name: str, place: Place, **more: Any) -> None:
    declare(*norm_specs(name, place, **more))


# Blocks.
declare(
    *(HookSpec(f"hook_resid_{x}", "block", _STREAM, residual=True) for x in ("pre", "mid", "post")),
    HookSpec("hook_attn_in", "block", _Q_IN, "use_attn_in"),
    HookSpec("hook_attn_out", "block", _STREAM),
    HookSpec("hook_mlp_in", "block", _STREAM, "use_hook_mlp_in"),
    HookSpec("hook_mlp_out", "block", _STREAM),
    HookSpec("hook_q_input", "block", _Q_IN, "use_split_qkv_input"),
    HookSpec("hook_k_input", "block", _K_IN, "use_split_qkv_input"),
    HookSpec("hook_v_input", "block", _K_IN, "use_split_qkv_input"),
    *(HookSpec(f"attn.hook_{x}", "block", _Q) for x in ("q", "rot_q", "z")),
    *(HookSpec(f"attn.hook_{x}", "block", _K) for x in ("k", "rot_k", "v")),
    HookSpec("attn.hook_result", "block", _Q_IN, "use_attn_result"),
    HookSpec("attn.hook_attn_scores", "block", _PATTERN),
    HookSpec("attn.hook_pattern", "block", _PATTERN),
    *(HookSpec(f"mlp.hook_{x}", "block", _MLP) for x in ("pre", "pre_linear", "post", "mid")),
)
# With split inputs it fires for queries, keys and values; a cache keeps the last.
_LN1_HEADS = (
    ("block_norm", "stream", None),  # it norms the stream, before inputs are split
    ("use_split_qkv_input", True, "kv_head"),
    ("use_attn_in", True, "head"),
)
_norm("ln1", "block", head_when=_LN1_HEADS)
_norm("ln2", "block")
_norm("ln1_post", "block")
_norm("ln2_post", "block")
_norm("attn.q_norm", "block", head_when=(("qk_norm", "head_weight", "head"),))
_norm("attn.k_norm", "block", head_when=(("qk_norm", "head_weight", "kv_head"),))

# Iterations.
declare(
    HookSpec("hook_state_in", "iteration", _STREAM, moment="before", residual=True),
    HookSpec("hook_injected", "iteration", _STREAM, moment="before", residual=True),
    HookSpec("hook_state_out", "iteration", _STREAM, residual=True),
)
_norm("norm", "iteration")

# The run.
declare(
    HookSpec("hook_embed", "run", _STREAM, moment="start", residual=True),
    HookSpec("hook_pos_embed", "run", _STREAM, moment="start"),
    HookSpec("unembed.hook_in", "run", _STREAM, moment="end"),
    HookSpec("unembed.hook_out", "run", ("batch", "pos", "d_vocab"), moment="end"),
)
_norm("embed.ln", "run", moment="start")
_norm("ln_coda", "run", moment="coda")
_norm("ln_final", "run", moment="end")


def hook_specs(place: Place | None = None) -> tuple[HookSpec, ...]:
    """Every hook point that is declared, or those of one place."""
    return tuple(spec for spec in _SPECS.values() if place in (None, spec.place))


def spec_of(name: str) -> HookSpec | None:
    """The row of a canonical hook name; ``None`` for hook points of TransformerLens's bridges."""
    match = _BLOCK.match(name)
    if match is None:
        return _SPECS.get(("run", name))
    return _SPECS.get(("block" if match.group(1) else "iteration", match.group(3)))


def iteration_spec(name: str) -> HookSpec | None:
    """The hook point between iterations of a shorthand or name (``"state_out"``), if there is."""
    full = name if "hook_" in name else f"hook_{name}"
    return _SPECS.get(("iteration", full))


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
    known = {spec.short: spec.name for spec in hook_specs("block") if "hook_" not in spec.short}
    if name in known:
        return known[name]
    raise ValueError(f"unknown activation name {name!r}: {did_you_mean(name, known)}")
