"""What a config must satisfy before a model is built from it."""

from typing import Any

from tl_loops.config.activations import ACTIVATIONS
from tl_loops.config.mechanisms import check_mechanisms
from tl_loops.errors import ConfigError

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "block_norm": ("pre", "sandwich", "post_residual", "post_branch", "post_norm"),
    "initial_state": ("embed", "normal", "zeros", "learned"),
    "slow_initial_state": ("embed", "learned"),
    "injection": (None, "concat", "concat_injection_first", "add", "gated_diagonal"),
    "rotary_layout": ("half", "interleaved"),
    "rotary_table_dtype": (None, "bfloat16", "float16"),
    "qk_norm": (None, "full", "head", "head_weight"),
    "positional_embedding_type": ("rotary", "standard", "none"),
    "normalization_type": ("RMS", "RMSPre", "LN", "LNPre"),
    "attention_dir": ("causal", "bidirectional"),
    "act_fn": tuple(ACTIVATIONS),
}
"""Fields that take one of a few names."""

_UNSUPPORTED: dict[str, Any] = {
    "attn_only": False,
    "parallel_attn_mlp": False,
    "use_local_attn": False,
    "num_experts": None,
    "experts_per_token": None,
    "scale_attn_by_inverse_layer_idx": False,
    "use_yarn_rope": False,
    "use_dynamic_ntk_rope": False,
    "use_logn_attn": False,
    "clip_qkv": None,
    "use_attention_sinks": False,
    "rotary_base_local": None,
    "use_normalization_before_and_after": False,
    "use_qk_norm": False,
    "load_in_4bit": False,
    "final_rms": False,
    "rotary_adjacent_pairs": False,
    "n_devices": 1,
}
"""Fields of the TransformerLens config that no looped architecture here has, at their off value."""

_INSTEAD = {
    "use_normalization_before_and_after": "block_norm='sandwich'",
    "use_qk_norm": "qk_norm='full' or 'head'",
    "rotary_adjacent_pairs": "rotary_layout='interleaved'",
    "final_rms": "normalization_type='RMS'",
}


