"""The hook points of one iteration."""

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.mechanisms.norm import Norm
from tl_loops.upstream import HookPoint, Module


class IterationHooks(Module):
    """Hook points of one iteration, and the norm that ends it where there is one.

    Hook points: ``hook_state_in`` (before injection), ``hook_injected`` (what enters the first
    layer), ``hook_state_out`` (after the norm between iterations), all [batch, pos, d_model], and
    those of the config's mechanisms.

    Args:
        cfg: The config.
        iteration: Which it is, counted from 0.
        norm: The norm that ends it.
    """

    hook_state_in: HookPoint
    hook_injected: HookPoint
    hook_state_out: HookPoint

    def __init__(self, cfg: LoopedTransformerConfig, iteration: int, norm: Norm | None = None):
        super().__init__()
        names = ["hook_state_in", "hook_injected", "hook_state_out"]
        for mechanism in cfg.mechanisms:
            names += [point.name for point in mechanism.points_of(cfg, "iteration")]
        for name in names:
            setattr(self, name, HookPoint())
        for mechanism in cfg.mechanisms:
            for name, module in mechanism.iteration_modules(cfg, iteration).items():
                setattr(self, name, module)
        if norm is not None:
            self.norm = norm
