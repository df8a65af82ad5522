"""Attribution: what patching would do, for all cells at once, and gradients through the loop."""

from tl_loops.attribution.activation import attribution_patch
from tl_loops.attribution.components import Component
from tl_loops.attribution.edges import EdgeAttribution, edge_attribution
from tl_loops.attribution.influence import StepInfluence, iteration_gradients, step_influence
from tl_loops.attribution.split_gradients import IterationGradients
from tl_loops.attribution.weight_uses import WeightUses, split_weights

__all__ = [
    "Component",
    "EdgeAttribution",
    "IterationGradients",
    "StepInfluence",
    "WeightUses",
    "attribution_patch",
    "edge_attribution",
    "iteration_gradients",
    "split_weights",
    "step_influence",
]
