"""Arguments of public metrics, as they are meant, and ways to make them odd."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tl_loops import metrics


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _patterns(*shape: int) -> Tensor:
    return (
        _random(*shape).masked_fill(~torch.ones(shape[-2:]).tril().bool(), -torch.inf).softmax(-1)
    )


RESID = dict(resid=_random(3, 5, 8))
STATES = dict(states=_random(6, 3, 8))
LOGITS = dict(logits=_random(4, 3, 9))
PATTERN = dict(pattern=_patterns(2, 3, 5, 5))
DEPTH = dict(resid=_random(4, 3, 5, 8))
CALLS: dict[str, dict[str, Any]] = {
    "acceleration": STATES,
    "angular_distance": DEPTH,
    "anisotropy": RESID,
    "attention_lipschitz_ratio": dict(
        pattern=_patterns(2, 3, 5, 5),
        pattern_other=_patterns(2, 3, 5, 5).flip(0),
        bound=_random(2, 3).abs(),
    ),
    "block_influence": DEPTH,
    "bos_norm_ratio": RESID,
    "classify_trajectory": dict(states=_random(20, 3, 8)),
    "colsum_concentration": PATTERN,
    "cosine_similarity": dict(a=_random(3, 5, 8), b=_random(3, 5, 8, seed=1)),
    "degenerate_fixed_point": dict(fixed_points=_random(4, 3, 8)),
    "diagonal_score": PATTERN,
    "directional_persistence": STATES,
    "divergence_from_last": LOGITS,
    "effective_rank": RESID,
    "exit_distribution": dict(gate_logits=_random(4, 3)),
    "expected_exit_iteration": dict(gate_logits=_random(4, 3)),
    "fixed_point_cosine": STATES,
    "fixed_point_distance": STATES,
    "js_divergence": dict(p_logits=_random(3, 9), q_logits=_random(3, 9, seed=1)),
    "kl_divergence": dict(p_logits=_random(3, 9), q_logits=_random(3, 9, seed=1)),
    "late_drift": STATES,
    "mixing_score": PATTERN,
    "output_entropy": LOGITS,
    "pairwise_cosine": dict(resids=_random(4, 3, 5, 8)),
    "pairwise_pattern_distance": dict(patterns=_patterns(4, 3, 5, 5)),
    "participation_ratio": RESID,
    "path_independence": dict(final_states=_random(4, 3, 8)),
    "path_efficiency": STATES,
    "pattern_distance": dict(a=_patterns(3, 5, 5), b=_patterns(3, 5, 5).flip(0)),
    "predicted_tokens": LOGITS,
    "previous_token_score": PATTERN,
    "rank_of_spectrum": dict(singular_values=_random(3, 5).abs()),
    "recurrence_curve": STATES,
    "residual_entropy": RESID,
    "residual_entropy_bound": RESID,
    "residual_norm": RESID,
    "sink_identity_index": PATTERN,
    "sink_score": PATTERN,
    "step_angles": STATES,
    "step_components": STATES,
    "successive_cosine": STATES,
    "successive_difference": STATES,
    "successive_divergence": LOGITS,
    "token_curvature": RESID,
    "token_margin": LOGITS,
    "token_probability": dict(logits=_random(4, 3, 9), tokens=2),
    "token_rank": dict(logits=_random(4, 3, 9), tokens=2),
}
"""Functions of tensors alone, with arguments in float64."""


def call(name: str, arguments: dict[str, Any]) -> list[Tensor]:
    """The tensors that a metric gives."""
    result = getattr(metrics, name)(**arguments)
    if isinstance(result, Tensor):
        return [result]
    return [value for value in vars(result).values() if isinstance(value, Tensor)]


def _spoiled(value: float) -> Callable[[Tensor], Tensor]:
    def spoil(x: Tensor) -> Tensor:
        x = x.clone()
        if x.numel():
            x.view(-1)[x.numel() // 2] = value
        return x

    return spoil


def _zero_row(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 0, :] = 0.0
    return x


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda x: x.float(),
    "bfloat16": lambda x: x.bfloat16(),
    "float16": lambda x: x.half(),
    "not contiguous": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "expanded": lambda x: x[:1].expand_as(x),
    "one of the first axis": lambda x: x[:1],
    "one position": lambda x: x[..., :1, :1] if x.shape[-1] == x.shape[-2] else x[..., :1, :],
    "none of the first axis": lambda x: x[:0],
    "no position": lambda x: x[..., :0, :],
    "no width": lambda x: x[..., :0],
    "zero rows": _zero_row,
    "integers": lambda x: (4 * x).long(),
    "booleans": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex64),
    "NaN": _spoiled(torch.nan),
    "inf": _spoiled(torch.inf),
}
"""Ways to make a tensor odd, by what they are."""
