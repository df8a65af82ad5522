"""Token embedding, learned positions and unembedding under TransformerLens's names."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.config.weights import physical_tensors
from tl_loops.mechanisms.norm import Norm
from tl_loops.mechanisms.tensors import add_parameters
from tl_loops.upstream import HookPoint


class Embed(nn.Module):
    """``W_E[tokens]``, times ``cfg.embed_scale``; normed with ``cfg.post_embedding_ln``.

    Tokens after the vocabulary take rows of ``W_extra`` (``cfg.n_extra_tokens``), and after
    these zeros.
    """

    W_E: nn.Parameter
    W_extra: nn.Parameter

    def __init__(self, cfg: LoopedTransformerConfig, device: torch.device | str | None = None):
        super().__init__()
        self.scale = cfg.embed_scale
        self.n_extra = cfg.n_extra_tokens
        add_parameters(self, physical_tensors(cfg), "embed", cfg.dtype, device)
        self.ln = Norm(cfg, device=device) if cfg.post_embedding_ln else None

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        embedded = self._extended(tokens) if self.n_extra else F.embedding(tokens, self.W_E)
        embedded = embedded if self.scale == 1.0 else embedded * self.scale
        return embedded if self.ln is None else self.ln(embedded)

    def _extended(self, tokens: Tensor) -> Tensor:
        """Rows of the vocabulary, of what follows it, and zeros."""
        last = self.W_E.shape[0] - 1
        beyond = tokens - last - 1
        extra = F.embedding(beyond.clamp(0, self.n_extra - 1), self.W_extra)
        extra = extra * (beyond < self.n_extra).unsqueeze(-1)
        known = F.embedding(tokens.clamp(max=last), self.W_E)
        return torch.where((beyond < 0).unsqueeze(-1), known, extra)


class PosEmbed(nn.Module):
    """Learned absolute positions ``W_pos``; padded positions get none."""

    W_pos: nn.Parameter

    def __init__(self, cfg: LoopedTransformerConfig, device: torch.device | str | None = None):
        super().__init__()
        add_parameters(self, physical_tensors(cfg), "pos_embed", cfg.dtype, device)

    def at(self, positions: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The embeddings of absolute positions."""
        return F.embedding(positions, self.W_pos)

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch key"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """As in TransformerLens, so that ``embed(tokens) + pos_embed(tokens)`` is the stream.

        Args:
            tokens: The tokens whose positions are embedded; their ids do not matter.
            past_kv_pos_offset: Number of tokens before them.
            attention_mask: 1 for tokens, 0 for padding, over those before and these.
        """
        n_past, n_keys = past_kv_pos_offset, past_kv_pos_offset + tokens.shape[1]
        if attention_mask is None:
            return self.at(torch.arange(n_past, n_keys, device=tokens.device).expand(tokens.shape))
        return self.at((attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, n_past:])


class Unembed(nn.Module):
    """``x W_U + b_U``; with ``cfg.tie_word_embeddings`` W_U is the transposed embedding itself.

    With ``cfg.logit_scale`` each token's logit is then multiplied by :attr:`token_scale`: W_U stays
    the stored weight.
    """

    _embed: Embed
    W_U: Tensor
    b_U: Tensor
    w: nn.Parameter

    def __init__(
        self,
        cfg: LoopedTransformerConfig,
        embed: Embed,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.tied = cfg.tie_word_embeddings
        self.logit_scale: float | None = cfg.logit_scale
        if self.tied:
            # A plain reference: the embedding owns the weight.
            object.__setattr__(self, "_embed", embed)
        add_parameters(self, physical_tensors(cfg), "unembed", cfg.dtype, device)
        if not cfg.unembed_bias:
            zeros = torch.zeros(cfg.d_vocab_out, dtype=cfg.dtype, device=device)
            self.register_buffer("b_U", zeros, persistent=False)
        self.hook_in = HookPoint()  # [batch, pos, d_model]
        self.hook_out = HookPoint()  # [batch, pos, d_vocab]

    def __getattr__(self, name: str):
        if name == "W_U" and self.__dict__.get("tied"):
            return self.__dict__["_embed"].W_E.T
        return super().__getattr__(name)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch read d_vocab"]:
        # A hook on hook_in may keep the positions alone that somebody wants to read.
        logits = F.linear(self.hook_in(x), self.W_U.T, self.b_U)
        scale = self.token_scale
        if scale is not None:
            logits = (logits.to(scale.dtype) * scale).to(logits.dtype)
        return self.hook_out(logits)

    @property
    def token_scale(self) -> Float[Tensor, "d_vocab"] | None:
        """What each token's logit is multiplied by, in float32 or better; ``None``: it is not."""
        if self.logit_scale is None:
            return None
        return self.w.to(torch.promote_types(self.w.dtype, torch.float32)) * self.logit_scale

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
