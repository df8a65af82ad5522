"""What can be patched: named activations, the axes that each has, and the hook points after it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from tl_loops.errors import LoopedSemanticsError, did_you_mean, shortened
from tl_loops.layout.model import Model
from tl_loops.layout.names import Place, activation_name, hook_specs, spec_of
from tl_loops.layout.of_model import layout_of
from tl_loops.upstream import Cache, is_bridge, shown_too_late

Kind = Literal["stream", "heads", "pattern", "iteration", "run"]

_DEPTH = ("iteration", "layer", "block")
_AXES: dict[Kind, tuple[str, ...]] = {
    "stream": (*_DEPTH, "pos"),
    "heads": (*_DEPTH, "pos", "head"),
    "pattern": (*_DEPTH, "pos", "head", "src_pos"),
    "iteration": ("iteration", "pos"),
    "run": ("pos",),
}
AXES = ("iteration", "layer", "block", "pos", "head", "src_pos")
"""Every axis that a grid can have. ``pos`` of a pattern is the destination."""
_WIDTHS = ("d_model", "d_head", "d_mlp", "d_vocab")


@dataclass(frozen=True)
class Activation:
    """One kind of activation, on one model.

    Attributes:
        name: Shorthand, such as ``"resid_pre"``, ``"pattern"`` or ``"state_out"``.
        place: In every block, at every iteration, or once in a run.
        rest: The hook name without its block or iteration.
        dims: Names of the tensor's axes, as in :class:`tl_loops.layout.names.HookSpec`.
    """

    name: str
    place: Place
    rest: str
    dims: tuple[str, ...]

    @property
    def kind(self) -> Kind:
        """``"iteration"`` or ``"run"`` by place; in a block by axes.

        ``"pattern"`` [batch, head, query, key], ``"heads"`` [batch, pos, head, ...], ``"stream"``
        [batch, pos, ...].
        """
        if self.place != "block":
            return self.place
        return "pattern" if "query" in self.dims else "stream" if self.head_dim is None else "heads"

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that a grid over this activation can have."""
        return _AXES[self.kind]

    @property
    def pos_dim(self) -> int:
        """The tensor axis of positions (destinations, for a pattern)."""
        return self.dims.index("query" if "query" in self.dims else "pos")

    @property
    def head_dim(self) -> int | None:
        """The tensor axis of heads, if there is one."""
        heads = [axis for axis, name in enumerate(self.dims) if name in ("head", "kv_head")]
        return heads[0] if heads else None

    def hook_name(self, index: int | None = None) -> str:
        """Canonical hook name at a block or, between iterations, at an iteration."""
        if self.kind == "run":
            return self.rest
        where = "iter" if self.kind == "iteration" else "blocks"
        return f"{where}.{index}.{self.rest}"

    def n_heads(self, cfg: Any) -> int | None:
        """Number of heads that the hook point shows; ``None`` without a head axis."""
        if self.head_dim is None:
            return None
        grouped = getattr(cfg, "n_key_value_heads", None)
        if (
            "kv_head" in self.dims
            and grouped
            and not getattr(cfg, "ungroup_grouped_query_attention", False)
        ):
            return grouped
        return cfg.n_heads


