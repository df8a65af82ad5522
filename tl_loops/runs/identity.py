"""What a run is a run of: model, inputs and settings, as fingerprints that files can hold."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_loops.errors import CheckpointError
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import layout_of
from tl_loops.runs.fingerprint import content_bytes, model_fingerprint
from tl_loops.version import __version__

_FLAGS = (
    "use_attn_result",
    "use_split_qkv_input",
    "use_hook_mlp_in",
    "use_attn_in",
    "ungroup_grouped_query_attention",
)


def identity_of(model: Model, **what: Any) -> dict[str, Any]:
    """What decides the result of a run, in JSON's types.

    Args:
        model: What is run.
        **what: What the tool adds: its inputs as fingerprints, its options.
    """
    layout = layout_of(model)
    return {
        "weights": model_fingerprint(model),
        "n_iterations": None if layout is None else layout.n_iterations,
        **what,
        "tl_loops": __version__,
        "settings": run_settings(model),
    }


def run_settings(model: Model) -> dict[str, Any]:
    """What changes the numbers of a run and is neither in the weights nor in the call."""
    parameter = next(model.parameters())
    kind = parameter.device.type
    autocast = torch.is_autocast_enabled(kind)
    return {
        "training": model.training,
        "device": kind,
        "autocast": str(torch.get_autocast_dtype(kind)) if autocast else None,
        "default_dtype": str(torch.get_default_dtype()),
        "matmul_precision": torch.get_float32_matmul_precision(),
        **{flag: bool(getattr(model.cfg, flag, False)) for flag in _FLAGS},
    }


def check_identifiable(model: Model) -> None:
    """Raise where a file cannot say what the run is, so that parts of two runs could be mixed.

    Raises:
        CheckpointError: Hooks are on the model, or its initial states are drawn afresh.
    """
    hooked = [
        name or "the model"
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]
    if hooked:
        raise CheckpointError(
            f"a run with hooks (at {', '.join(hooked[:3])}) cannot be resumed or cut into shards, "
            "since a file cannot tell one hook from another: remove them with model.reset_hooks("
            "including_permanent=True), or leave out checkpoint and shard"
        )
    drawn = getattr(model.cfg, "initial_state", "zeros") == "normal"
    if drawn and getattr(model.cfg, "state_seed", 0) is None:
        raise CheckpointError(
            "a run with state_seed=None cannot be resumed or cut into shards, since its initial "
            "states are drawn afresh: set model.cfg.state_seed to a number, or leave out "
            "checkpoint and shard"
        )


def prompts_fingerprint(prompts: Sequence[Int[Tensor, "_"]]) -> str:
    """Hash of the prompts' tokens in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for tokens in prompts:
        digest.update(f"{tokens.shape[0]}:".encode())
        digest.update(content_bytes(tokens))
    return digest.hexdigest()


def tensors_fingerprint(tensors: Mapping[str, Tensor | None] | Iterable[Tensor | None]) -> str:
    """Hash of tensors with their dtypes, shapes and (of a mapping) names."""
    digest = hashlib.blake2b(digest_size=16)
    named = tensors.items() if isinstance(tensors, Mapping) else enumerate(tensors)
    for name, tensor in named:
        if tensor is None:
            digest.update(f"{name} None".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(content_bytes(tensor))
    return digest.hexdigest()
