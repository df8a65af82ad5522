"""Patching."""
from tl_loops.patching.activation import activation_patch