def find_activation(model: Model, name: str) -> Activation:
    """Describe an activation by its shorthand.

    Args:
        model: A looped model or a plain HookedTransformer.
        name: TransformerLens shorthand, a full rest such as ``"ln1.hook_normalized"``, or
            ``"state_in"``, ``"injected"``, ``"state_out"``, ``"exit_gate"``, ``"injection"``,
            ``"initial_state"``, ``"embed"``.

    Raises:
        ValueError: The name is unknown, or this model has no such activation.
        LoopedSemanticsError: A bridge of TransformerLens shows it, but takes no edit of it; or it
            is of the keys or values of an iteration, where iterations share them.
    """
    found = _described(model, name)
    if found.rest == "hook_resid_mid" and is_bridge(model):
        # The stream itself passes that hook point by: it is the input of the second norm.
        raise LoopedSemanticsError(
            "a TransformerBridge's hook_resid_mid is the MLP's input alone: an edit does not reach "
            "the residual stream; patch 'attn_out', or 'resid_pre' of the block"
        )
    present = [n for n in model.hook_dict if _rest(n) == (found.place, found.rest)]
    if not present:
        first = found.hook_name(0)
        raise ValueError(f"this model has no activation {name!r}: there is no hook point {first!r}")
    check_fires_in_time(model, present)
    spec = spec_of(present[0])
    if spec is None:
        return found
    if spec.flag is not None and not getattr(model.cfg, spec.flag, False):
        raise ValueError(
            f"activation {name!r} needs cfg.{spec.flag}, which is off: call "
            f"model.set_{spec.flag}(True) first"
        )
    if spec.pos_dim is None:
        raise ValueError(
            f"activation {name!r} is one vector for all positions, so it has no axis of positions "
            "to patch: edit it with run_with_hooks"
        )
    if spec.name.startswith("ln1.") and found.dims != spec.axes:
        raise ValueError(
            f"activation {name!r} fires once each for queries, keys and values while "
            "cfg.use_split_qkv_input or cfg.use_attn_in is on: patch 'q_input', 'k_input' or "
            "'v_input', or turn the flag off"
        )
    sharing = getattr(model.cfg, "kv_sharing", None)
    if "kv_head" in found.dims and sharing not in (None, "none"):
        raise LoopedSemanticsError(
            f"iterations share keys and values (kv_sharing={sharing!r}), so that {found.name!r} of "
            "an iteration may not be what its attention reads: set model.cfg.kv_sharing to None, "
            "or choose 'z' or 'pattern'"
        )
    return found


def check_fires_in_time(model: Any, names: Sequence[str]) -> None:
    """Raise on hook points that a bridge fires once its attention is over.

    Raises:
        LoopedSemanticsError: There is one among the names.
    """
    late = shown_too_late(model, names) if is_bridge(model) else []
    if late:
        scores = "hook_attn_scores" in late[0]
        shows = "the pattern instead of the scores" if scores else "the pattern"
        raise LoopedSemanticsError(
            f"this TransformerBridge shows {shows} at {late[0]!r}, and only after its attention "
            "has used it, so that an edit changes nothing: patch 'q' and 'k', which make the "
            "pattern, or 'z'" + (" or 'pattern'" if scores and _takes_patterns(model, late) else "")
        )


def _takes_patterns(model: Any, late: Sequence[str]) -> bool:
    """Whether patterns of the attention whose scores come too late can be edited."""
    return not shown_too_late(model, [n.replace("hook_attn_scores", "hook_pattern") for n in late])


def _described(model: Model, name: str) -> Activation:
    """What a shorthand or a name means, wherever it stands."""
    full = name if "hook_" in name else f"hook_{name}"
    for place in ("iteration", "run"):
        for spec in hook_specs(place):
            if spec.name == full:
                return Activation(spec.short, place, spec.name, spec.axes_on(model.cfg))
    try:
        rest = activation_name(name)
    except ValueError:
        every = [spec.short for spec in hook_specs()]
        raise ValueError(f"unknown activation {name!r}: {did_you_mean(name, every)}") from None
    for spec in hook_specs("block"):
        if spec.name == rest:
            return Activation(spec.short, "block", rest, spec.axes_on(model.cfg))
    return Activation(rest, "block", rest, ("batch", "pos", "d_model"))


def _rest(name: str) -> tuple[Place, str]:
    """The place of a hook point, and its name there."""
    where, _, rest = name.partition(".")
    if where not in ("blocks", "iter"):
        return "run", name
    return "block" if where == "blocks" else "iteration", rest.partition(".")[2]


def take(
    cache: Cache,
    activation: Activation,
    name: str,
    shape: tuple[int, int],
    heads: int | None,
) -> Tensor:
    """One activation of a cache, with its batch axis, checked against the prompts it goes into.

    Args:
        cache: An ActivationCache or a dictionary by canonical hook name.
        activation: What it is.
        name: Canonical hook name.
        shape: Batch and number of positions of the run that it goes into.
        heads: Number of heads expected, if there is a head axis.

    Raises:
        ValueError: Another prompt length, another batch size (other than 1), or other heads.
    """
    value = cache[name]
    if not getattr(cache, "has_batch_dim", True) and name.rsplit("hook_", 1)[-1] != "pos_embed":
        value = value.unsqueeze(0)
    batch, n_pos = shape
    found = value.shape[activation.pos_dim]
    if found != n_pos:
        raise ValueError(
            f"the clean prompt has {found} positions but the corrupted one has {n_pos}: patching "
            "needs prompts with the same number of tokens; choose or pad them so that they match"
        )
    if value.shape[0] not in (1, batch):
        raise ValueError(
            f"the clean cache has batch size {value.shape[0]} but there are {batch} corrupted "
            "prompts: give one clean prompt for each, or a single one for all"
        )
    if activation.head_dim is not None and value.shape[activation.head_dim] != heads:
        raise ValueError(
            f"{name} has {value.shape[activation.head_dim]} heads in the cache but {heads} on the "
            "model: make the cache with this model and its present settings"
        )
    return value


