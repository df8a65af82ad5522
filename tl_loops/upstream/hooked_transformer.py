"""What takes HookedTransformer's place on TransformerLens 4.x, where it no longer exists."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache, FactoredMatrix, HookedRootModule
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.utilities import lm_cross_entropy_loss

from tl_loops.errors import UnknownModelError
from tl_loops.upstream.text import TextMethods


class Output(NamedTuple):
    """Logits and loss of one call with ``return_type="both"``."""

    logits: Float[Tensor, "batch pos d_vocab"]
    loss: Float[Tensor, "..."]


class HookedTransformer(TextMethods, HookedRootModule):
    """Base of LoopedTransformer, with what 3.9's HookedTransformer gives it; loads looped models.

    ``HookedTransformer.from_pretrained`` loads looped names as on 3.9. For all others
    TransformerLens 4 has ``TransformerBridge.boot_transformers``.
    """

    embed: Any
    unembed: Any
    pos_embed: Any
    blocks: Any
    W_Q: Any
    W_K: Any
    W_V: Any
    W_O: Any

    def __init__(self, *args: Any, **kwargs: Any):
        raise UnknownModelError(
            "HookedTransformer was removed in TransformerLens 4.0, and tl_loops only stands in for "
            "loading looped models: build one with tl_loops.LoopedTransformer(cfg), any other with "
            "transformer_lens.model_bridge.TransformerBridge.boot_transformers(name)"
        )

    @classmethod
    def from_pretrained(cls, model_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load a looped model.

        Raises:
            UnknownModelError: Another name: TransformerBridge is what to call.
        """
        raise UnknownModelError(
            f"{str(model_name)!r} is not a looped model that tl_loops loads, and HookedTransformer "
            "was removed in TransformerLens 4.0: call TransformerBridge.boot_transformers(name) of "
            "transformer_lens.model_bridge, then enable_compatibility_mode() on what it gives; "
            "`tl-loops models` lists the looped models"
        )

    @classmethod
    def from_pretrained_no_processing(cls, model_name: str, *args: Any, **kwargs: Any) -> Any:
        """:meth:`from_pretrained` without folding and centring.

        Raises:
            UnknownModelError: Another name.
        """
        return cls.from_pretrained(model_name, *args, **kwargs)

    # Running.

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        per_token: bool = False,
    ) -> Float[Tensor, "..."]:
        """Cross-entropy of the next token.

        Args:
            logits: What the model gives.
            tokens: Its input.
            attention_mask: 1 for tokens, 0 for padding.
            per_token: Whether to keep the position axis, without its last place.
        """
        return lm_cross_entropy_loss(logits, tokens.to(logits.device), attention_mask, per_token)

    def run_with_cache(
        self,
        *model_args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run and cache activations, by default as an ActivationCache."""
        output, cache = super().run_with_cache(
            *model_args, remove_batch_dim=remove_batch_dim, **kwargs
        )
        if return_cache_object:
            cache = ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)
        return output, cache

    def get_pos_offset(
        self, past_kv_cache: TransformerLensKeyValueCache | None, batch_size: int
    ) -> int:
        """The number of tokens in a key-value cache.

        Args:
            past_kv_cache: The cache, or ``None``.
            batch_size: That of the new tokens.

        Raises:
            ValueError: The cache is of another batch size, number of heads or head size.
        """
        if past_kv_cache is None:
            return 0
        batch, length, heads, d_head = past_kv_cache[0].past_keys.shape
        expected = (batch_size, self.cfg.n_key_value_heads or self.cfg.n_heads, self.cfg.d_head)
        if (batch, heads, d_head) != expected:
            raise ValueError(
                f"the key-value cache is of (batch, heads, d_head) = {(batch, heads, d_head)}, "
                f"expected {expected}"
            )
        return length

    # Optional hook points.

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether ``attn.hook_result`` fires: what each head writes."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether ``hook_q_input``, ``hook_k_input`` and ``hook_v_input`` fire."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether ``hook_mlp_in`` fires."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Whether ``hook_attn_in`` fires.

        Raises:
            AssertionError: Keys are grouped.
        """
        assert self.cfg.n_key_value_heads is None, (
            "attn_in has one input a query head, which grouped keys cannot read: "
            "use split_qkv_input instead"
        )
        self.cfg.use_attn_in = use_attn_in

    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Whether grouped keys and values are shown once a query head."""
        self.cfg.ungroup_grouped_query_attention = ungroup_grouped_query_attention

    # Weights.

    @property
    def n_params_total(self) -> int:
        """The number of trained scalars."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        """The bias of the unembedding."""
        return self.unembed.b_U

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding."""
        return self.embed.W_E

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """Learned positions."""
        return self.pos_embed.W_pos

    @property
    def W_E_pos(self) -> Float[Tensor, "d_vocab_and_n_ctx d_model"]:
        """Embedding and learned positions, one below the other."""
        return torch.cat([self.W_E, self.W_pos])

    @property
    def QK(self) -> FactoredMatrix:
        """Query-key circuits, W_Q W_Kᵀ."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """Output-value circuits, W_V W_O."""
        return FactoredMatrix(self.W_V, self.W_O)

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "*tokens d_model"]:
        """The column of ``W_U`` of every token.

        Args:
            tokens: Text of one token, an id, or ids of any shape (a single one loses its axes).
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        if isinstance(tokens, int) or tokens.numel() == 1:
            return self.W_U[:, int(tokens)]
        return self.W_U[:, tokens].movedim(0, -1)

    # Devices.

    def cuda(self, device: Any = None) -> Any:
        """Move to a CUDA device, given by number or name; ``None``: the current one."""
        if device is None:
            return self.to("cuda")
        return self.to(f"cuda:{device}" if isinstance(device, int) else device)

    def cpu(self) -> Any:
        """Move to the CPU."""
        return self.to(torch.device("cpu"))

    def mps(self) -> Any:
        """Move to Apple's GPU."""
        return self.to(torch.device("mps"))
