"""The data flow of a looped model in words and formulas."""

from typing import Any

Config = Any  # the config describes itself by this

_BLOCKS = {
    "pre": "x += attn(ln1(x)); x += mlp(ln2(x))",
    "sandwich": "x += ln1_post(attn(ln1(x))); x += ln2_post(mlp(ln2(x)))",
    "post_residual": "x = ln1_post(x + attn(ln1(x))); x = ln2_post(x + mlp(ln2(x)))",
    "post_branch": "x += ln1_post(attn(x)); x += ln2_post(mlp(x))",
    "post_norm": "x = ln1_post(x + attn(x)); x = ln2_post(x + mlp(x))",
}


def data_flow(cfg: Config) -> str:
    """The data flow of one forward pass in a few lines."""
    mechanisms, readout = cfg.mechanisms, cfg.readout
    said: dict[str, str] = {}
    for mechanism in mechanisms:
        said |= mechanism.phrases(cfg)
    e, state = said.get("e", "x"), said.get("state", "s")
    prelude = f"prelude  {cfg.n_prelude} x block" if cfg.n_prelude else "start   "
    begin = f"e = {e}; {said['begin']}"
    lines = [
        f"{cfg.model_name} {cfg.notation}, {cfg.n_params:,} parameters",
        f"embed    x = {_embedding(cfg)}",
        f"{prelude}; {begin}" if cfg.n_prelude else f"{prelude} {begin}",
    ]
    if "calls" in said:
        lines.append(said["calls"])
    else:
        ends = "s = ln_final(x)" if readout.norm_between_iterations else "s = x"
        inside = [said.get("enter", "x = s"), f"{cfg.n_core} x block"]
        inside += [said["leave"]] if "leave" in said else []
        inside += [ends] + ([said["after"]] if "after" in said else [])
        lines.append(f"core     {cfg.n_iterations} x [ {'; '.join(inside)} ]")
    if cfg.n_coda or readout.norm_before_coda:
        entering = f"ln_final({state})" if readout.norm_before_coda else state
        entering += f" {said['coda']}" if "coda" in said else ""
        blocks = f"; {cfg.n_coda} x block" if cfg.n_coda else ""
        lines.append(f"coda     x = {entering}{blocks}")
    read = state if readout.state_is_normed else "x"
    final = (
        f"{read} W_U" if readout.state_is_normed or not readout.final_norm else "ln_final(x) W_U"
    )
    if "calls" in said and not cfg.n_coda and not readout.final_norm:
        final = f"{state} W_U"
    lines += [f"readout  logits = {final}", f"block    {_BLOCKS[cfg.block_norm]}"]
    for mechanism in mechanisms:
        lines += mechanism.describe(cfg)
    return "\n".join(lines)


def _embedding(cfg: Config) -> str:
    scale = f" · {cfg.embed_scale:.4g}" if cfg.embed_scale != 1.0 else ""
    embed = f"W_E[tokens]{scale}"
    embed = f"ln({embed})" if cfg.post_embedding_ln else embed
    return embed + " + W_pos[positions]" if cfg.positional_embedding_type == "standard" else embed
