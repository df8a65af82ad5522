"""What other people import stays where it is: the names of 0.1, and all that the pages import."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)

NAMES = {
    "tl_loops": """
        BlockCoordinate CheckpointError ConfigError ExitCurve HookNameError HookedTransformer
        LoopLayout LoopProfile LoopedActivationCache LoopedSemanticsError LoopedTransformer
        LoopedTransformerConfig UnknownModelError UnrolledBridge attribution available_metrics
        exit_curve lens loop loop_hooks measure metrics patching plots register steering tasks
        training unregister unroll
    """,
    "tl_loops.metrics": """
        CosineClustering EXIT_CRITERIA ExitCriterion KMeans LoopSpectrum LyapunovExponents
        MassiveActivations NeuronClasses NeuronStatistics PCATrajectory PathIndependence
        PredictionSuppression ReasoningGraph StageAlignment StagePermutationNull
        StepDecodability StepImportance TRAJECTORY_LABELS TrajectoryClassification acceleration
        align_stages angular_distance answer_flips attention_lipschitz_bound
        attention_lipschitz_bound_from_qk attention_lipschitz_ratio block_influence
        bos_norm_ratio check_pattern classify_neurons classify_trajectory cluster_paths
        colsum_concentration convergence_depth cosine_clustering cosine_similarity
        critical_steps degenerate_fixed_point diagonal_score divergence_from_last effective_rank
        exit_distribution exit_iteration exit_signal expected_exit_iteration fixed_point_cosine
        fixed_point_distance fixed_point_slope js_divergence kl_divergence kmeans
        label_co_occurrence loop_spectrum lyapunov_exponents massive_activations mixing_score
        neuron_vocabulary_statistics operator_norm oracle_headroom oracle_iteration
        output_entropy overthinking pairwise_cosine pairwise_pattern_distance
        participation_ratio path_independence pattern_distance pca_trajectory predicted_tokens
        prediction_suppression_neurons previous_token_score random_walk_null reasoning_graph
        residual_entropy residual_entropy_bound residual_norm saturation_iteration
        shuffled_cosine_clustering shuffled_graphs sink_identity_index sink_rate sink_score
        step_angles step_attention step_decodability successive_cosine successive_difference
        successive_divergence token_margin token_probability token_rank two_scale_ratio
    """,
    "tl_loops.lens": """
        CodaLens EntityTracks ExitLens JacobianLens Lens LensPoint LensResult LogitLens
        TokenTrajectory TunedLens adjacent_agreement coda_lens exit_lens fit_jacobian_lens
        logit_kurtosis logit_lens participation_ratio rank_jumps read_lens track_entities
        train_tuned_lens transport_similarity
    """,
    "tl_loops.patching": """
        MassiveSite Site ablate ablate_massive activation_patch axis_labels exit_gate_logits
        find_massive_sites force_exit patch_exit_gate path_patch probe_exit_gate repeat_schedule
        run_schedule skip_hooks skip_schedule swap_hooks swap_schedule transplant_hooks
        transplant_sites transplant_states
    """,
    "tl_loops.attribution": """
        Component EdgeAttribution attribution_patch edge_attribution
    """,
    "tl_loops.plots": """
        CircuitsView attention_heads attention_patterns attention_view circuitsvis_script
        colored_tokens draw plot_curves plot_exit_curves plot_exits plot_fixed_points
        plot_floorplan plot_matrix plot_neurons plot_pairs plot_patching plot_pca plot_profile
        plot_ranks plot_residual_norms plot_stages plot_trajectories token_log_probs
    """,
    "tl_loops.loop_hooks": """
        at coordinate_of every_block every_iteration hooks_at layout_of
        names_filter stack_iterations with_coordinate
    """,
    "tl_loops.loop_losses": """
        act_ponder_cost geometric_prior ponder_loss ponder_training_loss routing_balance_loss
    """,
    "tl_loops.steering": """
        ablate_direction difference_directions steer steering_effect
    """,
    "tl_loops.tasks": """
        FactChainTask NAMES Prompt Split answer_after corrupt fact_chain_prompts follow question
        sample_pair sample_prompts score split_of vocabulary
    """,
    "tl_loops.measurements": """
        Activation DEFAULT_METRICS MEASUREMENTS Measurement core_calls find_measurement
        resolve_options why_not
    """,
    "tl_loops.families.base": """
        Family
    """,
}
"""Public names of 0.1 by the module that they are imported from. Names are added, never removed."""


def shown_imports():
    """What the examples of all pages import of this package: the page, the module, the name."""
    for page in PAGES:
        for block in PYTHON.findall(page.read_text("utf-8")):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tl_loops"):
                    for alias in node.names:
                        yield page.relative_to(ROOT).as_posix(), node.module, alias.name
                elif isinstance(node, ast.Import):
                    for alias in node.names:
                        if alias.name.startswith("tl_loops"):
                            yield page.relative_to(ROOT).as_posix(), alias.name, ""


SHOWN = sorted({*shown_imports()})


@pytest.mark.parametrize("module", NAMES)
def test_public_names_stay(module):
    found = importlib.import_module(module)
    missing = [name for name in NAMES[module].split() if not hasattr(found, name)]
    assert not missing, f"{module} no longer has {', '.join(missing)}"


@pytest.mark.parametrize(("page", "module", "name"), SHOWN)
def test_pages_import_what_exists(page, module, name):
    found = importlib.import_module(module)
    if name and not hasattr(found, name):
        importlib.import_module(f"{module}.{name}")


def test_pages_import_something():
    assert len(SHOWN) > 20
