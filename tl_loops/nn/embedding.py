"""Token embedding, learned positions and unembedding under TransformerLens's names."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.nn.mlp import transposed_parameter
from tl_loops.nn.norm import Norm
from tl_loops.upstream import HookPoint


class Embed(nn.Module):
    """``W_E[tokens]``, times ``cfg.embed_scale``; normed with ``cfg.post_embedding_ln``.

    Tokens behind the vocabulary take rows of ``W_extra`` (``cfg.n_extra_tokens``), and behind
    these zeros.
    """

    def __init__(self, cfg: LoopedTransformerConfig, device: torch.device | str | None = None):
        super().__init__()
        self.scale = cfg.embed_scale
        self.W_E = nn.Parameter(
            torch.empty(cfg.d_vocab, cfg.d_model, dtype=cfg.dtype, device=device)
        )
        self.n_extra = cfg.n_extra_tokens
        if self.n_extra:
            self.W_extra = nn.Parameter(
                torch.empty(self.n_extra, cfg.d_model, dtype=cfg.dtype, device=device)
            )
        self.ln = Norm(cfg, device=device) if cfg.post_embedding_ln else None

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        embedded = self._extended(tokens) if self.n_extra else F.embedding(tokens, self.W_E)
        embedded = embedded if self.scale == 1.0 else embedded * self.scale
        return embedded if self.ln is None else self.ln(embedded)

    def _extended(self, tokens: Tensor) -> Tensor:
        """Rows of the vocabulary, of what stands behind it, and zeros."""
        last = self.W_E.shape[0] - 1
        behind = tokens - last - 1
        extra = F.embedding(behind.clamp(0, self.n_extra - 1), self.W_extra)
        extra = extra * (behind < self.n_extra).unsqueeze(-1)
        known = F.embedding(tokens.clamp(max=last), self.W_E)
        return torch.where((behind < 0).unsqueeze(-1), known, extra)


class PosEmbed(nn.Module):
    """Learned absolute positions ``W_pos``; padded positions get none."""

    def __init__(self, cfg: LoopedTransformerConfig, device: torch.device | str | None = None):
        super().__init__()
        self.W_pos = nn.Parameter(
            torch.empty(cfg.n_ctx, cfg.d_model, dtype=cfg.dtype, device=device)
        )

    def forward(self, positions: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return F.embedding(positions, self.W_pos)


class Unembed(nn.Module):
    """``x W_U + b_U``; with ``cfg.tie_word_embeddings`` W_U is the transposed embedding itself."""

    _embed: Embed
    b_U: Tensor

    def __init__(
        self,
        cfg: LoopedTransformerConfig,
        embed: Embed,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.tied = cfg.tie_word_embeddings
        if self.tied:
            # A plain reference: the embedding owns the weight.
            object.__setattr__(self, "_embed", embed)
        else:
            self.W_U = transposed_parameter(cfg.d_model, cfg.d_vocab_out, cfg.dtype, device)
        bias = torch.zeros(cfg.d_vocab_out, dtype=cfg.dtype, device=device)
        if cfg.unembed_bias:
            self.b_U = nn.Parameter(bias)
        else:
            self.register_buffer("b_U", bias, persistent=False)
        self.hook_in = HookPoint()  # [batch, pos, d_model]
        self.hook_out = HookPoint()  # [batch, pos, d_vocab]

    def __getattr__(self, name: str):
        if name == "W_U" and self.__dict__.get("tied"):
            return self.__dict__["_embed"].W_E.T
        return super().__getattr__(name)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch read d_vocab"]:
        # A hook on hook_in may keep the positions alone that somebody wants to read.
        return self.hook_out(F.linear(self.hook_in(x), self.W_U.T, self.b_U))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.tied:  # TransformerLens's name for it, as a view
            weight = self.W_U
            destination[f"{prefix}W_U"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        tied = state_dict.get(f"{prefix}W_U") if self.tied else None
        super()._load_from_state_dict(
            {k: v for k, v in state_dict.items() if not (self.tied and k == f"{prefix}W_U")},
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if tied is not None:
            if f"{prefix}W_U" in unexpected_keys:
                unexpected_keys.remove(f"{prefix}W_U")
            # The embedding stands before this module, so its new values are in place by now.
            if not torch.equal(tied.to(self.W_U), self.W_U):
                error_msgs.append(
                    f"{prefix}W_U differs from the transposed embedding, but this model ties them"
                )
