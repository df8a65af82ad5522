"""The activation cache of a looped model: addressing by coordinate."""

from typing import Any

from torch import Tensor

from tl_loops.layout import LoopLayout
from tl_loops.upstream import ActivationCache


class LoopedActivationCache(ActivationCache):
    """An ActivationCache whose entries can also be named by iteration and layer.

    ``cache["pattern", 14]``, ``cache["blocks.14.attn.hook_pattern"]`` and
    ``cache["iter.3.0.attn.hook_pattern"]`` are one tensor; ``cache["pattern", 3, 0]`` (name,
    iteration, layer) is the same again. One tensor has one entry.

    Attributes:
        layout: The layout of the run that filled the cache.
    """

    layout: LoopLayout

    def __init__(self, cache_dict: dict[str, Tensor], model: Any, has_batch_dim: bool = True):
        super().__init__(cache_dict, model, has_batch_dim)
        self.layout = model.cfg.layout

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, tuple) and len(key) == 3 and isinstance(key[2], int):
            name, iteration, layer = key
            key = self.layout.hook_name(name, iteration=iteration, layer=layer)
        elif isinstance(key, tuple) and len(key) > 1 and isinstance(key[1], int) and key[1] < 0:
            # By the layout of the run, which may have had another number of iterations.
            key = (key[0], self.layout.n_layers + key[1], *key[2:])
        elif isinstance(key, str):
            key = self.layout.canonical_name(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            return False
        try:
            return self.layout.canonical_name(key) in self.cache_dict
        except IndexError:
            return False