def check_values(cfg: Any) -> None:
    """Refuse fields that are unknown, contradict each other, or have no meaning for a loop.

    Raises:
        ConfigError: The message names the field.
    """
    for name, allowed in _CHOICES.items():
        if getattr(cfg, name) not in allowed:
            choices = ", ".join(map(repr, allowed))
            raise ConfigError(f"{name} must be one of {choices}, got {getattr(cfg, name)!r}")
    for name, off in _UNSUPPORTED.items():
        if hasattr(cfg, name) and getattr(cfg, name) != off:
            instead = f"; use {_INSTEAD[name]}" if name in _INSTEAD else ""
            raise ConfigError(
                f"{name}={getattr(cfg, name)!r} is not supported by looped models{instead}"
            )
    if cfg.initial_state == "normal" and not cfg.initial_state_std >= 0:
        raise ConfigError(f"initial_state_std must be at least 0, got {cfg.initial_state_std}")
    if cfg.norm_before_coda and cfg.norm_between_iterations:
        raise ConfigError("norm_before_coda and norm_between_iterations exclude each other")
    if cfg.norm_injection and cfg.injection is None:
        raise ConfigError("norm_injection needs an injection")
    if cfg.linear_before_coda and not cfg.n_coda:
        raise ConfigError("linear_before_coda needs n_coda of at least 1")
    if cfg.value_embeddings and not 1 <= cfg.value_gate_channels <= cfg.d_model:
        raise ConfigError(
            f"value_gate_channels must be between 1 and d_model={cfg.d_model}, "
            f"got {cfg.value_gate_channels}"
        )
    if cfg.exit_threshold is not None and not cfg.exit_gate:
        raise ConfigError("exit_threshold needs exit_gate=True")
    check_mechanisms(cfg)
    centred = cfg.normalization_type not in ("RMS", "RMSPre")
    if centred and cfg.block_norm not in ("pre", "post_norm"):
        raise ConfigError(
            f"block_norm={cfg.block_norm!r} needs an RMS norm, "
            f"got normalization_type={cfg.normalization_type!r}"
        )
    if cfg.stacks is not None:
        _check_stacks(cfg, cfg.stacks)
    elif cfg.slow_initial_state != "embed" or cfg.shared_stacks:
        raise ConfigError("slow_initial_state and shared_stacks need stacks")
    if not cfg.final_norm and (cfg.norm_between_iterations or cfg.norm_before_coda):
        raise ConfigError(
            "final_norm=False excludes norm_between_iterations and norm_before_coda, which "
            "apply that norm"
        )
    slices = cfg.extra_token_slices
    if cfg.n_extra_tokens < 0 or slices < 1 or cfg.n_extra_tokens % slices:
        raise ConfigError(
            f"n_extra_tokens={cfg.n_extra_tokens} must be a multiple of "
            f"extra_token_slices={slices}, and neither negative"
        )
    if cfg.first_pass_window is not None:
        if cfg.first_pass_window < 1:
            raise ConfigError(f"first_pass_window must be at least 1, got {cfg.first_pass_window}")
        if cfg.router is not None or cfg.attention_dir != "causal":
            raise ConfigError("first_pass_window needs causal attention and no router")
    if cfg.state_gate_rank is not None and cfg.state_gate_rank < 1:
        raise ConfigError(f"state_gate_rank must be at least 1, got {cfg.state_gate_rank}")
    gated = cfg.state_gate_rank is not None or cfg.halt_head
    if gated and (cfg.router is not None or cfg.hyper_connections is not None):
        raise ConfigError(
            "state_gate_rank and halt_head exclude router and hyper_connections: each says "
            "what an iteration leaves"
        )
    if cfg.time_conditioning and (cfg.n_prelude or cfg.n_coda or cfg.block_norm != "pre"):
        raise ConfigError(
            "time_conditioning needs pre-norm blocks that are all in the loop: "
            "block_norm='pre', n_prelude=0 and n_coda=0"
        )
    if cfg.prefix_mask and cfg.attention_dir != "causal":
        raise ConfigError("prefix_mask needs attention_dir='causal'")
    for name in ("rotary_dim", "n_key_value_heads"):
        value = getattr(cfg, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if cfg.rotary_dim is not None and cfg.rotary_dim % 2:
        raise ConfigError(f"rotary_dim must be even, got {cfg.rotary_dim}")
    if cfg.n_key_value_heads is not None and cfg.n_heads % cfg.n_key_value_heads:
        raise ConfigError(
            f"n_heads={cfg.n_heads} must be a multiple of n_key_value_heads={cfg.n_key_value_heads}"
        )


def _check_stacks(cfg: Any, stacks: tuple[str, ...]) -> None:
    names = [name for name in stacks if isinstance(name, str) and name.isidentifier()]
    if len(names) < len(stacks) or len(set(stacks)) != 2 or stacks.count(stacks[-1]) != 1:
        raise ConfigError(
            "stacks must name two stacks, the slow one once and last, "
            f"as ('L', 'L', 'H'), got {stacks!r}"
        )
    check_cycles(cfg, cfg.n_iterations)
    if cfg.injection not in (None, "add"):
        raise ConfigError(f"stacks need injection=None or 'add', got {cfg.injection!r}")
    for name in (
        "exit_gate",
        "step_embedding",
        "router",
        "hyper_connections",
        "first_pass_window",
        "state_gate_rank",
        "halt_head",
        "time_conditioning",
    ):
        if getattr(cfg, name):
            raise ConfigError(f"{name} is not supported with stacks")


def check_cycles(cfg: Any, n_iterations: int) -> None:
    """Refuse a number of iterations that leaves a cycle of stack calls unfinished.

    Raises:
        ConfigError: There are stacks, and the number is no multiple of a cycle.
    """
    if cfg.stacks is not None and n_iterations % len(cfg.stacks):
        raise ConfigError(
            f"n_iterations must be a multiple of {len(cfg.stacks)}, the calls of one cycle "
            f"{' '.join(cfg.stacks)}, got {n_iterations}"
        )
