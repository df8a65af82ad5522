"""What a mechanism may do inside one call of a block or of its attention."""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from tl_loops.layout.names import Branch

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

    def keep(self, branch: Branch, resid: Tensor) -> Tensor:
        """What the stream keeps where a branch is added, [batch, pos, d_model]."""
        return resid

    def add(self, branch: Branch, out: Tensor) -> Tensor:
        """What a branch adds, after the norm on its output, before ``hook_attn_out``."""
        return out


class AttentionPart:
    """What one mechanism does in one call of an attention. Every method gives what it is given."""

    def queries(self, q: Tensor) -> Tensor:
        """What the scores are made of, after norm and rotation, [batch, pos, head, d_head]."""
        return q

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


class MLPPart:
    """What one mechanism does in one call of an MLP. Every method gives what it is given."""

    def pre(self, x: Tensor) -> Tensor:
        """What the activation function gets, before ``hook_pre``, [batch, pos, d_mlp]."""
        return x

    def linear(self, x: Tensor) -> Tensor:
        """What it is multiplied with, before ``hook_pre_linear``, [batch, pos, d_mlp]."""
        return x

    def neurons(self, post: Tensor) -> Tensor:
        """What ``W_out`` reads, before ``hook_post``, [batch, pos, d_mlp]."""
        return post
