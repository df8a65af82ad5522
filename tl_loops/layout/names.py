"""Every hook point that exists."""

from tl_loops.errors import did_you_mean

ITERATION_HOOKS = (
    "hook_state_in",
    "hook_other_in",
    "hook_condition",
    "hook_state_gate",
    "hook_halt_logit",
    "hook_injected",
    "hook_state_out",
    "hook_exit_gate",
    "hook_step_embedding",
    "hook_halting",
    "hook_router_weight",
    "hook_hyper_read",
    "hook_hyper_write",
    "hook_hyper_keep",
)
"""Names (behind ``iter.{t}.``) of the hook points between iterations."""


_ATTENTION_NAMES = ("q", "k", "v", "z", "rot_q", "rot_k", "result", "pattern", "attn_scores")


_MLP_NAMES = ("pre", "pre_linear", "post", "mid")


_BLOCK_NAMES = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_in",
    "attn_out",
    "mlp_in",
    "mlp_out",
    "q_input",
    "k_input",
    "v_input",
)


def activation_name(name: str) -> str:
    """The part of a hook name behind ``blocks.{i}.`` for a TransformerLens shorthand.

    Args:
        name: A shorthand such as ``"pattern"`` or ``"resid_pre"``, or a name that is already the
            full rest (``"attn.hook_pattern"``, ``"ln1.hook_scale"``), which is returned as it is.

    Raises:
        ValueError: The name is not known; near matches are suggested.
    """
    if "hook_" in name:
        return name
    if name in _ATTENTION_NAMES:
        return f"attn.hook_{name}"
    if name in _MLP_NAMES:
        return f"mlp.hook_{name}"
    if name in _BLOCK_NAMES:
        return f"hook_{name}"
    known = [*_BLOCK_NAMES, *_ATTENTION_NAMES, *_MLP_NAMES]
    raise ValueError(f"unknown activation name {name!r}: {did_you_mean(name, known)}")
