"""TransformerBridge's looped models under the names of their iterations."""

from tl_loops.model.bridged.unrolled import UnrolledBridge
from tl_loops.model.bridged.unrolling import unroll

__all__ = ["UnrolledBridge", "unroll"]
