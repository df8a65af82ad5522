"""Figures from results; nothing here runs a model, shows a figure or writes a file.

``plot_...`` return figures of plotly (interactive, where it is installed) or of matplotlib
(``backend="matplotlib"``, for papers and pages without script). ``attention_...``,
``colored_tokens`` and ``token_log_probs`` return circuitsvis views, which a notebook shows and
which work offline.
"""

from tl_loops.drawing.draw import draw
from tl_loops.drawing.views import CircuitsView, circuitsvis_script
from tl_loops.measurements.figure import plot_profile
from tl_loops.plots.attention import attention_heads, attention_patterns, attention_view
from tl_loops.plots.circuit import plot_circuit
from tl_loops.plots.curves import plot_curves
from tl_loops.plots.exits import plot_exit_curves, plot_exits
from tl_loops.plots.fixed_points import plot_fixed_points
from tl_loops.plots.floorplan import plot_floorplan
from tl_loops.plots.lens import plot_lens
from tl_loops.plots.neurons import plot_neurons
from tl_loops.plots.norms import plot_residual_norms
from tl_loops.plots.pairs import plot_matrix, plot_pairs
from tl_loops.plots.patching import plot_patching
from tl_loops.plots.pca import plot_pca
from tl_loops.plots.probes import plot_probes
from tl_loops.plots.ranks import plot_ranks
from tl_loops.plots.stages import plot_stages
from tl_loops.plots.tokens import colored_tokens, token_log_probs
from tl_loops.plots.trajectories import plot_trajectories

__all__ = [
    "CircuitsView",
    "attention_heads",
    "attention_patterns",
    "attention_view",
    "circuitsvis_script",
    "colored_tokens",
    "draw",
    "plot_circuit",
    "plot_curves",
    "plot_exit_curves",
    "plot_exits",
    "plot_fixed_points",
    "plot_floorplan",
    "plot_lens",
    "plot_matrix",
    "plot_neurons",
    "plot_pairs",
    "plot_patching",
    "plot_pca",
    "plot_probes",
    "plot_profile",
    "plot_ranks",
    "plot_residual_norms",
    "plot_stages",
    "plot_trajectories",
    "token_log_probs",
]
