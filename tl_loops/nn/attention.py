"""Multi-head attention: fused, or explicit when somebody looks at scores or patterns."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.config.weights import block_tensors, query_key_norms
from tl_loops.mechanisms.block_parts import AttentionPart
from tl_loops.mechanisms.norm import Norm
from tl_loops.mechanisms.tensors import add_parameters, project_in
from tl_loops.nn.block_modules import add_block_modules
from tl_loops.nn.context import ForwardContext
from tl_loops.nn.kv_cache import FarKeys
from tl_loops.nn.rotary import apply_rotary
from tl_loops.upstream import FactoredMatrix, HookPoint, KeyValueCacheEntry, Module, has_hooks


class Attention(Module):
    """Attention with TransformerLens's weights, biases and hook points.

    Args:
        cfg: The config.
        device: Where the weights go.
        number: Of the physical layer, counted through prelude, core and coda.
    """

    W_Q: nn.Parameter
    W_O: nn.Parameter
    q_norm: Norm
    k_norm: Norm
    W_K: Tensor
    W_V: Tensor
    b_Q: Tensor
    b_K: Tensor
    b_V: Tensor
    b_O: Tensor

    kv_prefix = ""

    def __init__(
        self,
        cfg: LoopedTransformerConfig,
        device: torch.device | str | None = None,
        number: int = 0,
    ):
        super().__init__()
        self.cfg = cfg
        heads, d, d_head = cfg.n_heads, cfg.d_model, cfg.d_head
        kv_heads = cfg.n_key_value_heads or heads
        self.groups = heads // kv_heads
        self.scale = 1.0 / float(cfg.attn_scale) if cfg.use_attn_scale else 1.0
        tensors = block_tensors(cfg, number)
        add_parameters(self, tensors, "attn", cfg.dtype, device)
        biases = {"b_Q": (heads, d_head), "b_O": (d,)}
        biases |= {f"{self.kv_prefix}{name}": (kv_heads, d_head) for name in ("b_K", "b_V")}
        for name, shape in biases.items():
            if f"attn.{name}" not in tensors:  # Zero, but there: TransformerLens's tools add it.
                zeros = torch.zeros(shape, dtype=cfg.dtype, device=device)
                self.register_buffer(name, zeros, persistent=False)
        for name, length in query_key_norms(cfg).items():
            setattr(self, name, Norm(cfg, length, device))
        self._mechanisms = add_block_modules(self, cfg, number, device, "attn")

        self.hook_q = HookPoint()  # [batch, pos, head, d_head]
        self.hook_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_v = HookPoint()  # [batch, pos, kv_head, d_head]
        if cfg.positional_embedding_type == "rotary":
            self.hook_rot_q = HookPoint()
            self.hook_rot_k = HookPoint()
        self.hook_attn_scores = HookPoint()  # [batch, head, query, key]
        self.hook_pattern = HookPoint()  # [batch, head, query, key]
        self.hook_z = HookPoint()  # [batch, pos, head, d_head], what W_O reads (gated)
        self.hook_result = HookPoint()  # [batch, pos, head, d_model]

    @property
    def QK(self) -> FactoredMatrix:
        """The query-key circuit ``W_Q W_Kᵀ`` of every head."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """The output-value circuit ``W_V W_O`` of every head."""
        return FactoredMatrix(self.W_V, self.W_O)

    def forward(
        self,
        query_input: Float[Tensor, "batch pos *head_or_not d_model"],
        key_input: Float[Tensor, "batch pos *kv_head_or_not d_model"],
        value_input: Float[Tensor, "batch pos *kv_head_or_not d_model"],
        context: ForwardContext,
        past: KeyValueCacheEntry | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        parts = [p for m in self._mechanisms if (p := m.attention_part(self, context)) is not None]
        q, k, v = self._queries_keys_values(query_input, key_input, value_input, context, parts)
        for part in parts:
            q = part.queries(q)
        far = None
        if past is not None:
            k, v = past.append(k, v)
            far = getattr(past, "far", None)
        if k.shape[2] != q.shape[2]:
            k = k.repeat_interleave(self.groups, dim=2)
            v = v.repeat_interleave(self.groups, dim=2)
        if far is None:
            attend = self._attend
            for part in parts:
                attend = partial(part.attend, attend)
            z = attend(q, k, v, context, (self.hook_attn_scores, self.hook_pattern))
        else:
            z = self._beyond_window(q, k, v, context, far)
        for part in parts:
            z = part.heads(z, query_input)
        return self._output(self.hook_z(z))

    def _queries_keys_values(
        self,
        query_input: Tensor,
        key_input: Tensor,
        value_input: Tensor,
        context: ForwardContext,
        parts: list[AttentionPart],
    ) -> tuple[Tensor, Tensor, Tensor]:
        ungrouped = self.cfg.ungroup_grouped_query_attention
        kv = "" if ungrouped else self.kv_prefix
        q = self.hook_q(project_in(query_input, self.W_Q, self.b_Q))
        k = self.hook_k(project_in(key_input, getattr(self, f"{kv}W_K"), getattr(self, f"{kv}b_K")))
        v = project_in(value_input, getattr(self, f"{kv}W_V"), getattr(self, f"{kv}b_V"))
        for part in parts:
            v = part.values(v, value_input)
        v = self.hook_v(v)
        if self.cfg.qk_norm == "full":
            q = self.q_norm(q.flatten(-2)).view_as(q)
            # The norm is over distinct keys, also where hook_k showed them once a query head.
            copies = self.groups if ungrouped else 1
            distinct = k[:, :, ::copies]
            k = self.k_norm(distinct.flatten(-2)).view_as(distinct)
            k = k.repeat_interleave(copies, dim=2) if copies > 1 else k
        elif self.cfg.qk_norm == "head_weight":
            q, k = self.q_norm(q), self.k_norm(k)
        if context.cos is not None and context.sin is not None:
            layout = self.cfg.rotary_layout
            q = self.hook_rot_q(apply_rotary(q, context.cos, context.sin, layout))
            k = self.hook_rot_k(apply_rotary(k, context.cos, context.sin, layout))
        if self.cfg.qk_norm == "head":
            q, k = _unit_rms(q), _unit_rms(k)
        return q, k, v

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: ForwardContext,
        hooks: tuple[HookPoint, HookPoint],
    ) -> Tensor:
        """Fused, or explicit when somebody looks at scores or patterns (``hooks``)."""
        if any(map(has_hooks, hooks)):
            return self._explicit(q, k, v, context, *hooks)
        if torch.compiler.is_compiling():
            # Nothing can be looked at, so what is not finite makes all of it NaN.
            total = _total(q, k, v)
            return self._fused(q, k, v, context) + (total - total).to(q.dtype)
        if _fused_hides(q, k, v):
            return self._explicit(q, k, v, context, *hooks)
        return self._fused(q, k, v, context)

    def _explicit(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: ForwardContext,
        hook_attn_scores: HookPoint,
        hook_pattern: HookPoint,
    ) -> Tensor:
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) * self.scale
        pattern = self._pattern(scores, context, hook_attn_scores, hook_pattern)
        return torch.einsum("bhqk,bkhe->bqhe", pattern.to(v.dtype), v)

    def _beyond_window(
        self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext, far: FarKeys
    ) -> Tensor:
        """Attention that reads other keys and values beyond a window of the last tokens."""
        copies = q.shape[2] // far.keys.shape[2]
        far_k, far_v = (x.repeat_interleave(copies, dim=2) for x in (far.keys, far.values))
        n_new, n_keys = q.shape[1], k.shape[1]
        places = torch.arange(n_keys, device=q.device)
        near = places[n_keys - n_new :, None] - places[None, :] < far.window
        scores = torch.where(
            near,
            torch.einsum("bqhe,bkhe->bhqk", q, k),
            torch.einsum("bqhe,bkhe->bhqk", q, far_k),
        )
        hooks = (self.hook_attn_scores, self.hook_pattern)
        pattern = self._pattern(scores * self.scale, context, *hooks).to(v.dtype)
        return torch.einsum("bhqk,bkhe->bqhe", pattern * near, v) + torch.einsum(
            "bhqk,bkhe->bqhe", pattern * ~near, far_v
        )

    def _pattern(
        self,
        scores: Tensor,
        context: ForwardContext,
        hook_attn_scores: HookPoint,
        hook_pattern: HookPoint,
    ) -> Tensor:
        """Masked scores, softmax, and the hook points of both."""
        if context.allowed is not None:
            scores = scores.masked_fill(~context.allowed, -torch.inf)
        elif context.causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, -torch.inf)
        scores = hook_attn_scores(scores)
        working = scores.dtype if scores.dtype == torch.float64 else torch.float32
        if context.blind is None:
            pattern = F.softmax(scores, dim=-1, dtype=working)
        else:
            # Masked before the softmax, too: its derivative at a row of infinities is NaN.
            seen = scores.masked_fill(context.blind, 0.0)
            pattern = F.softmax(seen, dim=-1, dtype=working).masked_fill(context.blind, 0.0)
        return hook_pattern(pattern.to(scores.dtype))

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext) -> Tensor:
        z = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=context.allowed,
            is_causal=context.allowed is None and context.causal,
            scale=self.scale,
        )
        if context.blind is not None:
            z = z.masked_fill(context.blind, 0.0)
        return z.transpose(1, 2)

    def _output(self, z: Float[Tensor, "batch pos head d_head"]) -> Tensor:
        if self.cfg.use_attn_result:
            result = self.hook_result(torch.einsum("bphe,hed->bphd", z, self.W_O))
            return result.sum(2) + self.b_O
        return F.linear(z.flatten(-2), self.W_O.flatten(0, 1).T, self.b_O)


class GroupedQueryAttention(Attention):
    """Attention whose key and value heads serve several query heads.

    The weights are ``_W_K`` and ``_W_V`` ``[kv_head, ...]``; ``W_K`` and ``W_V`` repeat them once a
    query head, as in TransformerLens.
    """

    _W_K: nn.Parameter
    _W_V: nn.Parameter
    _b_K: Tensor
    _b_V: Tensor

    kv_prefix = "_"

    @property
    def W_K(self) -> Float[Tensor, "head d_model d_head"]:
        """Key weights, repeated for every query head."""
        return self._W_K.repeat_interleave(self.groups, dim=0)

    @property
    def W_V(self) -> Float[Tensor, "head d_model d_head"]:
        """Value weights, repeated for every query head."""
        return self._W_V.repeat_interleave(self.groups, dim=0)

    @property
    def b_K(self) -> Float[Tensor, "head d_head"]:
        """Key biases, repeated for every query head."""
        return self._b_K.repeat_interleave(self.groups, dim=0)

    @property
    def b_V(self) -> Float[Tensor, "head d_head"]:
        """Value biases, repeated for every query head."""
        return self._b_V.repeat_interleave(self.groups, dim=0)


def _fused_hides(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the fused kernel would give numbers where there are none.

    That of the CPU takes a row of scores that are not finite for one that sees no key, and gives
    zeros; those of GPUs keep what is not finite, and need not be waited for. A sum is finite only
    if all of its terms are.
    """
    if q.device.type != "cpu" or _transformed():
        return False
    return not math.isfinite(_total(q, k, v))


def _total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A number that is finite only if all of the three are, outside of the graph of gradients."""
    if q.requires_grad or k.requires_grad or v.requires_grad:
        q, k, v = q.detach(), k.detach(), v.detach()
    wide = torch.float32
    return q.sum(dtype=wide) + k.sum(dtype=wide) + v.sum(dtype=wide)


def _transformed() -> bool:
    """Whether torch.func is at work, under which no number can be looked at."""
    functorch: Any = vars(torch._C)["_functorch"]
    return functorch.maybe_current_level() is not None


def _unit_rms(x: Tensor) -> Tensor:
    """Weightless RMS norm per head, with the machine epsilon that ``F.rms_norm`` uses."""
    return F.rms_norm(x, (x.shape[-1],))
