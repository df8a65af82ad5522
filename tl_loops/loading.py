"""From a name or a directory to a config, weights and a tokenizer.

Nothing here runs remote code, unpickles, or builds a Hugging Face model.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_loops.config import LoopedTransformerConfig, dtype_name
from tl_loops.errors import CheckpointError, ConfigError, UnknownModelError
from tl_loops.families.base import Family, TensorSpec
from tl_loops.families.checkpoint import (
    CONFIG_FILE,
    FLOATS,
    INDEX_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    StoredTensor,
    read_json,
    read_rows,
    same_values,
)
from tl_loops.families.native import save_checkpoint
from tl_loops.families.registry import (
    find_known,
    is_looped_config,
    near_names,
    packaged_directory,
    recognise,
)
from tl_loops.tokenizer import TOKENIZER_FILES

__all__ = [
    "Checkpoint",
    "family_of",
    "is_looped_name",
    "load_config",
    "open_tensors",
    "resolve",
    "save_checkpoint",
]


_OF_THE_WEIGHTS = frozenset(
    "d_model d_head n_heads n_key_value_heads d_mlp d_vocab d_vocab_out n_layers n_prelude n_core "
    "n_coda block_norm injection exit_gate qk_norm qk_bias attn_bias mlp_bias unembed_bias "
    "gated_mlp normalization_type positional_embedding_type tie_word_embeddings norm_injection "
    "linear_before_coda value_embeddings value_gate_channels post_embedding_ln stacks "
    "slow_initial_state attn_gate state_gate_rank halt_head first_pass_window step_embedding "
    "time_conditioning block_norm_weight final_norm n_extra_tokens "
    "extra_token_slices shared_stacks router hyper_connections max_iterations".split()
)
"""Config fields that the stored tensors fix, so that a caller cannot choose them."""

_MOST_SHOWN = 12


def is_looped_name(name: Any) -> bool:
    """Whether a name or directory is a looped model, without network and without exceptions.

    Args:
        name: What a user gave to ``from_pretrained``.

    Returns:
        ``True`` for the known names and aliases (in any case of letters, as TransformerLens takes
        them) and for directories whose ``config.json`` names a looped family.
    """
    if not isinstance(name, (str, os.PathLike)):
        return False
    directory = _local_directory(name)
    if directory is not None:
        try:
            return is_looped_config(read_json(directory / CONFIG_FILE))
        except CheckpointError:
            return False
    return isinstance(name, str) and find_known(name) is not None


def resolve(
    name_or_directory: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Find the files of a checkpoint, downloading them where needed.

    From the hub only ``config.json``, safetensors files and tokenizer files are taken: never
    pickles, never code.

    Args:
        name_or_directory: A directory with ``config.json``, or a known name or alias. A directory
            wins over a name.
        revision: Branch, tag or commit of a hub repository.
        token: Hub token, as for ``huggingface_hub.snapshot_download``.
        cache_dir: Hub cache, as there.
        local_files_only: Use the hub cache alone, as there.

    Returns:
        The checkpoint directory.

    Raises:
        UnknownModelError: Neither a directory nor a known name.
        CheckpointError: A directory without ``config.json``, or the download failed.
        ConfigError: ``revision`` for files that have none.
    """
    directory = _local_directory(name_or_directory)
    if directory is not None:
        _refuse_revision(revision, str(directory))
        if not (directory / CONFIG_FILE).is_file():
            raise CheckpointError(f"{directory} holds no {CONFIG_FILE}")
        return Checkpoint(directory, directory.resolve().name)
    name = os.fspath(name_or_directory)
    entry = find_known(name) if isinstance(name_or_directory, str) else None
    if entry is None:
        raise _unknown(name)
    if entry.known.packaged is not None:
        _refuse_revision(revision, entry.name)
        directory = packaged_directory(entry.known.packaged)
        if not (directory / CONFIG_FILE).is_file():
            raise CheckpointError(
                f"{entry.name} is missing from the installed package: {directory}"
            )
        return Checkpoint(directory, entry.name)
    directory = _download(
        entry.name,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    if not any(directory.glob("*.safetensors")):
        raise CheckpointError(
            f"{entry.name} holds no safetensors files. Other files of weights (.bin, .pt) are "
            "pickles, which can run code when they are opened, and are not fetched. Download them "
            "and convert them once in an environment you trust, with safetensors.torch.save_file("
            f"torch.load(FILE, weights_only=True), {WEIGHTS_FILE!r}), then load the directory that "
            f"holds {WEIGHTS_FILE} and {CONFIG_FILE}"
        )
    return Checkpoint(directory, entry.name.split("/")[-1])


def load_config(
    checkpoint: Checkpoint,
    n_iterations: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **overrides: Any,
) -> LoopedTransformerConfig:
    """The config of a checkpoint.

    Args:
        checkpoint: From :func:`resolve`.
        n_iterations: Passes through the core; by default what the checkpoint says.
        dtype: Type of the weights in memory; by default float32, and for tl_loops's own format the
            type that was saved.
        device: Where the weights go; by default TransformerLens's choice.
        **overrides: Other config fields, e.g. ``n_ctx`` or ``state_seed``; not those that the
            stored tensors fix.

    Raises:
        CheckpointError: ``config.json`` is of no known family, lacks a field, or asks for
            mathematics that is not implemented.
        ConfigError: An argument is not a config field, is fixed by the weights, or is out of range.
    """
    for name in overrides.keys() & _OF_THE_WEIGHTS:
        hint = "; use n_iterations" if name == "n_layers" else ""
        raise ConfigError(f"{name} is fixed by the weights of {checkpoint.name}{hint}")
    where = str(checkpoint.config_path)
    family = family_of(checkpoint)
    fields = family.config_fields(checkpoint.config, where)
    architectures = checkpoint.config.get("architectures")
    named = architectures if isinstance(architectures, list) and architectures else None
    fields.setdefault("model_name", checkpoint.name)
    fields.setdefault("original_architecture", (named or [*family.architectures, family.name])[0])
    if dtype is not None:
        fields["dtype"] = _dtype(dtype)
    if device is not None:
        fields["device"] = str(device)
    try:
        cfg = LoopedTransformerConfig.from_dict(fields)
    except (ValueError, TypeError, AssertionError) as error:  # TransformerLens raises all three
        raise CheckpointError(f"{where}: {error}") from error
    if n_iterations is not None:
        overrides["n_iterations"] = n_iterations
    return LoopedTransformerConfig.from_dict({**fields, **overrides}) if overrides else cfg


def open_tensors(
    checkpoint: Checkpoint, cfg: LoopedTransformerConfig
) -> Iterator[tuple[str, Tensor]]:
    """Stream the weights of a checkpoint under their physical names.

    All headers are checked before this function returns; data is read as the result is iterated,
    one stored tensor at a time, in ``cfg.dtype`` on ``cfg.device``. Matrices are views of row-major
    ``[out, in]`` memory in TransformerLens's orientation, so that neither loading nor
    ``F.linear`` copies them.

    Args:
        checkpoint: From :func:`resolve`.
        cfg: From :func:`load_config`.

    Returns:
        Pairs of name (``"core.0.attn.W_Q"``) and tensor, each weight once.

    Raises:
        CheckpointError: Tensors are missing, unexpected, misshapen, of another type, truncated or
            held as pickles; all problems are named at once, with file, key and expected shape.
    """
    family, headers = family_of(checkpoint), checkpoint.headers
    specs = {spec.key: spec for spec in family.tensors(cfg)}
    problems = list(headers.problems)
    names = {stored.file.name for stored in headers.tensors.values()}
    files = "".join(names) if len(names) == 1 else f"all {len(names)} weight files"
    for key, spec in specs.items():
        stored = headers.tensors.get(key)
        if stored is not None:
            problems += _tensor_problems(stored, spec.shape)
        elif key not in headers.lost and not headers.incomplete:
            problems.append(f"{files}: key {key!r} is missing, expected shape {spec.shape}")
    for key, stored in headers.tensors.items():
        if key in specs or key in family.ignored:
            continue
        if family.tied is not None and cfg.tie_word_embeddings and key == family.tied[0]:
            problems += _tensor_problems(stored, specs[family.tied[1]].shape)
        else:
            problems.append(
                f"{stored.file.name}: key {key!r} of shape {stored.shape} is unexpected: family "
                f"{family.name} with this {CONFIG_FILE} has no such tensor"
            )
    if not problems and family.tied is not None and cfg.tie_word_embeddings:
        problems += _tied_problems(headers.tensors, *family.tied)
    if problems:
        raise _refusal(checkpoint, problems)
    pairs = [(headers.tensors[key], spec) for key, spec in specs.items()]
    return _stream(sorted(pairs, key=lambda pair: (pair[0].file.name, pair[0].offset)), cfg)


def _local_directory(name: str | os.PathLike[str]) -> Path | None:
    """A directory with a config, or any directory that is not also a known name."""
    path = os.path.expanduser(os.fspath(name))
    if isinstance(path, bytes) or not os.path.isdir(path):
        return None
    if os.path.isfile(os.path.join(path, CONFIG_FILE)):
        return Path(path)
    known = isinstance(name, str) and find_known(name) is not None
    return None if known else Path(path)


def _unknown(name: str) -> UnknownModelError:
    if os.path.isfile(os.path.expanduser(name)):
        return UnknownModelError(f"{name!r} is a file; give the directory that holds {CONFIG_FILE}")
    near = near_names(name)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return UnknownModelError(
        f"{name!r} is neither a directory nor a known looped model.{hint} Other checkpoints of the "
        "known families load from a local directory, e.g. from huggingface_hub.snapshot_download"
    )


def _refuse_revision(revision: str | None, what: str) -> None:
    if revision is not None:
        raise ConfigError(f"revision={revision!r} means a version on the hub, but {what} is local")


def _download(repository: str, **arguments: Any) -> Path:
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(
            repository,
            allow_patterns=[CONFIG_FILE, "*.safetensors", INDEX_FILE, *TOKENIZER_FILES],
            ignore_patterns=["*/*"],
            **arguments,
        )
    except Exception as error:  # errors of hub, network and file system have no common base
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{repository} could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason}). A local directory with {CONFIG_FILE}, "
            "safetensors and tokenizer files loads without network"
        ) from error
    return Path(directory)


