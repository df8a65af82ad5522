"""Trajectories as measured: checked, upcast, compared by direction, pooled over the real tokens."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.metrics.padding import map_spans, statistic_dtype
from tl_loops.metrics.residual import unit_vectors


def measured_states(states: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Upcast `states` to the dtype that statistics use, and raise for what is no trajectory.

    Args:
        states: `[iteration, ..., d_model]`.

    Returns:
        The same values in float32, or float64 for float64 states. An infinite value becomes NaN, so
        that no quotient of it looks like a number.

    Raises:
        TypeError: If `states` is not floating point.
        ValueError: If an axis is missing or there is no state at all.
    """
    if states.ndim < 2 or states.shape[0] == 0 or states.shape[-1] == 0:
        raise ValueError(
            f"states has shape {list(states.shape)}, expected [iteration, ..., d_model] with at "
            "least one iteration and one dimension"
        )
    states = states.to(statistic_dtype(states))
    return states.masked_fill(states.isinf(), torch.nan)


def direction_cosine(
    a: Float[Tensor, "*left d_model"], b: Float[Tensor, "*right d_model"]
) -> Float[Tensor, "..."]:
    """Cosine of the angle between `a` and `b` along the last axis, in [-1, 1].

    Args:
        a: vectors `[..., d_model]`.
        b: vectors that broadcast against `a`.

    Returns:
        `[...]`, NaN where either vector is zero.
    """
    return (unit_vectors(a) * unit_vectors(b)).sum(-1).clamp(-1.0, 1.0)


def pool_tokens(
    pool: Callable[..., Tensor], values: Sequence[Tensor], agg: str, mask: Tensor | None
) -> Tensor:
    """Reduce the token axis of numbers per iteration and token, over the real tokens of each row.

    Args:
        pool: takes `[*batch, pos, iteration]` for each of `values` and returns `[*batch,
            iteration]`.
        values: each `[iteration, *batch, pos]`; a bare `[iteration]` is one token.
        agg: the name of the aggregation; `"none"` takes no mask.
        mask: Bool `[..., pos]`, broadcasts over the batch axes; None means that every token is
            real.

    Returns:
        `[iteration, *batch]`.

    Raises:
        TypeError: the mask is not Bool.
        ValueError: there is no token axis for the mask, or it does not fit.
    """
    if mask is not None and (agg == "none" or values[0].ndim < 2):
        raise ValueError(
            f"mask needs a token axis to reduce, got agg={agg!r} and {values[0].ndim - 1} token "
            "axes; select the tokens from the result or the states instead"
        )
    if values[0].ndim < 2:
        values = [value.unsqueeze(-1) for value in values]
    # The iteration axis goes after the tokens, because the mask has none.
    last = [value.movedim(0, -1) for value in values]
    return map_spans(pool, last, mask, core_ndim=2, position_dims=(-2,)).movedim(-1, 0)
