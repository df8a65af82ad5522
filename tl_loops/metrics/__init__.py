"""Measurements on tensors: pure functions that know no model.

``pattern`` is ``[..., head, dest, src]``, ``resid`` ``[..., pos, d_model]``, ``states``
``[iteration, ..., d_model]``; leading axes broadcast. Statistics are float32 also for bfloat16
inputs. Every function says what one token, padding and zero rows give.
"""

from tl_loops.metrics.answers import (
    answer_flips,
    oracle_headroom,
    oracle_iteration,
    overthinking,
    saturation_iteration,
)
from tl_loops.metrics.attention import (
    colsum_concentration,
    diagonal_score,
    mixing_score,
    previous_token_score,
    sink_identity_index,
    sink_rate,
    sink_score,
)
from tl_loops.metrics.clustering import (
    CosineClustering,
    cosine_clustering,
    shuffled_cosine_clustering,
)
from tl_loops.metrics.convergence import convergence_depth
from tl_loops.metrics.dynamics import (
    PathIndependence,
    acceleration,
    degenerate_fixed_point,
    fixed_point_cosine,
    fixed_point_distance,
    fixed_point_slope,
    path_independence,
    step_angles,
    successive_cosine,
    successive_difference,
    two_scale_ratio,
)
from tl_loops.metrics.exits import (
    EXIT_CRITERIA,
    ExitCriterion,
    exit_distribution,
    exit_iteration,
    exit_signal,
    expected_exit_iteration,
)
from tl_loops.metrics.geometry import (
    anisotropy,
    linear_cka,
    rank_for_share,
    rank_of_spectrum,
    token_curvature,
)
from tl_loops.metrics.graph import (
    ReasoningGraph,
    cluster_paths,
    reasoning_graph,
    shuffled_graphs,
)
from tl_loops.metrics.kmeans import KMeans, kmeans
from tl_loops.metrics.lipschitz import (
    attention_lipschitz_bound,
    attention_lipschitz_bound_from_qk,
    attention_lipschitz_ratio,
)
from tl_loops.metrics.loop_map import (
    LoopSpectrum,
    LyapunovExponents,
    loop_spectrum,
    lyapunov_exponents,
    operator_norm,
)
from tl_loops.metrics.massive import MassiveActivations, bos_norm_ratio, massive_activations
from tl_loops.metrics.neurons import (
    NeuronClasses,
    NeuronStatistics,
    PredictionSuppression,
    classify_neurons,
    neuron_vocabulary_statistics,
    prediction_suppression_neurons,
)
from tl_loops.metrics.pairwise import (
    pairwise_cosine,
    pairwise_pattern_distance,
    pattern_distance,
)
from tl_loops.metrics.paths import (
    StepComponents,
    directional_persistence,
    path_efficiency,
    recurrence_curve,
    recurrence_lag,
    step_components,
)
from tl_loops.metrics.patterns import check_pattern
from tl_loops.metrics.pca import PCATrajectory, pca_trajectory, random_walk_null
from tl_loops.metrics.probes import StepDecodability, step_decodability
from tl_loops.metrics.readout import (
    divergence_from_last,
    js_divergence,
    kl_divergence,
    output_entropy,
    predicted_tokens,
    successive_divergence,
    token_margin,
    token_probability,
    token_rank,
)
from tl_loops.metrics.residual import (
    cosine_similarity,
    effective_rank,
    participation_ratio,
    residual_entropy,
    residual_entropy_bound,
    residual_norm,
)
from tl_loops.metrics.sensitivity import (
    FixedPointSensitivity,
    JacobianNorm,
    fixed_point_sensitivity,
    jacobian_norm,
)
from tl_loops.metrics.settling import (
    SettlingTable,
    late_drift,
    otsu_threshold,
    settling_table,
)
from tl_loops.metrics.stages import (
    StageAlignment,
    StagePermutationNull,
    align_stages,
    angular_distance,
    block_influence,
)
from tl_loops.metrics.step_importance import StepImportance, critical_steps, step_attention
from tl_loops.metrics.trajectories import (
    TRAJECTORY_LABELS,
    TrajectoryClassification,
    classify_trajectory,
    label_co_occurrence,
)

__all__ = [
    "EXIT_CRITERIA",
    "TRAJECTORY_LABELS",
    "CosineClustering",
    "ExitCriterion",
    "FixedPointSensitivity",
    "JacobianNorm",
    "KMeans",
    "LoopSpectrum",
    "LyapunovExponents",
    "MassiveActivations",
    "NeuronClasses",
    "NeuronStatistics",
    "PCATrajectory",
    "PathIndependence",
    "PredictionSuppression",
    "ReasoningGraph",
    "SettlingTable",
    "StageAlignment",
    "StagePermutationNull",
    "StepComponents",
    "StepDecodability",
    "StepImportance",
    "TrajectoryClassification",
    "acceleration",
    "align_stages",
    "angular_distance",
    "anisotropy",
    "answer_flips",
    "attention_lipschitz_bound",
    "attention_lipschitz_bound_from_qk",
    "attention_lipschitz_ratio",
    "block_influence",
    "bos_norm_ratio",
    "check_pattern",
    "classify_neurons",
    "classify_trajectory",
    "cluster_paths",
    "colsum_concentration",
    "convergence_depth",
    "cosine_clustering",
    "cosine_similarity",
    "critical_steps",
    "degenerate_fixed_point",
    "diagonal_score",
    "directional_persistence",
    "divergence_from_last",
    "effective_rank",
    "exit_distribution",
    "exit_iteration",
    "exit_signal",
    "expected_exit_iteration",
    "fixed_point_cosine",
    "fixed_point_distance",
    "fixed_point_sensitivity",
    "fixed_point_slope",
    "jacobian_norm",
    "js_divergence",
    "kl_divergence",
    "kmeans",
    "label_co_occurrence",
    "late_drift",
    "linear_cka",
    "loop_spectrum",
    "lyapunov_exponents",
    "massive_activations",
    "mixing_score",
    "neuron_vocabulary_statistics",
    "operator_norm",
    "oracle_headroom",
    "oracle_iteration",
    "otsu_threshold",
    "output_entropy",
    "overthinking",
    "pairwise_cosine",
    "pairwise_pattern_distance",
    "participation_ratio",
    "path_efficiency",
    "path_independence",
    "pattern_distance",
    "pca_trajectory",
    "predicted_tokens",
    "prediction_suppression_neurons",
    "previous_token_score",
    "random_walk_null",
    "rank_for_share",
    "rank_of_spectrum",
    "reasoning_graph",
    "recurrence_curve",
    "recurrence_lag",
    "residual_entropy",
    "residual_entropy_bound",
    "residual_norm",
    "saturation_iteration",
    "settling_table",
    "shuffled_cosine_clustering",
    "shuffled_graphs",
    "sink_identity_index",
    "sink_rate",
    "sink_score",
    "step_angles",
    "step_attention",
    "step_components",
    "step_decodability",
    "successive_cosine",
    "successive_difference",
    "successive_divergence",
    "token_curvature",
    "token_margin",
    "token_probability",
    "token_rank",
    "two_scale_ratio",
]
