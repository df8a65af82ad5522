"""The public names of the package, which ``import tl_loops`` gives."""

from tl_loops import (
    attribution,
    circuits,
    dynamics,
    lens,
    loop_hooks,
    metrics,
    patching,
    plots,
    probes,
    steering,
    tasks,
    training,
)
from tl_loops.cache.cache import LoopedActivationCache
from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import (
    CheckpointError,
    ConfigError,
    LoopedSemanticsError,
    UnknownModelError,
)
from tl_loops.layout.coordinate import BlockCoordinate
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.part_labels import PartLabel, read_part_label
from tl_loops.lens.exit_curve import ExitCurve, exit_curve
from tl_loops.measurements.measure import available_metrics, measure
from tl_loops.measurements.profile import LoopProfile
from tl_loops.mechanisms.kv_sharing import KVSharing
from tl_loops.model.bridged import UnrolledBridge, unroll
from tl_loops.model.hooks import HookNameError
from tl_loops.model.kv_sharing_effect import KVSharingEffect, kv_sharing_effect
from tl_loops.model.looped import LoopedTransformer
from tl_loops.model.repeated.loop import loop
from tl_loops.registration import register, unregister
from tl_loops.runs.map_prompts import map_prompts
from tl_loops.runs.merge import merge_shards
from tl_loops.upstream import HookedTransformer

__all__ = [
    "BlockCoordinate",
    "CheckpointError",
    "ConfigError",
    "ExitCurve",
    "HookNameError",
    "HookedTransformer",
    "KVSharing",
    "KVSharingEffect",
    "LoopLayout",
    "LoopProfile",
    "LoopedActivationCache",
    "LoopedSemanticsError",
    "LoopedTransformer",
    "LoopedTransformerConfig",
    "PartLabel",
    "UnknownModelError",
    "UnrolledBridge",
    "attribution",
    "available_metrics",
    "circuits",
    "dynamics",
    "exit_curve",
    "kv_sharing_effect",
    "lens",
    "loop",
    "loop_hooks",
    "map_prompts",
    "measure",
    "merge_shards",
    "metrics",
    "patching",
    "plots",
    "probes",
    "read_part_label",
    "register",
    "steering",
    "tasks",
    "training",
    "unregister",
    "unroll",
]
