"""Attribution: what patching would do, for all cells at once, from gradients through the loop."""

from tl_loops.attribution.activation import attribution_patch
from tl_loops.attribution.edges import Component, EdgeAttribution, edge_attribution

__all__ = ["Component", "EdgeAttribution", "attribution_patch", "edge_attribution"]
