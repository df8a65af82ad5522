"""One unrolled transformer block, in the published norm placements."""

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.mechanisms.block_parts import BlockPart, Branch
from tl_loops.mechanisms.norm import Norm
from tl_loops.nn.attention import Attention, GroupedQueryAttention
from tl_loops.nn.block_modules import add_block_modules
from tl_loops.nn.context import ForwardContext
from tl_loops.nn.mlp import MLP
from tl_loops.upstream import HookPoint, KeyValueCacheEntry, Module, unshared


class Block(Module):
    """A transformer block under TransformerLens's names.

    ``hook_attn_out`` and ``hook_mlp_out`` are what is added to the residual stream;
    ``hook_resid_mid`` and ``hook_resid_post`` are the stream after each add (and after the norm
    on the sum, with ``"post_residual"`` and ``"post_norm"``). ``ln1`` and ``ln2`` norm a branch's
    input, or with ``"stream"`` the stream itself, to which the branch is then added; ``ln1_post``
    and ``ln2_post`` norm its output, or with the first two the sum. With
    ``cfg.parallel_attn_mlp`` both branches read the stream that enters the block, and there is no
    ``hook_resid_mid``.

    Args:
        cfg: The config.
        device: Where the weights go.
        number: Of the physical layer, counted through prelude, core and coda.
    """

    # TransformerLens 4 asks for it before it reads the stream off ``hook_resid_post``.
    hook_out_is_single_residual_stream = True

    def __init__(
        self,
        cfg: LoopedTransformerConfig,
        device: torch.device | str | None = None,
        number: int = 0,
    ):
        super().__init__()
        self.cfg = cfg
        self.norm_sum = cfg.norms_sums
        self.norm_stream = cfg.block_norm == "stream"
        self.norm_input = cfg.block_norm not in ("post_branch", "post_norm", "stream")
        weight = cfg.block_norm_weight
        if self.norm_input or self.norm_stream:
            self.ln1 = Norm(cfg, device=device, weight=weight)
            self.ln2 = Norm(cfg, device=device, weight=weight)
        if cfg.block_norm != "pre":
            self.ln1_post = Norm(cfg, device=device, weight=weight)
            self.ln2_post = Norm(cfg, device=device, weight=weight)
        self._mechanisms = add_block_modules(self, cfg, number, device, "")
        attention = Attention if cfg.n_key_value_heads is None else GroupedQueryAttention
        self.attn = attention(cfg, device, number)
        self.mlp = MLP(cfg, device, number)

        self.hook_attn_in = HookPoint()  # [batch, pos, head, d_model], with cfg.use_attn_in
        self.hook_q_input = HookPoint()  # [batch, pos, head, d_model], with use_split_qkv_input
        self.hook_k_input = HookPoint()  # [batch, pos, kv_head, d_model]
        self.hook_v_input = HookPoint()  # [batch, pos, kv_head, d_model]
        self.hook_mlp_in = HookPoint()  # [batch, pos, d_model], with cfg.use_hook_mlp_in
        self.hook_attn_out = HookPoint()  # [batch, pos, d_model]
        self.hook_mlp_out = HookPoint()  # [batch, pos, d_model]
        self.hook_resid_pre = HookPoint()  # [batch, pos, d_model]
        if not cfg.parallel_attn_mlp:
            self.hook_resid_mid = HookPoint()  # [batch, pos, d_model]
        self.hook_resid_post = HookPoint()  # [batch, pos, d_model]

    def forward(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        context: ForwardContext,
        past: KeyValueCacheEntry | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        resid_pre = self.hook_resid_pre(unshared(resid_pre, self.hook_resid_pre))

        parts = [p for m in self._mechanisms if (p := m.block_part(self, context)) is not None]
        stream = self.ln1(resid_pre) if self.norm_stream else resid_pre
        inputs = self._attention_inputs(stream, parts)
        attn_out = self.attn(*inputs, context=context, past=past)
        for part in parts:
            attn_out = part.write("attn", attn_out)
        resid_mid = self._add("attn", stream, attn_out, parts)
        if self.cfg.parallel_attn_mlp:
            mlp_in = resid_pre
        else:
            resid_mid = self.hook_resid_mid(resid_mid)
            mlp_in = resid_mid = self.ln2(resid_mid) if self.norm_stream else resid_mid

        mlp_in = self.hook_mlp_in(mlp_in.clone()) if self.cfg.use_hook_mlp_in else mlp_in
        mlp_out = self.mlp(self._read("mlp", mlp_in, parts))
        for part in parts:
            mlp_out = part.write("mlp", mlp_out)
        resid_post = self._add("mlp", resid_mid, mlp_out, parts)
        return self.hook_resid_post(resid_post)

    def _read(self, branch: Branch, x: Tensor, parts: list[BlockPart]) -> Tensor:
        """What a branch reads of the stream."""
        if self.norm_input:
            x = self.ln1(x) if branch == "attn" else self.ln2(x)
        for part in parts:
            x = part.read(branch, x)
        return x

    def _add(self, branch: Branch, resid: Tensor, out: Tensor, parts: list[BlockPart]) -> Tensor:
        """The stream after a branch, and the norm on its output or on the sum."""
        attention = branch == "attn"
        hook = self.hook_attn_out if attention else self.hook_mlp_out
        post_norm = None
        if self.cfg.block_norm != "pre":
            post_norm = self.ln1_post if attention else self.ln2_post
            out = out if self.norm_sum else post_norm(out)
        for part in parts:
            resid, out = part.keep(branch, resid), part.add(branch, out)
        total = resid + hook(out)
        return post_norm(total) if post_norm is not None and self.norm_sum else total

    def _attention_inputs(
        self, resid: Tensor, parts: list[BlockPart]
    ) -> tuple[Tensor, Tensor, Tensor]:
        cfg = self.cfg
        if not (cfg.use_attn_in or cfg.use_split_qkv_input):
            x = self._read("attn", resid, parts)
            return x, x, x
        if cfg.use_split_qkv_input:
            ungrouped = cfg.ungroup_grouped_query_attention
            kv_heads = cfg.n_heads if ungrouped else cfg.n_key_value_heads or cfg.n_heads
            inputs = (
                self.hook_q_input(_per_head(resid, cfg.n_heads)),
                self.hook_k_input(_per_head(resid, kv_heads)),
                self.hook_v_input(_per_head(resid, kv_heads)),
            )
        else:
            inputs = (self.hook_attn_in(_per_head(resid, cfg.n_heads)),) * 3
        q, k, v = (self._read("attn", x, parts) for x in inputs)
        return q, k, v


def _per_head(resid: Tensor, heads: int) -> Float[Tensor, "batch pos head d_model"]:
    return resid.unsqueeze(2).repeat(1, 1, heads, 1)
