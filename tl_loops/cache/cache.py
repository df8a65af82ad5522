"""The activation cache of a looped model: addressing by coordinate, moving, slicing, stacking."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from tl_loops.arguments import as_index, checked, is_index
from tl_loops.cache.neurons import NeuronDecomposition
from tl_loops.errors import LoopedSemanticsError, did_you_mean
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model
from tl_loops.layout.names import iteration_spec, spec_of
from tl_loops.upstream import SliceLike, as_slice


class LoopedActivationCache(NeuronDecomposition):
    """An ActivationCache whose entries can also be named by iteration and layer.

    ``cache["pattern", 14]``, ``cache["blocks.14.attn.hook_pattern"]`` and
    ``cache["iter.3.0.attn.hook_pattern"]`` are one tensor; ``cache["pattern", 3, 0]`` (name,
    iteration, layer) is the same again, and ``cache["state_out", 3]`` is
    ``cache["iter.3.hook_state_out"]``. One tensor has one entry.

    Everything goes by the layout of the run that filled the cache, also when the model has been
    given another number of iterations since.

    Attributes:
        layout: The layout of the run that filled the cache.
        mask: True at real tokens of that run, False at padding, [batch, pos] ([pos] without a batch
            axis); ``None``: no padding is known.
        tokens: Tokens of that run, [batch, pos] ([pos] without a batch axis); ``None``: it was
            given a residual stream.
    """

    layout: LoopLayout
    mask: Tensor | None
    tokens: Tensor | None

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: Model,
        has_batch_dim: bool = True,
        mask: Tensor | None = None,
        tokens: Tensor | None = None,
    ):
        super().__init__(cache_dict, model, has_batch_dim)
        self.layout, self.mask, self.tokens = model.cfg.layout, mask, tokens

    def __repr__(self) -> str:
        names = list(self.keys())
        some = ", ".join(names if len(names) <= 4 else [*names[:2], "...", *names[-2:]])
        held = f"{len(names)} activations of {self.layout.notation(injected=False)}: {some}"
        return f"LoopedActivationCache of {held}; list(cache) gives all names"

    def __getitem__(self, key: Any) -> Tensor:
        asked = key
        if isinstance(key, tuple) and len(key) > 1 and is_index(key[1]):
            key = tuple(as_index("index", part) if is_index(part) else part for part in key)
            if len(key) == 3 and isinstance(key[2], int):
                name, iteration, layer = key
                key = self.layout.hook_name(name, iteration=iteration, layer=layer)
            elif len(key) == 2 and iteration_spec(str(key[0])) is not None:
                key = self.layout.hook_name(key[0], iteration=key[1])
            elif key[1] < 0:
                # By the layout of the run, which may have had another number of iterations.
                key = (key[0], self.layout.n_layers + key[1], *key[2:])
        elif isinstance(key, str):
            key = self.layout.canonical_name(key)
        try:
            return super().__getitem__(key)
        except KeyError:
            raise KeyError(self._lacks(asked)) from None

    def _lacks(self, key: Any) -> str:
        """Why there is no entry, and which there is of a similar name."""
        name = str(key[0] if isinstance(key, tuple) else key)
        held = {found if (spec := spec_of(found)) is None else spec.short for found in self}
        similar = did_you_mean(name, [*self] if "." in name else sorted(held), "see cache.keys()")
        return f"the cache has no entry {key!r}: {similar}"

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            return False
        try:
            return self.layout.canonical_name(key) in self.cache_dict
        except IndexError:
            return False

    def _each_once(self, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Change every entry; entries that are one tensor in memory stay one tensor."""
        changed: dict[tuple, Tensor] = {}
        entries = {}
        for name, tensor in self.cache_dict.items():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            if key not in changed:
                changed[key] = change(tensor)
            entries[name] = changed[key]
        return entries

    @checked
    def to(self, device: str | torch.device) -> "LoopedActivationCache":
        """Move the cache; a stream that is one block's output and the next one's input moves once.

        Args:
            device: Where to.

        Returns:
            This cache.
        """
        self.cache_dict = self._each_once(lambda tensor: tensor.to(device))
        self.mask = None if self.mask is None else self.mask.to(device)
        self.tokens = None if self.tokens is None else self.tokens.to(device)
        return self

    @checked
    def remove_batch_dim(self, batch_size: int | None = None) -> "LoopedActivationCache":
        """Drop the batch axis of a cache of one prompt.

        Args:
            batch_size: Number of prompts; ``None``: what most activations have.

        Returns:
            This cache.

        Raises:
            AssertionError: The cache holds several prompts; none of it is changed.
        """
        had_batch_dim = self.has_batch_dim
        if had_batch_dim and batch_size is not None:
            # Only TransformerLens 4.x takes the number, so what it says is done here.
            assert batch_size == 1, (
                f"cannot remove the batch axis of a cache of {batch_size} prompts: take one of "
                "them, cache.apply_slice_to_batch_dim([0])"
            )
            self.cache_dict = self._each_once(
                lambda tensor: tensor[0] if tensor.ndim and len(tensor) == 1 else tensor
            )
            self.has_batch_dim = False
        else:
            super().remove_batch_dim()
        if had_batch_dim:
            self.mask = None if self.mask is None else self.mask[0]
            self.tokens = None if self.tokens is None else self.tokens[0]
        return self

    @checked
    def apply_slice_to_batch_dim(self, batch_slice: SliceLike) -> "LoopedActivationCache":
        """A cache of some batch rows.

        Args:
            batch_slice: Rows; an integer drops the batch axis.

        Raises:
            ValueError: The cache has no batch axis.
            IndexError: It does not have the rows.
        """
        rows = as_slice("batch_slice", batch_slice)
        if not self.has_batch_dim and rows.mode != "identity":
            raise ValueError("this cache has no batch axis to slice")
        keeps = self.has_batch_dim and rows.mode != "int"
        entries = self._each_once(rows.apply) if self.has_batch_dim else dict(self.cache_dict)
        mask, tokens = (
            rows.apply(value) if value is not None and self.has_batch_dim else value
            for value in (self.mask, self.tokens)
        )
        sliced = LoopedActivationCache(entries, self.model, keeps, mask, tokens)
        sliced.layout = self.layout
        return sliced

    @checked
    def stack_activation(
        self,
        activation_name: str,
        layer: int | None = -1,
        sublayer_type: str | None = None,
        *,
        by_iteration: bool = False,
    ) -> Tensor:
        """One activation of all blocks (or iterations) as one tensor.

        Args:
            activation_name: TransformerLens's shorthand, or of an activation between iterations
                (``"state_in"``, ``"injected"``, ``"state_out"``, ``"exit_gate"``).
            layer: Only blocks before this one; ``None`` or -1: all.
            sublayer_type: As in TransformerLens, which mostly infers it.
            by_iteration: Rather ``[iteration, layer, ...]`` of the core alone.

        Returns:
            ``[block, ...]``; between iterations ``[iteration, ...]``.

        Raises:
            ValueError: ``layer`` out of range, or together with iterations.
            KeyError: The cache lacks an entry.
        """
        layout = self.layout
        between = iteration_spec(activation_name) is not None
        if (between or by_iteration) and layer not in (None, -1, layout.n_layers):
            raise ValueError("layer selects blocks; it cannot be combined with iterations")
        if between:
            states = [self[activation_name, t] for t in range(layout.n_iterations)]
            return torch.stack(states)
        depth = self._target(layer, False, None).layer
        blocks = range(layout.core_start, layout.coda_start) if by_iteration else range(depth)
        stacked = torch.stack([self[activation_name, i, sublayer_type] for i in blocks])
        if not by_iteration:
            return stacked
        return stacked.unflatten(0, (layout.n_iterations, layout.n_core))

    # What does not exist here.

    def compute_ssm_state(self, layer: int | None = None, time_step: int | None = None) -> NoReturn:
        """Not supported: looped transformers have no state-space mixers.

        Raises:
            LoopedSemanticsError: Always.
        """
        raise LoopedSemanticsError(
            "a looped transformer has no state-space mixer; the state between iterations is "
            "cache['iter.{t}.hook_state_out'] or cache.stack_activation('state_out')"
        )

    def compute_ssm_effective_attention(
        self,
        layer: int | None = None,
        include_dt_scaling: bool = False,
        per_state_coord: bool = False,
    ) -> NoReturn:
        """Not supported: looped transformers have no state-space mixers.

        Raises:
            LoopedSemanticsError: Always.
        """
        raise LoopedSemanticsError(
            "a looped transformer has no state-space mixer; its attention is cache['pattern', i]"
        )
