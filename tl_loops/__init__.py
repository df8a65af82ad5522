"""Looped (recurrent-depth) transformer language models inside TransformerLens.

Importing this package registers the looped families, so that
``HookedTransformer.from_pretrained("tl-loops-tiny", n_iterations=8)`` works. Every pass of every
recurrent layer then has hook points of its own, over weights that exist once.
"""

from tl_loops import attribution, lens, loop_hooks, metrics, patching, plots, steering, tasks
from tl_loops.bridge import UnrolledBridge, unroll
from tl_loops.cache import LoopedActivationCache
from tl_loops.config import LoopedTransformerConfig
from tl_loops.errors import (
    CheckpointError,
    ConfigError,
    LoopedSemanticsError,
    UnknownModelError,
)
from tl_loops.exit_curves import ExitCurve, exit_curve
from tl_loops.hooking import HookNameError
from tl_loops.layout import BlockCoordinate, LoopLayout
from tl_loops.looping import loop
from tl_loops.measure import available_metrics, measure
from tl_loops.model import LoopedTransformer
from tl_loops.profile import LoopProfile
from tl_loops.registration import register, unregister
from tl_loops.upstream import HookedTransformer, warn_if_untried

__version__ = "0.1.0"

__all__ = [
    "BlockCoordinate",
    "CheckpointError",
    "ConfigError",
    "ExitCurve",
    "HookNameError",
    "HookedTransformer",
    "LoopLayout",
    "LoopProfile",
    "LoopedActivationCache",
    "LoopedSemanticsError",
    "LoopedTransformer",
    "LoopedTransformerConfig",
    "UnknownModelError",
    "UnrolledBridge",
    "attribution",
    "available_metrics",
    "exit_curve",
    "lens",
    "loop",
    "loop_hooks",
    "measure",
    "metrics",
    "patching",
    "plots",
    "register",
    "steering",
    "tasks",
    "unregister",
    "unroll",
]

warn_if_untried()
register()
