"""What the fields of xLLM's model config say of a loop: its sizes, states and injection."""

from typing import Any

from tl_loops.errors import CheckpointError
from tl_loops.families.base import Released, checked

FAST, SLOW = "L", "H"
"""The stacks of models with two states."""

_STATES = {"zero": "zeros", "input": "embed", "normal": "hashed_normal"}


def derive(released: Released) -> dict[str, Any]:
    """The config fields that follow from several of xLLM's.

    Args:
        released: Its fields, at the top.

    Raises:
        CheckpointError: They contradict each other or are not implemented.
    """
    d_model, heads = released["model_dim"], released["num_heads"]
    d_head = released.get("head_dim")
    if d_head is None:
        if not heads or d_model % heads:
            raise CheckpointError(
                f"'head_dim' is missing and 'model_dim' = {d_model} is no multiple of 'num_heads' "
                f"= {heads}"
            )
        d_head = d_model // heads
    d_head = checked("head_dim", d_head, int, above_zero=True)
    if released.get("apply_rmsnorm", False) is not True:
        raise CheckpointError("'apply_rmsnorm' must be true: its LayerNorm is not implemented")
    for key in ("rope_head_dim", "v_head_dim"):
        if released.get(key) not in (None, d_head):
            raise CheckpointError(
                f"{key!r} is {released[key]!r}, which is not implemented; expected {d_head}, the "
                "whole head"
            )
    if released.get("output_size") not in (None, -1, released["vocab_size"]):
        raise CheckpointError(
            f"'output_size' is {released['output_size']!r}, which is not implemented; expected "
            f"'vocab_size' = {released['vocab_size']}"
        )
    found = {"d_head": d_head}
    if released.get("scale_emb", False):
        found["embed_scale"] = float(d_model) ** 0.5
    arch = released.get("arch", "transformer")
    if arch not in ("transformer", "huginn"):
        raise CheckpointError(
            f"'arch' is {arch!r}, which is not implemented; expected 'transformer' or 'huginn'"
        )
    return {**found, **(_huginn(released) if arch == "huginn" else _looped(released))}


def _looped(released: Released) -> dict[str, Any]:
    """Layers of a plain stack run several times; with one run it has no loop."""
    layers = checked("num_layers", released["num_layers"], int)
    start = _number(released, "loop_start_layer", 0)
    end = _number(released, "loop_end_layers", layers)
    if not start < end <= layers:
        raise CheckpointError(
            f"'loop_start_layer' = {start} and 'loop_end_layers' = {end} must name layers of "
            f"{layers}"
        )
    injection = _chosen(released, "loop_input_injection", "none", ("none", "diagonal"))
    if injection != "none" and start:
        raise CheckpointError(
            "'loop_input_injection' with 'loop_start_layer' above 0 injects the embedding past "
            "layers before the loop, which is not implemented"
        )
    return {
        "n_prelude": start,
        "n_core": end - start,
        "n_coda": layers - end,
        "n_iterations": _number(released, "loop_times", 1),
        "initial_state": "embed",
        "injection": "gated_diagonal" if injection != "none" else None,
    }


def _huginn(released: Released) -> dict[str, Any]:
    layers = checked("num_layers", released["num_layers"], int)
    prelude = _number(released, "huginn_prelude_layers", 1)
    coda = _number(released, "huginn_coda_layers", 1)
    core = _number(released, "huginn_recurrent_layers", layers - prelude - coda)
    if core < 1 or prelude + core + coda != layers:
        raise CheckpointError(
            f"'huginn_prelude_layers' = {prelude}, 'huginn_recurrent_layers' = {core} and "
            f"'huginn_coda_layers' = {coda} must sum to 'num_layers' = {layers}"
        )
    state = _chosen(released, "huginn_state_init", "zero", tuple(_STATES))
    exit_norm = _chosen(
        released, "huginn_recurrent_exit_norm", "none", ("none", "parameterless_rms")
    )
    found: dict[str, Any] = {
        "n_prelude": prelude,
        "n_core": core,
        "n_coda": coda,
        "n_iterations": _number(released, "loop_times", 1),
        "initial_state": _STATES[state],
        "initial_state_std": float(released["model_dim"]) ** -0.5,
        "norm_between_iterations": exit_norm != "none",
        "own_norm_between_iterations": exit_norm != "none",
        **_injection(released),
    }
    return {**found, **_two_states(released, core, found["injection"] is not None)}


def _injection(released: Released) -> dict[str, Any]:
    kind = _chosen(released, "huginn_input_injection", "diagonal", ("none", "diagonal", "linear"))
    norm = _chosen(released, "huginn_prelude_norm", "none", ("none", "rms"))
    projects = checked(
        "huginn_prelude_orthogonal", released.get("huginn_prelude_orthogonal", False), bool
    )
    if projects and kind != "diagonal":
        raise CheckpointError(
            "'huginn_prelude_orthogonal' needs 'huginn_input_injection' = 'diagonal', found "
            f"{kind!r}"
        )
    eps = checked(
        "huginn_ortho_projection_eps", released.get("huginn_ortho_projection_eps", 1e-6), float
    )
    bias = checked("apply_bias_term", released.get("apply_bias_term", False), bool)
    kinds = {"none": None, "diagonal": "gated_diagonal", "linear": "concat"}
    return {
        "injection": "orthogonal" if projects else kinds[kind],
        "injection_bias": kind == "linear" and bias,
        "injection_eps": eps,
        "norm_injection": norm == "rms",
    }


def _two_states(released: Released, core: int, injects: bool) -> dict[str, Any]:
    """The stacks of a model with a fast and a slow state; nothing for one state."""
    kind = _chosen(released, "huginn_hierarchical_state", "none", ("none", "shared_hl", "split_hl"))
    repeats = _number(released, "huginn_split_module_repeats", 1)
    if kind == "none":
        return {}
    if not 1 <= repeats <= 1000:
        raise CheckpointError(
            f"'huginn_split_module_repeats' is {repeats}, expected a number from 1 to 1000"
        )
    fast = _number(released, "huginn_hierarchical_l_cycles", 3)
    slow = _number(released, "huginn_hierarchical_h_cycles", 2)
    if not (1 <= fast <= 1000 and 1 <= slow <= 1000):
        raise CheckpointError(
            f"'huginn_hierarchical_l_cycles' = {fast} and 'huginn_hierarchical_h_cycles' = {slow} "
            "must be at least 1 and at most 1000"
        )
    if kind == "split_hl" and core % 2:
        raise CheckpointError(f"split states need an even number of recurrent layers, found {core}")
    return {
        "stacks": (FAST,) * fast + (SLOW,),
        "shared_stacks": kind == "shared_hl",
        "slow_injection": injects,
        "n_core": repeats * (core if kind == "shared_hl" else core // 2),
        "layer_repeats": repeats,
        "n_iterations": slow * (fast + 1),
    }


def _number(released: Released, key: str, default: int) -> int:
    value = released.get(key)
    return checked(key, default if value is None else value, int)


def _chosen(released: Released, key: str, default: str, choices: tuple[str, ...]) -> str:
    value = released.get(key, default)
    if value not in choices:
        raise CheckpointError(
            f"{key!r} is {value!r}, which is not implemented; expected "
            f"{' or '.join(map(repr, choices))}"
        )
    return value
