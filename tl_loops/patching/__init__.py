"""Causal interventions on looped models: patching, ablation, transplants, paths, gates, splicing.

Axes are named, numbers are those of one full forward pass a cell, and what an intervention cannot
change is not run again.
"""

from tl_loops.patching.ablation import MassiveSite, ablate, ablate_massive, find_massive_sites
from tl_loops.patching.activation import activation_patch
from tl_loops.patching.exit_gate import (
    exit_gate_logits,
    force_exit,
    patch_exit_gate,
    probe_exit_gate,
)
from tl_loops.patching.paths import path_patch
from tl_loops.patching.schedule import (
    repeat_schedule,
    run_schedule,
    skip_hooks,
    skip_schedule,
    swap_hooks,
    swap_schedule,
)
from tl_loops.patching.site import Site
from tl_loops.patching.splicing import SpliceResult, splice, splice_hooks
from tl_loops.patching.transplant import (
    transplant_hooks,
    transplant_sites,
    transplant_states,
)
from tl_loops.runs.grid import axis_labels

__all__ = [
    "MassiveSite",
    "Site",
    "SpliceResult",
    "ablate",
    "ablate_massive",
    "activation_patch",
    "axis_labels",
    "exit_gate_logits",
    "find_massive_sites",
    "force_exit",
    "patch_exit_gate",
    "path_patch",
    "probe_exit_gate",
    "repeat_schedule",
    "run_schedule",
    "skip_hooks",
    "skip_schedule",
    "splice",
    "splice_hooks",
    "swap_hooks",
    "swap_schedule",
    "transplant_hooks",
    "transplant_sites",
    "transplant_states",
]
