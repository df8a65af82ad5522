"""The data flow of a looped model in words and formulas."""

from typing import TYPE_CHECKING

from tl_loops.config.mechanisms import mechanism_lines

if TYPE_CHECKING:  # the config describes itself by this
    from tl_loops.config.config import LoopedTransformerConfig


def data_flow(cfg: "LoopedTransformerConfig") -> str:
    """The data flow of one forward pass in a few lines."""
    block = {
        "pre": "x += attn(ln1(x)); x += mlp(ln2(x))",
        "sandwich": "x += ln1_post(attn(ln1(x))); x += ln2_post(mlp(ln2(x)))",
        "post_residual": "x = ln1_post(x + attn(ln1(x))); x = ln2_post(x + mlp(ln2(x)))",
        "post_branch": "x += ln1_post(attn(x)); x += ln2_post(mlp(x))",
        "post_norm": "x = ln1_post(x + attn(x)); x = ln2_post(x + mlp(x))",
    }[cfg.block_norm]
    start = {
        "embed": "s = e",
        "normal": f"s ~ N(0, {cfg.initial_state_std:.4g}²), truncated at 3σ, "
        + (f"seed {cfg.state_seed}" if cfg.state_seed is not None else "drawn afresh"),
        "zeros": "s = 0",
        "learned": "s = learned vector",
    }[cfg.initial_state]
    inject = {
        None: "x = s",
        "concat": "x = [s, e] W",
        "concat_injection_first": "x = [e, s] W",
        "add": "x = s + e",
        "gated_diagonal": "x = s·exp(-Δ·exp(A)) + Δ·(e Bᵀ)",
    }[cfg.injection]
    scale = f" · {cfg.embed_scale:.4g}" if cfg.embed_scale != 1.0 else ""
    embed = f"W_E[tokens]{scale}"
    embed = f"ln({embed})" if cfg.post_embedding_ln else embed
    if cfg.stacks is not None:
        return _of_stacks(cfg, embed, block)
    after = "s = ln_final(x)" if cfg.norm_between_iterations else "s = x"
    if cfg.state_gate_rank is not None:
        after = f"x = g·x + (1 - g)·s, g = exp(-softplus(W(x - s))·exp(A)); {after}"
    gate = "; gate(s)" if cfg.exit_gate else ""
    e = "ln_injection(x)" if cfg.norm_injection else "x"
    lines = [
        f"{cfg.model_name} {cfg.notation}, {cfg.n_params:,} parameters",
        f"embed    x = {embed}",
    ]
    if cfg.n_prelude:
        lines.append(f"prelude  {cfg.n_prelude} x block; e = {e}; {start}")
    else:
        lines.append(f"start    e = {e}; {start}")
    lines.append(f"core     {cfg.n_iterations} x [ {inject}; {cfg.n_core} x block; {after}{gate} ]")
    if cfg.n_coda:
        before = "ln_final(s)" if cfg.norm_before_coda else "s"
        before += " W" if cfg.linear_before_coda else ""
        lines.append(f"coda     x = {before}; {cfg.n_coda} x block")
    elif cfg.norm_before_coda:
        lines.append("coda     x = ln_final(s)")
    final = "s W_U" if cfg.readout.state_is_normed else "ln_final(x) W_U"
    final = final if cfg.final_norm else "x W_U"
    lines += [f"readout  logits = {final}", f"block    {block}"]
    lines += mechanism_lines(cfg)
    if cfg.time_conditioning:
        lines.append(
            "time     c = time(t / T) + step(1 / T); "
            "each branch: x += g(c)·branch(ln(x)·(1 + a(c)))"
        )
    if cfg.first_pass_window is not None:
        lines.append(
            "heads    t > 0: z = g·A(q, K_0, V_0) + (1 - g)·A(q, K_t, V_t; last "
            f"{cfg.first_pass_window}), g = σ(q·w + b)"
        )
    if cfg.value_embeddings:
        lines.append("values   v += 2·sigmoid(gate(ln1(x)))·W_E[tokens], in every second layer")
    return "\n".join(lines)


def _of_stacks(cfg: "LoopedTransformerConfig", embed: str, block: str) -> str:
    """The data flow of a model with two stacks and two states."""
    assert cfg.stacks is not None
    fast, slow = f"z{cfg.stacks[0]}", f"z{cfg.stacks[-1]}"
    start = {
        "embed": "e",
        "normal": f"N(0, {cfg.initial_state_std:.4g}²)",
        "zeros": "0",
        "learned": "learned vector",
    }
    begin = f"{fast} = {start[cfg.initial_state]}, {slow} = {start[cfg.slow_initial_state]}"
    after = "ln_final(x)" if cfg.norm_between_iterations else "x"
    inject = " + e" if cfg.injection is not None else ""
    first = f"prelude  {cfg.n_prelude} x block; " if cfg.n_prelude else "start    "
    run = f"{cfg.n_core} x block"
    cycles = cfg.n_iterations // len(cfg.stacks)
    lines = [
        f"{cfg.model_name} {cfg.notation}, {cfg.n_params:,} parameters",
        f"embed    x = {embed}",
        f"{first}e = x; {begin}",
        f"core     {cycles} x [ calls of {' '.join(cfg.stacks)} ], each call:",
        f"  {cfg.stacks[0]:<6} x = {fast} + {slow}{inject}; {run}; {fast} = {after}",
        f"  {cfg.stacks[-1]:<6} x = {slow} + {fast}; {run}; {slow} = {after}",
    ]
    if cfg.n_coda:
        lines.append(f"coda     x = {slow}; {cfg.n_coda} x block")
    final = slow if cfg.readout.state_is_normed else "ln_final(x)"
    final = final if cfg.final_norm else slow if not cfg.n_coda else "x"
    return "\n".join([*lines, f"readout  logits = {final} W_U", f"block    {block}"])