def family_of(checkpoint: Checkpoint) -> Family:
    """The family that a checkpoint is recognised as.

    Raises:
        CheckpointError: It is of no known looped family.
    """
    return recognise(
        checkpoint.config, str(checkpoint.config_path), lambda: _stored_keys(checkpoint)
    )


def _stored_keys(checkpoint: Checkpoint) -> set[str]:
    headers = checkpoint.headers
    keys = headers.tensors.keys() | headers.lost
    if headers.problems and not keys:
        raise _refusal(checkpoint, headers.problems)
    return keys


def _refusal(checkpoint: Checkpoint, problems: list[str]) -> CheckpointError:
    lines = "".join(f"\n  {problem}" for problem in problems[:_MOST_SHOWN])
    if len(problems) > _MOST_SHOWN:
        lines += f"\n  and {len(problems) - _MOST_SHOWN} more"
    return CheckpointError(f"{checkpoint.directory} cannot be loaded:{lines}")


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    for known in FLOATS.values():
        if dtype in (known, str(known), dtype_name(known)):
            return known
    expected = ", ".join(str(known) for known in FLOATS.values())
    raise ConfigError(f"dtype must be one of {expected}, got {dtype!r}")


def _tensor_problems(stored: StoredTensor, shape: tuple[int, ...]) -> list[str]:
    where = f"{stored.file.name}: key {stored.key!r}"
    if stored.shape != shape:
        return [f"{where} has shape {stored.shape}, expected {shape}"]
    if stored.dtype not in FLOATS:
        expected = ", ".join(FLOATS)
        return [f"{where} is stored as {stored.dtype}, expected one of {expected} (not quantised)"]
    return []


def _tied_problems(tensors: dict[str, StoredTensor], head: str, embedding: str) -> list[str]:
    if head not in tensors or same_values(tensors[head], tensors[embedding]):
        return []
    return [
        f"{tensors[head].file.name}: key {head!r} differs from {embedding!r}, but {CONFIG_FILE} "
        "ties them; expected equal values, or tied embeddings switched off there"
    ]


def _stream(
    pairs: list[tuple[StoredTensor, TensorSpec]], cfg: LoopedTransformerConfig
) -> Iterator[tuple[str, Tensor]]:
    for stored, spec in pairs:
        first = 0
        for part in spec.parts:
            memory = part.empty((part.rows, *stored.shape[1:]), cfg.dtype, cfg.device)
            read_rows(stored, first, memory)
            first += part.rows
            yield part.name, part.view(memory)
