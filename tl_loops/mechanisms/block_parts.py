"""What a mechanism may do inside one call of a block or of its attention."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from torch import Tensor

Branch: TypeAlias = Literal["attn", "mlp"]

Context: TypeAlias = Any
"""A :class:`tl_loops.nn.context.ForwardContext`, which stands above the mechanisms."""

Attend: TypeAlias = Callable[..., Tensor]
"""``attend(q, k, v, context, hooks)``: what the heads read, [batch, pos, head, d_head]; ``hooks``
are the hook points of its scores and of its pattern."""


class BlockPart:
    """What one mechanism does in one call of a block. Every method gives what it is given."""

    def read(self, branch: Branch, x: Tensor) -> Tensor:
        """What a branch reads, after the norm before it, [batch, pos, (head,) d_model]."""
        return x

    def write(self, branch: Branch, out: Tensor) -> Tensor:
        """What a branch writes, before the norm after it, [batch, pos, d_model]."""
        return out


class AttentionPart:
    """What one mechanism does in one call of an attention. Every method gives what it is given."""

    def values(self, v: Tensor, value_input: Tensor) -> Tensor:
        """The values, before ``hook_v``, [batch, pos, kv_head, d_head]."""
        return v

    def attend(
        self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, context: Context, hooks: Any
    ) -> Tensor:
        """What the heads read; ``attend`` is attention as it is without this mechanism."""
        return attend(q, k, v, context, hooks)

    def heads(self, z: Tensor, query_input: Tensor) -> Tensor:
        """What the heads give to ``W_O``, before ``hook_z``, [batch, pos, head, d_head]."""
        return z
