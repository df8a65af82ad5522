"""Keys and values that iterations share: fewer slots in the cache, or older keys to attend to."""

import copy
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.layout import LoopLayout
from tl_loops.mechanisms.kv_sharing import KVSharing
from tl_loops.upstream import KeyValueCache, KeyValueCacheEntry

Keys = Float[Tensor, "batch key kv_head d_head"]
NewKeys = Float[Tensor, "batch pos kv_head d_head"]


@dataclass
class _Slot:
    """Keys and values of all tokens so far, of one layer."""

    keys: Keys
    values: Keys


@dataclass
class FarKeys:
    """What a query sees beyond a window of the last tokens."""

    keys: Keys
    values: Keys
    window: int


class SlotEntry(KeyValueCacheEntry):
    """One unrolled block's view of its slot, under the interface of TransformerLens's entries."""

    def __init__(
        self,
        slot: _Slot,
        n_past: int,
        sharing: KVSharing,
        below: _Slot | None = None,
        first: _Slot | None = None,
    ):
        self._slot, self._below, self._first = slot, below, first
        self._n_past, self._sharing = n_past, sharing
        self.frozen = False

    @property
    def past_keys(self) -> Keys:
        """Keys of the slot, [batch, key, kv_head, d_head]."""
        return self._slot.keys

    @property
    def past_values(self) -> Keys:
        """Values of the slot, [batch, key, kv_head, d_head]."""
        return self._slot.values

    @property
    def far(self) -> FarKeys | None:
        """What is read beyond the window, where there is one; valid after :meth:`append`."""
        if self._sharing.kind != "window" or self._first is None:
            return None
        return FarKeys(self._first.keys, self._first.values, self._sharing.size or 1)

    def append(self, new_keys: NewKeys, new_values: NewKeys) -> tuple[Keys, Keys]:
        """Write the new tokens' keys and values, and give those that the block reads."""
        slot, n_past = self._slot, self._n_past
        if slot.keys.shape[1] > n_past:  # An earlier iteration of this call was here.
            if self._sharing.kind != "first":
                gate = self._sharing.gate
                old_keys, old_values = slot.keys[:, n_past:], slot.values[:, n_past:]
                if gate != 1.0:
                    new_keys = gate * new_keys + (1 - gate) * old_keys
                    new_values = gate * new_values + (1 - gate) * old_values
                slot.keys = torch.cat([slot.keys[:, :n_past], new_keys], dim=1)
                slot.values = torch.cat([slot.values[:, :n_past], new_values], dim=1)
            return slot.keys, slot.values
        known = slot.keys.shape[1]
        if known < n_past:  # Tokens that ran fewer iterations show their latest.
            assert self._below is not None
            slot.keys = torch.cat([slot.keys, self._below.keys[:, known:n_past]], dim=1)
            slot.values = torch.cat([slot.values, self._below.values[:, known:n_past]], dim=1)
        slot.keys = torch.cat([slot.keys, new_keys], dim=1)
        slot.values = torch.cat([slot.values, new_values], dim=1)
        return slot.keys, slot.values


class SharedKeyValueCache(KeyValueCache):
    """A key-value cache whose iterations share slots; made by ``model.make_kv_cache``.

    Attributes:
        sharing: How.
    """

    def __init__(self, cfg: Any, sharing: KVSharing, device: torch.device | str | None, batch: int):
        mask = torch.empty((batch, 0), device=device, dtype=torch.int)
        super().__init__(entries=[], previous_attention_mask=mask)
        self.sharing = sharing
        heads = cfg.n_key_value_heads or cfg.n_heads
        self._empty = torch.empty((batch, 0, heads, cfg.d_head), device=device, dtype=cfg.dtype)
        self._slots: dict[tuple[str, int], _Slot] = {}

    @property
    def n_slots(self) -> int:
        """Number of slots that hold anything: what the cache's memory is proportional to."""
        return sum(slot.keys.shape[1] > 0 for slot in self._slots.values())

    def copy(self) -> "SharedKeyValueCache":
        """A cache that goes on from here by itself; no tensor is copied."""
        twin = copy.copy(self)
        twin._slots = {key: copy.copy(slot) for key, slot in self._slots.items()}
        twin.entries = []
        return twin

    def unroll(self, layout: LoopLayout) -> None:
        """Make one entry for every unrolled block, before a forward pass."""
        first = self._slot(layout.physical_name(0), 0)
        n_past = first.keys.shape[1]
        entries: list[KeyValueCacheEntry] = []
        for index in range(layout.n_layers):
            t, name = layout.coordinate(index).iteration, layout.physical_name(index)
            number = 0 if t is None else self.sharing.slot(t)
            below = self._slot(name, number - 1) if number else None
            start = self._slot(name, 0) if number else None
            entries.append(SlotEntry(self._slot(name, number), n_past, self.sharing, below, start))
        self.entries = entries

    def _slot(self, name: str, number: int) -> _Slot:
        return self._slots.setdefault((name, number), _Slot(self._empty, self._empty))

    def freeze(self) -> NoReturn:
        """Not supported: an iteration reads what an earlier one of the same call has written.

        Raises:
            LoopedSemanticsError: Always.
        """
        raise LoopedSemanticsError(
            "a cache whose iterations share slots is written within a call, so it cannot be "
            "frozen: take cache.copy() before the call"
        )
