"""What the fields of TransformerLens's config say: about the model, or about a run of it."""

OF_THIS_RUN = frozenset(("device", "n_params", "n_layers", "seed", "tokenizer_prepends_bos"))
"""Fields of TransformerLens that follow from others, or say nothing about the model."""

CHANGES_NO_NUMBER = frozenset(
    (
        "device",
        "n_devices",
        "n_iterations",
        "n_layers",
        "seed",
        "init_weights",
        "use_attn_result",
        "use_split_qkv_input",
        "use_hook_mlp_in",
        "use_attn_in",
        "ungroup_grouped_query_attention",
    )
)
"""Fields that change no number of a model, or that a run states itself."""

SAYS_NOTHING_OF_A_RUN = frozenset(
    (
        *("checkpoint_index", "checkpoint_label_type", "checkpoint_value", "from_checkpoint"),
        *("decoder_start_token_id", "tokenizer_name", "trust_remote_code", "model_name"),
        *("init_mode", "initializer_range", "use_hook_tokens"),
        # TransformerLens fills them in for its own use.
        *("uses_rms_norm", "layer_norm_folding"),
    )
)
"""Fields about where a model comes from or how its weights were first drawn."""

DETAILS_OF_THE_UNSUPPORTED = frozenset(
    (
        *("norm_topk_prob", "relative_attention_max_distance", "relative_attention_num_buckets"),
        *("yarn_factor", "yarn_attention_factor", "yarn_beta_fast", "yarn_beta_slow"),
        *("yarn_original_max_position_embeddings", "yarn_truncate", "yarn_global_attn_only"),
        *("train_seq_length", "original_architecture"),
    )
)
"""Fields that have an effect only in models that are no looped transformers by themselves."""

SHAPES = frozenset(
    (
        "d_model",
        "d_head",
        "n_heads",
        "n_key_value_heads",
        "d_mlp",
        "d_vocab",
        "d_vocab_out",
        "n_layers",
        "gated_mlp",
        "normalization_type",
        "positional_embedding_type",
        "tie_word_embeddings",
        "post_embedding_ln",
    )
)
"""Fields of TransformerLens that stored tensors fix."""
