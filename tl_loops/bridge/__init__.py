"""TransformerBridge's looped models under the names of their iterations."""

from tl_loops.bridge.unrolled import UnrolledBridge
from tl_loops.bridge.unrolling import unroll

__all__ = ["UnrolledBridge", "unroll"]
