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
