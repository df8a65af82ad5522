"""When a token's state or readout stops moving."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.metrics.answers import first_of_final_run
from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.precision import full_precision
from tl_loops.metrics.readout import divergence_from_last, successive_divergence


@full_precision
def convergence_depth(
    tolerance: float | int,
    *,
    states: Float[Tensor, "iteration *batch d_model"] | None = None,
    logits: Float[Tensor, "iteration *batch d_vocab"] | None = None,
    against: Literal["last", "previous"] = "last",
) -> Int[Tensor, "*batch"]:
    """First iteration from which on a token's state or readout stays within a tolerance.

    Distances are ||x_t - x_ref|| / ||x_ref|| for states and KL(ref || t) in nats for logits.
    Against the last iteration the distance vanishes there by construction, so a slow drift looks
    converged near the end; against the previous one it is the size of the steps that must stay
    small, and a slow drift looks converged throughout.

    Args:
        tolerance: largest distance that counts as converged, >= 0; no published default.
        states: `[iteration, ..., d_model]`; give either states or logits.
        logits: `[iteration, ..., d_vocab]`.
        against: "last": smallest t such that iterations t, t + 1, ... are all within the tolerance
            of the last one. "previous": smallest t such that no later step moves more than the
            tolerance.

    Returns:
        `[...]`, 0-based; the last iteration where nothing earlier qualifies.

    Raises:
        ValueError: not exactly one of states and logits, no iteration, NaN, a negative tolerance,
            or an unknown `against`.
    """
    if (states is None) == (logits is None):
        raise ValueError("expected exactly one of states and logits")
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance}, expected a number >= 0")
    if against not in ("last", "previous"):
        raise ValueError(f"against={against!r}, expected 'last' or 'previous'")
    if states is not None:
        if states.shape[0] == 0:
            raise ValueError("states have no iteration, expected [iteration, ..., d_model]")
        if not states.isfinite().all():
            raise ValueError("states contain NaN or infinities; mask or drop these positions first")
        states = states.to(statistic_dtype(states))
        reference = states[-1:] if against == "last" else states[:-1]
        moved = (states if against == "last" else states[1:]) - reference
        distance = moved.norm(dim=-1) / reference.norm(dim=-1)
        # A zero state that stays zero has not moved (0 / 0); one that leaves zero is far away.
        distance = distance.nan_to_num(nan=0.0, posinf=math.inf)
    else:
        assert logits is not None
        measure = divergence_from_last if against == "last" else successive_divergence
        distance = measure(logits)
    within = distance <= tolerance
    if against == "previous":
        # Settled at t: the step that leaves t and all later ones are small. None leaves the last.
        within = torch.cat([within, within.new_ones(1, *within.shape[1:])])
    return first_of_final_run(within)
