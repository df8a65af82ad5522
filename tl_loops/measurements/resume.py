"""Measurements that survive a kill: what a run is, and how far it has come."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_loops.errors import CheckpointError
from tl_loops.layout.model import Model
from tl_loops.runs import storage
from tl_loops.runs.moments import Moments
from tl_loops.upstream.config_fields import CHANGES_NO_NUMBER

_KIND = "measurement"


@dataclass(frozen=True)
class RunIdentity:
    """What decides the result of a run.

    Attributes:
        weights: Fingerprint of weights and architecture.
        prompts: Fingerprint of the prompts' tokens in their order.
        n_iterations: ``None`` for a feedforward model.
        metrics: All options of each metric.
        tl_loops: Version that measures.
        settings: What else changes numbers: see :func:`run_settings`.
    """

    weights: str
    prompts: str
    n_iterations: int | None
    metrics: Mapping[str, Mapping[str, Any]]
    tl_loops: str
    settings: Mapping[str, Any]


_FLAGS = (
    "use_attn_result",
    "use_split_qkv_input",
    "use_hook_mlp_in",
    "use_attn_in",
    "ungroup_grouped_query_attention",
)


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


def check_can_resume(model: Model) -> None:
    """Raise where a file cannot say what the run is, so that going on could mix two runs.

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
            f"a run with hooks (at {', '.join(hooked[:3])}) cannot be resumed, since a file cannot "
            "tell one hook from another: remove them with model.reset_hooks("
            "including_permanent=True), or measure without a checkpoint"
        )
    drawn = getattr(model.cfg, "initial_state", "zeros") == "normal"
    if drawn and getattr(model.cfg, "state_seed", 0) is None:
        raise CheckpointError(
            "a run with state_seed=None cannot be resumed, since its initial states are drawn "
            "afresh: set model.cfg.state_seed to a number, or measure without a checkpoint"
        )


def model_fingerprint(model: Model) -> str:
    """Hash of a model's architecture and of every weight; the iterations are not part of it.

    Two models with one fingerprint give the same numbers on the same device. Reads all weights
    once (about a second a gigabyte).
    """
    digest = hashlib.blake2b(digest_size=16)
    cfg = {name: v for name, v in model.cfg.to_dict().items() if name not in CHANGES_NO_NUMBER}
    digest.update(json.dumps(cfg, sort_keys=True, default=str).encode())
    # Shared weights come once. Without their names: those of a coda count the iterations.
    for parameter in model.parameters():
        digest.update(f"{parameter.dtype} {list(parameter.shape)}".encode())
        flat = parameter.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def prompts_fingerprint(prompts: Sequence[Int[Tensor, "_"]]) -> str:
    """Hash of the prompts' tokens in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for tokens in prompts:
        digest.update(f"{tokens.shape[0]}:".encode())
        digest.update(tokens.numpy().data)
    return digest.hexdigest()


def save_progress(
    path: str | os.PathLike[str],
    identity: RunIdentity,
    moments: Mapping[str, Moments],
    n_done: int,
) -> None:
    """Write how far a run has come; a kill at any moment leaves this state or the one before.

    Args:
        path: Of the file.
        identity: Of the run.
        moments: Of the prompts that are done.
        n_done: Their number, counted along the run's order.

    Raises:
        FileNotFoundError: The directory does not exist.
    """
    tensors = {
        f"{m}.{name}": t for m, whole in moments.items() for name, t in whole.tensors().items()
    }
    storage.save_progress(path, _KIND, asdict(identity), tensors, n_done)


def load_progress(
    path: str | os.PathLike[str], identity: RunIdentity, n_prompts: int, n_blocks: Mapping[str, int]
) -> tuple[dict[str, Moments], int] | None:
    """How far a run has come.

    Args:
        path: Of the file.
        identity: Of the run that wants to go on.
        n_prompts: Of the whole run.
        n_blocks: Of each metric.

    Returns:
        The moments and the number of prompts that are done; ``None`` if there is no file.

    Raises:
        CheckpointError: The file is damaged, is none of a measurement, or belongs to another run;
            the message says in what it differs.
    """
    found = storage.load_progress(path, _KIND, asdict(identity), n_prompts)
    if found is None:
        return None
    tensors, n_done = found
    moments = {}
    for metric, n in n_blocks.items():
        parts = {}
        for name, empty in Moments.empty(n).tensors().items():
            part = tensors.get(f"{metric}.{name}")
            if part is None or part.shape != empty.shape or part.dtype != empty.dtype:
                raise CheckpointError(
                    f"{path} does not hold {name} of {metric} as {n} numbers of {empty.dtype}; "
                    "delete it or give another path"
                )
            parts[name] = part
        moments[metric] = Moments(**parts)
    return moments, n_done
