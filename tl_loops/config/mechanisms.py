"""What a loop may do besides running its core: the fields that say so, checked and described.

Step embeddings (Universal Transformer), adaptive halting (ACT, PonderNet), routing of tokens to
depths (Mixture-of-Recursions) and hyper-connections after each loop (Hyperloop).
"""

from typing import TYPE_CHECKING

from tl_loops.config.kv_sharing import KVSharing
from tl_loops.errors import ConfigError

if TYPE_CHECKING:  # the config is checked and described here
    from tl_loops.config.config import LoopedTransformerConfig

CHOICES: dict[str, tuple[str | None, ...]] = {
    "step_embedding": (None, "sinusoidal", "position_and_step", "learned"),
    "halting": (None, "act", "ponder"),
    "router": (None, "token_choice"),
    "router_score": ("softmax", "sigmoid"),
    "router_gates": ("every", "last"),
}
"""Fields that take one of a few names."""


def check_mechanisms(cfg: "LoopedTransformerConfig") -> None:
    """Refuse values out of range and combinations that have no published meaning.

    Raises:
        ConfigError: The message names the field and what to use instead.
    """
    if cfg.router == "expert_choice":
        raise ConfigError(
            "router='expert_choice' is not causal: which tokens go on is a top-k over the whole "
            "sequence, so a later token changes earlier logits; use router='token_choice'"
        )
    for name, allowed in CHOICES.items():
        if getattr(cfg, name) not in allowed:
            choices = ", ".join(map(repr, allowed))
            raise ConfigError(f"{name} must be one of {choices}, got {getattr(cfg, name)!r}")
    _check_halting(cfg)
    if cfg.step_embedding in ("sinusoidal", "position_and_step") and cfg.d_model % 2:
        raise ConfigError(f"step_embedding={cfg.step_embedding!r} needs an even d_model")
    if cfg.hyper_connections is not None and cfg.hyper_connections < 2:
        raise ConfigError(
            f"hyper_connections is a number of streams of at least 2, got {cfg.hyper_connections}"
        )
    if not cfg.router_scale > 0:
        raise ConfigError(f"router_scale must be above 0, got {cfg.router_scale}")
    whole = {
        "halting='act'": cfg.halting == "act",
        "router": cfg.router is not None,
        "hyper_connections": cfg.hyper_connections is not None,
    }
    several = [name for name, present in whole.items() if present]
    if len(several) > 1:
        raise ConfigError(
            f"{' and '.join(several)} exclude each other: each says what leaves the loop"
        )
    if several and several != ["halting='act'"] and cfg.norm_between_iterations:
        raise ConfigError(f"{several[0]} and norm_between_iterations exclude each other")
    check_kv_sharing(cfg, KVSharing.parse(cfg.kv_sharing))
    check_iterations(cfg, cfg.n_iterations)


def check_kv_sharing(cfg: "LoopedTransformerConfig", sharing: KVSharing | None) -> None:
    """Refuse sharing where iterations do not run the same layers on the same tokens.

    Raises:
        ConfigError: The model routes its tokens, has two stacks, or reads the first iteration's
            keys by itself.
    """
    if sharing is None:
        return
    if cfg.router is not None:
        raise ConfigError(
            "kv_sharing and router exclude each other: routes decide which keys there are"
        )
    if cfg.first_pass_window is not None:
        raise ConfigError(
            "kv_sharing and first_pass_window exclude each other: later iterations of this model "
            "read the first one's keys already, by a trained gate"
        )
    if cfg.stacks is not None:
        raise ConfigError(
            "kv_sharing and stacks exclude each other: iterations of two stacks run other layers"
        )


def _check_halting(cfg: "LoopedTransformerConfig") -> None:
    if cfg.halting is not None and not cfg.exit_gate:
        raise ConfigError(f"halting={cfg.halting!r} needs exit_gate=True, which it reads")
    if cfg.halting == "ponder" and cfg.n_coda:
        raise ConfigError(
            "halting='ponder' reads every state out, but n_coda is "
            f"{cfg.n_coda}: a coda would run once an iteration; use n_coda=0"
        )
    if cfg.halting == "act" and cfg.exit_threshold is not None:
        raise ConfigError("halting='act' and exit_threshold exclude each other")
    if not 0.0 <= cfg.act_epsilon < 1.0:
        raise ConfigError(f"act_epsilon must be at least 0 and below 1, got {cfg.act_epsilon}")


def check_iterations(cfg: "LoopedTransformerConfig", n_iterations: int) -> None:
    """Refuse a number of iterations that the weights of single iterations do not cover.

    Raises:
        ConfigError: There are more iterations than weights, or a router shares out other depths.
    """
    limit = cfg.max_iterations
    if limit is None:
        return
    if limit < 1:
        raise ConfigError(f"max_iterations must be at least 1, got {limit}")
    if cfg.router is not None and n_iterations != limit:
        raise ConfigError(
            f"the router shares tokens out among {limit} depths, so n_iterations is "
            f"max_iterations = {limit}, got {n_iterations}"
        )
    if n_iterations > limit and has_iteration_weights(cfg):
        raise ConfigError(
            f"n_iterations={n_iterations} is more than the max_iterations={limit} that this model "
            "has weights for"
        )


def has_iteration_weights(cfg: "LoopedTransformerConfig") -> bool:
    """Whether some weight has a row of its own for every iteration."""
    learned = cfg.step_embedding == "learned"
    return learned or cfg.router is not None or cfg.hyper_connections is not None


def mechanism_lines(cfg: "LoopedTransformerConfig") -> list[str]:
    """What the mechanisms do, one line each, for the data flow."""
    lines = []
    if cfg.step_embedding is not None:
        what = {
            "sinusoidal": "sinusoids of t + 1",
            "position_and_step": "sinusoids of the position plus sinusoids of t + 1",
            "learned": "W_E[t]",
        }[cfg.step_embedding]
        lines.append(f"step     s += {what}, before each iteration t")
    if cfg.halting == "act":
        lines.append(
            "halting  p_t = σ(gate(s_t)) until the sum reaches "
            f"{1 - cfg.act_epsilon:.4g}, then the rest; s = Σ p_t s_t"
        )
    elif cfg.halting == "ponder":
        lines.append("halting  p_t = σ(gate(s_t)) Π_{j<t} (1 - σ(gate(s_j))); the last: the rest")
    if cfg.router is not None:
        scale = "" if cfg.router_scale == 1.0 else f"{cfg.router_scale:.4g}·"
        gate = "g_t x" if cfg.router_gates == "every" else "x"
        lines.append(
            f"router   g = {scale}{cfg.router_score}(s W), depth i = argmax g; "
            f"s = {gate} for t < i, g_i x + s_0 at t = i, then unchanged"
        )
    if cfg.hyper_connections is not None:
        lines.append(
            f"streams  {cfg.hyper_connections} streams S; r, w, k = σ(rms(S) W_t + b_t); "
            "x enters as Σ r S; S = k S + 2w (x + W_E[t]); s = mean S"
        )
    if cfg.kv_sharing is not None:
        lines.append(f"keys     and values are shared across iterations: {cfg.kv_sharing}")
    return lines
