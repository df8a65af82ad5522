"""From an activation of a batch to one number per prompt: heads or tokens averaged within it."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.metrics import attention, massive, pairwise
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
