"""The config that LoopedTransformerConfig extends on TransformerLens 4.x.

There TransformerLensConfig holds two dozen fields, and the others belong to the bridge. The fields
here are those of HookedTransformerConfig in 3.9, with its defaults, so that a looped config and its
files are the same on both lines.
"""

import math
from dataclasses import dataclass

from transformer_lens.config import TransformerLensConfig
from transformer_lens.utilities import SOFTCAP_DISABLED, SUPPORTED_ACTIVATIONS, get_device


@dataclass(repr=False)
class BaseConfig(TransformerLensConfig):
    """TransformerLensConfig with the remaining fields of 3.9's HookedTransformerConfig."""

    model_name: str = "custom"
    original_architecture: str | None = None
    trust_remote_code: bool = False
    from_checkpoint: bool = False
    checkpoint_index: int | None = None
    checkpoint_label_type: str | None = None
    checkpoint_value: int | None = None
    quantization_method: str | None = None
    load_in_4bit: bool = False
    n_devices: int = 1
    n_params: int | None = None
    # Initialisation.
    seed: int | None = None
    init_mode: str = "gpt2"
    initializer_range: float = -1.0
    init_weights: bool = True
    # Tokens.
    tokenizer_name: str | None = None
    tokenizer_prepends_bos: bool | None = None
    d_vocab_out: int = -1
    tie_word_embeddings: bool = False
    decoder_start_token_id: int | None = None
    post_embedding_ln: bool = False
    output_logits_soft_cap: float = SOFTCAP_DISABLED
    # Optional hook points.
    use_hook_tokens: bool = False
    use_hook_mlp_in: bool = False
    use_attn_in: bool = False
    ungroup_grouped_query_attention: bool = False
    # Attention.
    attention_dir: str = "causal"
    use_attn_scale: bool = True
    attn_scale: float = -1.0
    attn_scores_soft_cap: float = SOFTCAP_DISABLED
    scale_attn_by_inverse_layer_idx: bool = False
    use_qk_norm: bool = False
    clip_qkv: float | None = None
    use_attention_sinks: bool = False
    use_logn_attn: bool = False
    train_seq_length: int | None = None
    use_local_attn: bool = False
    window_size: int | None = None
    attn_types: list | None = None
    relative_attention_max_distance: int | None = None
    relative_attention_num_buckets: int | None = None
    # Rotary positions.
    rotary_dim: int | None = None
    rotary_base: float | int = 10000
    rotary_base_local: float | int | None = None
    rotary_scaling_factor: float = 1.0
    rotary_adjacent_pairs: bool = False
    use_dynamic_ntk_rope: bool = False
    use_NTK_by_parts_rope: bool = False
    NTK_by_parts_low_freq_factor: float = 1.0
    NTK_by_parts_high_freq_factor: float = 4.0
    NTK_by_parts_factor: float = 8.0
    NTK_original_ctx_len: int = 8192
    use_yarn_rope: bool = False
    yarn_factor: float = 1.0
    yarn_attention_factor: float = 1.0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_truncate: bool = True
    yarn_global_attn_only: bool = False
    # Blocks.
    parallel_attn_mlp: bool = False
    use_normalization_before_and_after: bool = False
    norm_topk_prob: bool = False

    def __post_init__(self) -> None:
        if self.device is None:
            self.device = str(get_device())
        super().__post_init__()
        if self.act_fn not in SUPPORTED_ACTIVATIONS:
            raise ValueError(f"act_fn={self.act_fn!r} must be one of {SUPPORTED_ACTIVATIONS}")
        if self.initializer_range < 0:
            gpt2 = self.init_mode == "gpt2"
            self.initializer_range = 0.8 / math.sqrt(self.d_model) if gpt2 else 1.0
        if self.d_vocab_out == -1:
            self.d_vocab_out = self.d_vocab
        if self.positional_embedding_type == "rotary" and self.rotary_dim is None:
            self.rotary_dim = self.d_head
        if self.use_attn_scale and self.attn_scale == -1.0:
            self.attn_scale = math.sqrt(self.d_head)
        if self.default_prepend_bos not in (True, False):
            raise ValueError(
                f"default_prepend_bos must be True or False, got {self.default_prepend_bos!r}"
            )

    def is_layer_norm_activation(self) -> bool:
        """Whether the activation function ends in a LayerNorm (``"solu_ln"``, ``"gelu_ln"``)."""
        return self.act_fn.endswith("_ln")
