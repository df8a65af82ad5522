"""The data flow of a looped model in words and formulas, with all that decides its numbers."""

from typing import Any

from tl_loops.config.describe_parts import block, embedding, parts, unembedding
from tl_loops.layout.segments import named_segments

Config = Any  # the config describes itself by this


def data_flow(cfg: Config) -> str:
    """The data flow of one forward pass in a few lines.

    Two configs that compute something else from the same weights and input are never described
    alike.
    """
    mechanisms, readout = cfg.mechanisms, cfg.readout
    said: dict[str, str] = {}
    for mechanism in mechanisms:
        said |= mechanism.phrases(cfg)
    e, state = said.get("e", "x"), said.get("state", "s")
    prelude = f"prelude  {cfg.n_prelude} x block" if cfg.n_prelude else "start   "
    begin = f"e = {e}; {said['begin']}"
    lines = [
        f"{cfg.model_name} {cfg.notation}, {cfg.n_params:,} parameters",
        f"embed    x = {embedding(cfg)}",
        f"{prelude}; {begin}" if cfg.n_prelude else f"{prelude} {begin}",
    ]
    if "calls" in said:
        lines.append(said["calls"])
    else:
        norm = "norm(x)" if readout.own_norm_between_iterations else "ln_final(x)"
        ends = f"s = {norm}" if readout.norm_between_iterations else "s = x"
        after = [*([said["leave"]] if "leave" in said else []), ends]
        after += [said["after"]] if "after" in said else []
        for name, loop in named_segments(cfg.layout.loops):
            inside = [said.get("enter", "x = s"), f"{loop.n_layers} x block", *after]
            core = "core" if cfg.segments is None else f"core {name}"
            lines.append(f"{core:<8} {loop.n_iterations} x [ {'; '.join(inside)} ]")
    if cfg.n_coda or readout.norm_before_coda:
        entering = f"ln_final({state})" if readout.norm_before_coda else state
        entering += f" {said['coda']}" if "coda" in said else ""
        blocks = f"; {cfg.n_coda} x block" if cfg.n_coda else ""
        lines.append(f"coda     x = {entering}{blocks}")
    read = state if readout.state_is_normed else "x"
    final = read if readout.state_is_normed or not readout.final_norm else "ln_final(x)"
    if "calls" in said and not cfg.n_coda and not readout.final_norm:
        final = state
    lines += [f"readout  logits = {unembedding(cfg, final)}", f"block    {block(cfg)}"]
    for mechanism in mechanisms:
        lines += mechanism.describe(cfg)
    if any(mechanism.has_rows(cfg) for mechanism in mechanisms):
        lines.append(f"rows     weights for up to {cfg.max_iterations} iterations")
    return "\n".join(lines + parts(cfg))
