"""What a config must satisfy before a model is built from it."""

import dataclasses
from typing import Any

from tl_loops.arguments import is_index
from tl_loops.config.activations import ACTIVATIONS
from tl_loops.config.fields import setting_of
from tl_loops.config.ranges import check_numbers
from tl_loops.errors import ConfigError
from tl_loops.mechanisms import MECHANISMS
from tl_loops.mechanisms.exclusions import check_shared_keys, check_stacks, refuse_exclusive
from tl_loops.mechanisms.iteration_weights import check_rows
from tl_loops.mechanisms.kv_sharing import KVSharing
from tl_loops.mechanisms.mechanism import check_choice
from tl_loops.upstream import SOFTCAP_DISABLED

CHOICES: dict[str, tuple[str | None, ...]] = {
    "positional_embedding_type": ("rotary", "standard", "none"),
    "normalization_type": ("RMS", "RMSPre", "LN", "LNPre", "L2"),
    "attention_dir": ("causal", "bidirectional"),
    "act_fn": tuple(ACTIVATIONS),
}
"""Fields of TransformerLens that take one of a few names."""

UNSUPPORTED: dict[str, Any] = {
    "attn_only": False,
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
    "attn_scores_soft_cap": SOFTCAP_DISABLED,
    "use_hook_tokens": False,
    "quantization_method": None,
    "attn_types": None,
    "window_size": None,
    "init_mode": "gpt2",
}
"""Fields of the TransformerLens config that no looped architecture here has, at their off value."""

_INSTEAD = {
    "use_normalization_before_and_after": "block_norm='sandwich'",
    "use_qk_norm": "qk_norm='full' or 'head'",
    "rotary_adjacent_pairs": "rotary_layout='interleaved'",
    "final_rms": "normalization_type='RMS'",
}


def whole_iterations(n_iterations: Any) -> int:
    """A number of iterations of any integer type, as an int.

    Raises:
        ConfigError: It is not an integer of at least 1.
    """
    if not is_index(n_iterations) or int(n_iterations) < 1:
        raise ConfigError(f"n_iterations must be an integer of at least 1, got {n_iterations!r}")
    return int(n_iterations)


def check_values(cfg: Any) -> None:
    """Raise on fields that are unknown, contradict each other, or have no meaning for a loop.

    Raises:
        ConfigError: The message names the field.
    """
    if not is_index(cfg.n_iterations):
        whole_iterations(cfg.n_iterations)
    check_numbers(cfg)
    for described in dataclasses.fields(cfg):
        setting = setting_of(described)
        if setting is not None:
            check_choice(described.name, setting, getattr(cfg, described.name))
    for name, allowed in CHOICES.items():
        if getattr(cfg, name) not in allowed:
            choices = ", ".join(map(repr, allowed))
            raise ConfigError(f"{name} must be one of {choices}, got {getattr(cfg, name)!r}")
    for name, off in UNSUPPORTED.items():
        if hasattr(cfg, name) and getattr(cfg, name) != off:
            instead = f"; use {_INSTEAD[name]}" if name in _INSTEAD else ""
            raise ConfigError(
                f"{name}={getattr(cfg, name)!r} is not supported by looped models{instead}"
            )
    if cfg.norm_before_coda and cfg.norm_between_iterations:
        raise ConfigError("norm_before_coda and norm_between_iterations exclude each other")
    if cfg.own_norm_between_iterations and not cfg.norm_between_iterations:
        raise ConfigError("own_norm_between_iterations needs norm_between_iterations")
    if not cfg.final_norm and (cfg.norm_between_iterations or cfg.norm_before_coda):
        raise ConfigError(
            "final_norm=False excludes norm_between_iterations and norm_before_coda, which "
            "apply that norm"
        )
    for mechanism in MECHANISMS:
        mechanism.check(cfg)
    active = [mechanism for mechanism in MECHANISMS if mechanism.active(cfg)]
    refuse_exclusive(cfg, active)
    check_stacks(cfg, active)
    check_shared_keys(cfg, KVSharing.parse(cfg.kv_sharing))
    for mechanism in active:
        mechanism.check_iterations(cfg, cfg.n_iterations)
    check_rows(cfg, active, cfg.n_iterations)
    centred = cfg.normalization_type in ("LN", "LNPre")
    if centred and cfg.block_norm not in ("pre", "post_norm"):
        raise ConfigError(
            f"block_norm={cfg.block_norm!r} needs a norm that does not centre, "
            f"got normalization_type={cfg.normalization_type!r}"
        )
    if cfg.parallel_attn_mlp and cfg.block_norm != "pre":
        raise ConfigError(
            f"parallel_attn_mlp=True needs block_norm='pre', got {cfg.block_norm!r}: both branches "
            "read the stream that enters the block, through norms of their own"
        )
    if cfg.rotary_dim is not None and cfg.rotary_dim % 2:
        raise ConfigError(f"rotary_dim must be even, got {cfg.rotary_dim}")
    if cfg.n_key_value_heads is not None and cfg.n_heads % cfg.n_key_value_heads:
        raise ConfigError(
            f"n_heads={cfg.n_heads} must be a multiple of n_key_value_heads={cfg.n_key_value_heads}"
        )