def check_cache(cache: Cache, model: Model, names: list[str]) -> None:
    """Raise on a cache that does not hold what is to be patched.

    Raises:
        ValueError: The cache was filled with another number of iterations, or lacks an activation.
    """
    present = cached_names(cache)
    layout, cached = layout_of(model), getattr(cache, "layout", None)
    if layout is not None and cached is not None and cached != layout:
        raise ValueError(
            f"the cache was made with layout {cached.notation(False)} but the model now has "
            f"{layout.notation(False)}: run run_with_cache again with n_iterations="
            f"{layout.n_iterations}, or set the model with model.iterations({cached.n_iterations})"
        )
    depth = [int(m.group(1)) for m in map(re.compile(r"blocks\.(\d+)\.").match, present) if m]
    if depth and max(depth) >= model.cfg.n_layers:
        raise ValueError(
            f"the cache holds block {max(depth)} but the model has {model.cfg.n_layers} unrolled "
            "blocks: it was made with another number of iterations; run run_with_cache again"
        )
    check_held(cache, model, names)


def cached_names(cache: Cache) -> set[str]:
    """Every hook name that a cache holds.

    Raises:
        ValueError: It is no cache.
    """
    if not hasattr(cache, "keys") or not hasattr(cache, "__getitem__"):
        raise ValueError(
            "the cache must be what run_with_cache gives, or a mapping by hook name, got "
            f"{shortened(cache)}"
        )
    return set(cache.keys())


def check_held(cache: Cache, model: Model, names: Sequence[str], what: str = "the clean") -> None:
    """Raise on a cache that lacks an activation, or holds one of another shape.

    Args:
        cache: Of a run with any number of iterations.
        model: The model that it goes into.
        names: Canonical hook names.
        what: Whose prompt should be run again, for the message.

    Raises:
        ValueError: It does.
        LoopedSemanticsError: A bridge filled it, which shows patterns in the place of scores.
    """
    present = cached_names(cache)
    # A pattern that comes late can be read all the same.
    scores = [name for name in names if name.endswith("hook_attn_scores")]
    check_fires_in_time(getattr(cache, "model", None), scores)
    missing = [name for name in names if name not in present]
    if missing:
        raise ValueError(
            f"the cache lacks {missing[0]!r}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + f": run run_with_cache on {what} prompt with a names_filter that keeps it"
        )
    for name in names:
        _check_axes(cache, model, name)


def _check_axes(cache: Cache, model: Model, name: str) -> None:
    """Raise on an entry that has not the axes of its hook point, or another width."""
    value = cache[name]
    if not isinstance(value, Tensor):
        raise ValueError(f"the cache must hold tensors, got {type(value).__name__} as {name!r}")
    axes = known_axes(model, name)
    if axes is None:
        return
    axes = axes[0 if getattr(cache, "has_batch_dim", True) else 1 :]
    fits = len(axes) == value.ndim and all(
        width in (None, size) for (_, width), size in zip(axes, value.shape, strict=True)
    )
    if not fits:
        words = [axis if width is None else f"{axis}={width}" for axis, width in axes]
        raise ValueError(
            f"the cache must hold {name!r} as [{', '.join(words)}], got shape {list(value.shape)}: "
            "make it with this model and its present settings"
        )


def known_axes(model: Model, name: str) -> list[tuple[str, int | None]] | None:
    """The axes of an activation, each with its width where the config says it.

    Args:
        model: The model.
        name: Canonical hook name.

    Returns:
        ``None`` where nothing is known: for a hook point that is not in the table, or a bridge's.
    """
    spec = spec_of(name)
    if spec is None or is_bridge(model) or spec.short == "pos_embed":
        return None
    # Norms of queries and keys are as wide as their heads.
    known = () if "norm" in spec.name else _WIDTHS
    return [
        (axis, getattr(model.cfg, axis, None) if axis in known else None)
        for axis in spec.axes_on(model.cfg)
    ]
