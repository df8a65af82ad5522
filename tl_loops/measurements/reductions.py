"""From an activation of a batch to one number per prompt: heads or tokens averaged within it."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.metrics import attention, massive, pairwise
from tl_loops.metrics.paths import (
    MOST_LAGS,
    efficiency,
    n_lags,
    recurrence_lag,
    step_components,
    turn,
)
from tl_loops.metrics.settling import last_mean
from tl_loops.metrics.states import measured_states
from tl_loops.metrics.trajectories import classify_trajectory

PerPrompt = Float[Tensor, "batch"]


def mean_over_heads(
    pattern: Float[Tensor, "batch head dest src"], function: Callable[..., Tensor], **options: Any
) -> PerPrompt:
    """A metric per head, averaged over the heads."""
    return function(pattern, validate=False, **options).mean(-1)


def sink_rate(pattern: Float[Tensor, "batch head dest src"], **options: Any) -> PerPrompt:
    """The sink rate, which is about all heads already."""
    return attention.sink_rate(pattern, validate=False, **options)


def distance_between_patterns(
    a: Float[Tensor, "batch head dest src"],
    b: Float[Tensor, "batch head dest src"],
    **options: Any,
) -> PerPrompt:
    """Distance of two patterns of one prompt."""
    return pairwise.pattern_distance(a, b, validate=False, **options)


def massive_count(resid: Float[Tensor, "batch pos d_model"], **options: Any) -> PerPrompt:
    """How many massive activations a prompt has."""
    return massive.massive_activations(resid, **options).count.float()


def last_step(
    *states: Float[Tensor, "batch pos d_model"], function: Callable[..., Tensor], **options: Any
) -> PerPrompt:
    """A metric of a trajectory at the last of a few successive states."""
    return function(torch.stack(states), **options)[-1]


def last_step_over_tokens(
    *states: Float[Tensor, "batch pos d_model"], function: Callable[..., Tensor], **options: Any
) -> PerPrompt:
    """The same for a metric that keeps the tokens."""
    return function(torch.stack(states), **options)[-1].mean(-1)


def against_last(
    state: Float[Tensor, "batch pos d_model"],
    last: Float[Tensor, "batch pos d_model"],
    function: Callable[..., Tensor],
    **options: Any,
) -> PerPrompt:
    """A metric that compares a state with the last one of its trajectory."""
    return function(state.unsqueeze(0), reference=last, **options)[0]


def label_fraction(
    similarity: Float[Tensor, "iteration batch pos"], label: str, **options: Any
) -> PerPrompt:
    """Share of a prompt's tokens whose trajectory has one label, from s_t = cos(x_t, x_last).

    The labels of ``classify_trajectory`` depend on s_t alone. So a path in the plane with the same
    s_t stands for the states, which need not be kept.
    """
    s = similarity.cpu().double().clamp(-1.0, 1.0)
    # s_last is 1 by definition; its rounding error would turn the whole path.
    s = torch.cat([s[:-1], torch.where(s[-1:].isnan(), s[-1:], 1.0)])
    path = torch.stack([s, (1.0 - s.square()).sqrt()], dim=-1)
    has_label = torch.from_numpy(classify_trajectory(path, **options).labels == label)
    return has_label.float().mean(-1)


def gate_logit(gate: Float[Tensor, "batch pos 1"]) -> Float[Tensor, "batch pos"]:
    """The halting logit of each token."""
    return gate.squeeze(-1)


def gates_over_tokens(
    gates: Float[Tensor, "iteration batch pos"], function: Callable[..., Tensor]
) -> Float[Tensor, "*iteration batch"]:
    """A metric of the halting gates, averaged over the tokens."""
    return function(gates).mean(-1)


def step_component(
    *states: Float[Tensor, "batch pos d_model"], component: str
) -> Float[Tensor, "batch"]:
    """One part of the last step, averaged over the tokens."""
    return getattr(step_components(torch.stack(states)), component)[-1].mean(-1)


def path_lengths(
    first: Float[Tensor, "batch pos d_model"], *recent: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos 3"]:
    """Length of the step to a state (NaN for the first), its distance to the first, its norm."""
    start, *states = measured_states(torch.stack([first, *recent]))
    x = states[-1]
    step = (x - states[-2]).norm(dim=-1) if len(states) > 1 else x.new_full(x.shape[:-1], torch.nan)
    return torch.stack([step, (x - start).norm(dim=-1), x.norm(dim=-1)], dim=-1)


def path_turn(
    first: Float[Tensor, "batch pos d_model"], *recent: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos 2"]:
    """Cosine between the last two steps, and whether it counts; 0 before the second."""
    x = measured_states(torch.stack(recent))
    if len(recent) < 3:
        return x.new_zeros(*x.shape[1:-1], 2)
    before, after = x.diff(dim=0)[-2:]
    return torch.stack(turn(before, after), dim=-1)


def lag_distances(
    first: Float[Tensor, "batch pos d_model"], *recent: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos lag"]:
    """Distance to the state 1, 2, ... iterations before; NaN where there is none."""
    *before, x = measured_states(torch.stack(recent))
    found = [(x - other).norm(dim=-1) for other in reversed(before)]
    missing = [x.new_full(x.shape[:-1], torch.nan)] * (MOST_LAGS - len(found))
    return torch.stack([*found, *missing], dim=-1)


def drift_of_path(
    lengths: Float[Tensor, "iteration batch pos 3"], window: int, relative: bool
) -> PerPrompt:
    """The late drift of a prompt, from the lengths of its path."""
    step, _, norm = lengths[1:].unbind(-1)
    return last_mean(step / norm if relative else step, window).mean(-1)


def efficiency_of_path(lengths: Float[Tensor, "iteration batch pos 3"]) -> PerPrompt:
    """Path efficiency of a prompt, from the lengths of its path."""
    step, distance, _ = lengths[1:].unbind(-1)
    return efficiency(distance[-1], step).mean(-1)


def persistence_of_path(turns: Float[Tensor, "iteration batch pos 2"]) -> PerPrompt:
    """Directional persistence of a prompt, from the cosines of its path."""
    cosine, counted = turns.sum(0).unbind(-1)
    return (cosine / counted).mean(-1)


def lag_of_path(
    distances: Float[Tensor, "iteration batch pos lag"], min_depth: float | int
) -> PerPrompt:
    """Recurrence lag of a prompt, from the mean over its tokens of their recurrence curves."""
    lags = range(1, n_lags(len(distances), None) + 1)
    curve = torch.stack([distances[lag:, ..., lag - 1].mean((0, -1)) for lag in lags])
    return recurrence_lag(curve, min_depth)
