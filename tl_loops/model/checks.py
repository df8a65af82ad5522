"""Checks of the arguments of a forward pass, before anything runs."""

from typing import Any

from torch import Tensor

from tl_loops.arguments import as_index
from tl_loops.errors import shortened
from tl_loops.mechanisms.exclusions import check_shared_keys
from tl_loops.mechanisms.kv_sharing import KVSharing
from tl_loops.nn.kv_cache import SharedKeyValueCache
from tl_loops.upstream import KeyValueCache, given


def check_starts(
    cfg: Any,
    start_at_layer: int | None,
    start_at_iteration: int | None,
    past: KeyValueCache | None,
) -> None:
    """Raise for two starts at once, or a key-value cache of another number of blocks.

    Raises:
        ValueError: Either.
    """
    if start_at_layer is not None and start_at_iteration is not None:
        raise ValueError("give start_at_layer or start_at_iteration, not both")
    if past is not None and len(past.entries) != cfg.n_layers:
        raise ValueError(
            f"the key-value cache has {len(past.entries)} entries, but the model has "
            f"{cfg.n_layers} unrolled blocks: make it with the same n_iterations"
        )


def check_return_type(return_type: str | None) -> None:
    """Raise for a ``return_type`` that there is not.

    Raises:
        ValueError: It is not ``"logits"``, ``"loss"``, ``"both"`` or ``None``.
    """
    if return_type not in ("logits", "loss", "both", None):
        raise ValueError(
            f"return_type must be 'logits', 'loss', 'both' or None, got {return_type!r}"
        )


def check_residual(cfg: Any, input: Any) -> None:
    """Raise where a start needs a residual stream and gets something else.

    Raises:
        ValueError: It does.
    """
    if not isinstance(input, Tensor) or input.ndim != 3:
        raise ValueError(
            "with start_at_layer or start_at_iteration the input must be the residual "
            f"stream [batch, pos, {cfg.d_model}]"
        )


def check_state(name: str, state: Tensor | None, x: Tensor) -> None:
    """Raise for a state whose shape is not the residual stream's.

    Raises:
        ValueError: It is another.
    """
    if state is not None and not isinstance(state, Tensor):
        raise ValueError(
            f"{name} must be a tensor [batch, pos, d_model] = {tuple(x.shape)}, got "
            f"{shortened(state)}"
        )
    if state is not None and state.shape != x.shape:
        raise ValueError(
            f"{name} must be [batch, pos, d_model] = {tuple(x.shape)}, got {tuple(state.shape)}"
        )


def block_index(depth: int, index: int, name: str) -> int:
    """An unrolled block, or the end, counted from 0; negative indices count from the end.

    Raises:
        ValueError: It is out of range.
    """
    index = as_index(name, index)
    if not -depth <= index <= depth:
        raise ValueError(f"{name}={index} is out of range: there are {depth} unrolled blocks")
    return index + depth if index < 0 else index


def key_value_sharing(
    model: Any, kv_sharing: str | None, past: KeyValueCache | None
) -> KVSharing | None:
    """How iterations share keys and values in a call, checked against its cache.

    Raises:
        ConfigError: The name is not known, or the model cannot share.
        ValueError: The cache was made for another sharing, or is none.
    """
    given("past_kv_cache", past, KeyValueCache)
    held = past.sharing if isinstance(past, SharedKeyValueCache) else None
    if kv_sharing is None:
        sharing = held or KVSharing.parse(model.cfg.kv_sharing)
    else:
        sharing = KVSharing.parse(kv_sharing)
    if past is not None and sharing != held:
        raise ValueError(
            f"kv_sharing={str(sharing)!r}, but the cache was made for {str(held)!r}: make it "
            "with model.make_kv_cache(batch, kv_sharing)"
        )
    check_shared_keys(model.cfg, sharing)
    if isinstance(past, SharedKeyValueCache):
        past.unroll(model.layout)
    return sharing
