"""Plain calls of every metric: those of tensors alone (tests/fuzz/arguments.py), and the others."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.arguments import CALLS as OF_TENSORS
from tests.fuzz.world import World
from tl_loops import metrics


def _values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _whole(most: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(seed))


def _patterns(*shape: int) -> Tensor:
    hidden = ~torch.ones(shape[-2:]).tril().bool()
    return _values(*shape).masked_fill(hidden, -torch.inf).softmax(-1)


def _rotated(state: Tensor) -> Tensor:
    return 0.5 * state.tanh() + 0.1 * state.mean()


def _injected(state: Tensor, injection: Tensor) -> Tensor:
    return 0.5 * state.tanh() + injection


def _fixed_point() -> dict[str, Any]:
    state, injection = torch.zeros(6), _values(6)
    for _ in range(200):
        state = _injected(state, injection)
    return dict(step=_injected, state=state, injection=injection, directions=_values(2, 6))


def _of_tensors(name: str) -> Callable[[World], dict[str, Any]]:
    return lambda w: {
        key: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in OF_TENSORS[name].items()
    }


METRIC_CALLS: dict[str, Callable[[World], dict[str, Any]]] = {
    **{f"metrics.{name}": _of_tensors(name) for name in OF_TENSORS},
    "metrics.align_stages": lambda w: dict(
        profile=_values(9), reference_profile=_values(7, seed=1), grid=21
    ),
    "metrics.answer_flips": lambda w: dict(predictions=_whole(3, 5, 4)),
    "metrics.attention_lipschitz_bound": lambda w: dict(
        x=_values(5, 8), x_other=_values(5, 8, seed=1), W_Q=_values(2, 8, 4, seed=2),
        W_K=_values(2, 8, 4, seed=3),
    ),
    "metrics.attention_lipschitz_bound_from_qk": lambda w: dict(
        q=_values(5, 2, 4), k=_values(5, 2, 4, seed=1), q_other=_values(5, 2, 4, seed=2),
        k_other=_values(5, 2, 4, seed=3),
    ),
    "metrics.check_pattern": lambda w: dict(pattern=_patterns(2, 5, 5)),
    "metrics.classify_neurons": lambda w: dict(
        statistics=metrics.neuron_vocabulary_statistics(_values(2, 6, 8), _values(8, 20, seed=1))
    ),
    "metrics.cluster_paths": lambda w: dict(states=_values(6, 3, 8), n_clusters=2, n_init=2),
    "metrics.convergence_depth": lambda w: dict(tolerance=0.1, states=_values(5, 3, 8)),
    "metrics.cosine_clustering": lambda w: dict(
        hidden=_values(8, 6), entity=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    ),
    "metrics.critical_steps": lambda w: dict(attention=_values(5, 5).softmax(-1)),
    "metrics.exit_iteration": lambda w: dict(
        criterion="kl", logits=_values(4, 3, 9), threshold=0.3
    ),
    "metrics.exit_signal": lambda w: dict(criterion="kl", logits=_values(4, 3, 9)),
    "metrics.fixed_point_sensitivity": lambda w: _fixed_point(),
    "metrics.fixed_point_slope": lambda w: dict(distance=_values(8, 3).abs(), window=(1, 7)),
    "metrics.jacobian_norm": lambda w: dict(step=_rotated, state=_values(6), n_probes=None),
    "metrics.kmeans": lambda w: dict(points=_values(9, 4), n_clusters=2, n_init=2),
    "metrics.label_co_occurrence": lambda w: dict(
        labels=metrics.classify_trajectory(_values(12, 5, 6)).labels
    ),
    "metrics.linear_cka": lambda w: dict(x=_values(6, 4), y=_values(6, 3, seed=1)),
    "metrics.loop_spectrum": lambda w: dict(step=_rotated, state=_values(6)),
    "metrics.lyapunov_exponents": lambda w: dict(step=_rotated, state=_values(6), n_iterations=4),
    "metrics.massive_activations": lambda w: dict(resid=_values(2, 5, 8), magnitude=1, ratio=2),
    "metrics.neuron_vocabulary_statistics": lambda w: dict(
        W_out=_values(2, 6, 8), W_U=_values(8, 20, seed=1)
    ),
    "metrics.operator_norm": lambda w: dict(step=_rotated, state=_values(6)),
    "metrics.oracle_headroom": lambda w: dict(correct=_values(4, 6) > 0),
    "metrics.oracle_iteration": lambda w: dict(correct=_values(4, 6) > 0),
    "metrics.otsu_threshold": lambda w: dict(values=_values(12)),
    "metrics.overthinking": lambda w: dict(correct=_values(4, 6) > 0),
    "metrics.pca_trajectory": lambda w: dict(states=_values(6, 3, 8)),
    "metrics.prediction_suppression_neurons": lambda w: dict(model=w.model),
    "metrics.random_walk_null": lambda w: dict(states=_values(6, 3, 8), seed=0),
    "metrics.rank_for_share": lambda w: dict(singular_values=_values(3, 5).abs()),
    "metrics.reasoning_graph": lambda w: dict(path=_whole(4, 8)),
    "metrics.recurrence_lag": lambda w: dict(curve=_values(6, 3).abs()),
    "metrics.saturation_iteration": lambda w: dict(predictions=_whole(3, 5, 4)),
    "metrics.settling_table": lambda w: dict(drift=_values(9).abs(), correct=_values(9) > 0),
    "metrics.shuffled_cosine_clustering": lambda w: dict(
        hidden=_values(8, 6), entity=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]), seed=0, n_shuffles=3
    ),
    "metrics.shuffled_graphs": lambda w: dict(path=_whole(4, 8), seed=0, n_shuffles=3),
    "metrics.sink_rate": lambda w: dict(pattern=_patterns(2, 5, 5)),
    "metrics.step_attention": lambda w: dict(
        pattern=_patterns(2, 5, 5), step_ids=torch.tensor([0, 0, 1, 1, 1])
    ),
    "metrics.step_decodability": lambda w: dict(states=_values(3, 12, 4), n_steps=5),
    "metrics.two_scale_ratio": lambda w: dict(groups=[_values(3, 4, 8), _values(3, 4, 8, seed=1)]),
    "metrics.TrajectoryClassification.fraction": lambda w: dict(
        self=metrics.classify_trajectory(_values(12, 5, 6)), label="orbit"
    ),
    "metrics.SettlingTable.to_frame": lambda w: dict(
        self=metrics.settling_table(_values(9).abs(), _values(9) > 0)
    ),
}  # fmt: skip
"""A call that is as it is meant, for each name."""
