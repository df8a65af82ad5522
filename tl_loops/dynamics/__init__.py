"""The loop of a model as a dynamical system: its map, the map's Jacobians, and whether it settles.

Everything here knows a model by its hook points and its runs, so that it works on every looped
model whose state is all that goes from one iteration to the next. What is one number per prompt is
a metric that :func:`tl_loops.measure` streams.
"""

from tl_loops.dynamics.alignment import KernelAlignment, kernel_alignment
from tl_loops.dynamics.iteration_map import ModelLoopMap, loop_map, loop_maps
from tl_loops.dynamics.jacobians import (
    IterationJacobians,
    injection_sensitivity,
    iteration_jacobians,
    run_exponents,
)
from tl_loops.dynamics.spectra import KeyValueSpectra, key_value_spectra

__all__ = [
    "KernelAlignment",
    "KeyValueSpectra",
    "kernel_alignment",
    "key_value_spectra",
    "IterationJacobians",
    "ModelLoopMap",
    "injection_sensitivity",
    "iteration_jacobians",
    "loop_map",
    "loop_maps",
    "run_exponents",
]
