"""From a name or a directory to a config, weights and a tokenizer.

Nothing here runs remote code, unpickles, or builds a Hugging Face model.
"""

import warnings
from collections.abc import Iterator
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from tl_loops.config.config import LoopedTransformerConfig, dtype_name
from tl_loops.config.fields import fixed_by_weights
from tl_loops.errors import CheckpointError, ConfigError, shortened
from tl_loops.families.base import Family, Part, TensorSpec
from tl_loops.families.registry import feedforward_family, recognise
from tl_loops.loading.files import CONFIG_FILE, Checkpoint, read_rows, same_values
from tl_loops.loading.header import StoredTensor
from tl_loops.loading.rotary_tables import followed_fields, table_problems
from tl_loops.loading.save import save_checkpoint
from tl_loops.loading.source import is_broken, is_looped_name, resolve
from tl_loops.loading.stated_loop import (
    StatedLoop,
    check_weights,
    loop_fields,
    stated_family,
)
from tl_loops.mechanisms.tensors import FLOATS

__all__ = [
    "Checkpoint",
    "family_of",
    "is_broken",
    "is_looped_name",
    "load_config",
    "open_tensors",
    "resolve",
    "save_checkpoint",
    "stated_family",
]


_MOST_SHOWN = 12

_MOST_LAYERS = 1000
"""So many layers are built before the tensors are counted; a message then names those missing."""

_MOST_ITERATIONS = 10_000
"""That a file may ask for."""


def load_config(
    checkpoint: Checkpoint,
    n_iterations: SupportsIndex | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    loop: StatedLoop | None = None,
    **overrides: Any,
) -> LoopedTransformerConfig:
    """The config of a checkpoint.

    Args:
        checkpoint: From :func:`resolve`.
        n_iterations: Passes through the core; by default what the checkpoint says.
        dtype: Type of the weights in memory; by default float32, and for tl_loops's own format the
            type that was saved.
        device: Where the weights go; by default TransformerLens's choice.
        loop: The loop of a checkpoint that has none of its own; see :func:`loop_fields`.
        **overrides: Other config fields, e.g. ``n_ctx`` or ``state_seed``; not those that the
            stored tensors fix.

    Raises:
        CheckpointError: ``config.json`` is of no known family, lacks a field, or asks for
            mathematics that is not implemented.
        ConfigError: An argument is not a config field, is fixed by the weights, or is out of range;
            or ``loop`` does not fit the checkpoint.
    """
    for name in overrides.keys() & fixed_by_weights(LoopedTransformerConfig):
        hint = "; use n_iterations" if name == "n_layers" else ""
        raise ConfigError(f"{name} is fixed by the weights of {checkpoint.name}{hint}")
    where = str(checkpoint.config_path)
    family = family_of(checkpoint)
    fields = family.config_fields(checkpoint.config, where)
    architectures = checkpoint.config.get("architectures")
    listed = architectures if isinstance(architectures, list) else []
    named = [name for name in listed if isinstance(name, str)]
    _check_sizes(checkpoint, fields, where)
    if loop is not None:
        fields |= loop_fields(loop, family, fields.get("n_core", 1), checkpoint.name)
    fields.setdefault("model_name", checkpoint.name)
    fields.setdefault("original_architecture", [*named, *family.architectures, family.name][0])
    if dtype is not None:
        fields["dtype"] = _dtype(dtype)
    if device is not None:
        fields["device"] = str(device)
    try:
        cfg = LoopedTransformerConfig.from_dict(fields)
    except (ValueError, TypeError, AssertionError, ArithmeticError) as error:
        # TransformerLens raises all of them.
        if loop is not None and isinstance(error, ConfigError):
            raise  # of what the caller states
        raise CheckpointError(f"{where}: {error}") from error
    if loop is not None:
        check_weights(cfg, family, checkpoint.name)
    overrides = {**_stored_rotation(checkpoint, family, cfg), **overrides}
    if n_iterations is not None:
        overrides["n_iterations"] = n_iterations
    return LoopedTransformerConfig.from_dict({**fields, **overrides}) if overrides else cfg


def _check_sizes(checkpoint: Checkpoint, fields: dict[str, Any], where: str) -> None:
    """Raise on numbers of layers that the files cannot hold, before anything is made for each."""
    sizes = {name: fields.get(name, 0) for name in ("n_prelude", "n_core", "n_coda")}
    if not all(type(size) is int for size in sizes.values()):
        return  # The config says so.
    if sum(sizes.values()) > _MOST_LAYERS:
        stored = len(_stored_keys(checkpoint))
        if sum(sizes.values()) > stored:
            said = ", ".join(f"{name} = {shortened(size)}" for name, size in sizes.items())
            raise CheckpointError(
                f"{where} asks for more layers than the files have tensors: {said}, but there are "
                f"{stored} tensors"
            )
    iterations = fields.get("n_iterations", 1)
    if type(iterations) is int and iterations > _MOST_ITERATIONS:
        raise CheckpointError(
            f"{where} asks for n_iterations = {shortened(iterations)}, expected at most "
            f"{_MOST_ITERATIONS:,}: the model has hook points for each of them"
        )


def open_tensors(
    checkpoint: Checkpoint, cfg: LoopedTransformerConfig, allow_non_finite: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Stream the weights of a checkpoint under their physical names.

    All headers are checked before this function returns; data is read as the result is iterated,
    one stored tensor at a time, in ``cfg.dtype`` on ``cfg.device``. Matrices are views of row-major
    ``[out, in]`` memory in TransformerLens's orientation, so that neither loading nor
    ``F.linear`` copies them.

    Args:
        checkpoint: From :func:`resolve`.
        cfg: From :func:`load_config`.
        allow_non_finite: Whether stored numbers may be NaN or infinite, or become infinite in
            ``cfg.dtype``.

    Returns:
        Pairs of name (``"core.0.attn.W_Q"``) and tensor, each weight once.

    Raises:
        CheckpointError: Tensors are missing, unexpected, misshapen, of another type, truncated or
            held as pickles; all problems are named at once, with file, key and expected shape.
            While the result is iterated: numbers are not finite, or the file changed.
    """
    if checkpoint.adapters:
        warnings.warn(
            f"{checkpoint.directory} holds {checkpoint.adapters[0].name} beside the weights: the "
            "base model is loaded without that adapter; merge it into the weights to have it",
            stacklevel=3,
        )
    family, headers = family_of(checkpoint), checkpoint.headers
    specs = {spec.key: spec for spec in family.tensors(cfg)}
    problems = list(headers.problems)
    tensors, lost = (
        _spelled(family, headers.tensors, problems),
        set(map(family.spelled, headers.lost)),
    )
    names = {stored.file.name for stored in headers.tensors.values()}
    files = "".join(names) if len(names) == 1 else f"all {len(names)} weight files"
    for key, spec in specs.items():
        stored = tensors.get(key)
        if stored is not None:
            problems += _tensor_problems(stored, spec.shape)
        elif key not in lost and not headers.incomplete:
            problems.append(f"{files}: key {key!r} is missing, expected shape {spec.shape}")
    for key, stored in tensors.items():
        if key in specs or family.ignores(key):
            continue
        if key in family.tables:
            problems += table_problems(stored, family.tables[key], cfg)
            continue
        if family.tied is not None and cfg.tie_word_embeddings and key == family.tied[0]:
            problems += _tensor_problems(stored, specs[family.tied[1]].shape)
        else:
            problems.append(
                f"{stored.file.name}: key {stored.key!r} of shape {stored.shape} is unexpected: "
                f"family {family.name} with this {CONFIG_FILE} has no such tensor"
            )
    if not problems and family.tied is not None and cfg.tie_word_embeddings:
        problems += _tied_problems(tensors, *family.tied)
    if problems:
        raise _refusal(checkpoint, problems)
    pairs = [(tensors[key], spec) for key, spec in specs.items()]
    return _stream(
        sorted(pairs, key=lambda pair: (pair[0].file.name, pair[0].offset)), cfg, allow_non_finite
    )


def family_of(checkpoint: Checkpoint) -> Family:
    """The family that a checkpoint is recognised as.

    Raises:
        CheckpointError: It is of no known family.
    """
    if checkpoint.read_as is not None:
        return feedforward_family(checkpoint.read_as)
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


def _stored_rotation(
    checkpoint: Checkpoint, family: Family, cfg: LoopedTransformerConfig
) -> dict[str, Any]:
    """The fields that stored rotary tables decide; none where the weights cannot be read."""
    fields: dict[str, Any] = {}
    if family.tables:
        try:
            tensors = checkpoint.headers.tensors
        except CheckpointError:  # a config can be read without its weights
            return {}
        for key, stored in tensors.items():
            kind = family.tables.get(family.spelled(key))
            if kind is not None:
                fields |= followed_fields(stored, kind, cfg)
    return fields


def _spelled(
    family: Family, stored: dict[str, StoredTensor], problems: list[str]
) -> dict[str, StoredTensor]:
    """The stored tensors by the keys that the family's specifications have for them."""
    found: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        spelled = family.spelled(key)
        if spelled in found:
            other = found[spelled].key
            problems.append(f"{tensor.file.name}: keys {other!r} and {key!r} mean the same tensor")
        found[spelled] = tensor
    return found


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
    pairs: list[tuple[StoredTensor, TensorSpec]],
    cfg: LoopedTransformerConfig,
    allow_non_finite: bool,
) -> Iterator[tuple[str, Tensor]]:
    for stored, spec in pairs:
        whole, first = None, 0
        if spec.turned:
            whole = torch.empty(stored.shape, dtype=cfg.dtype, device=cfg.device)
            read_rows(stored, 0, whole, allow_non_finite)
        for part in spec.parts:
            shape = (part.rows, *spec.shape[:-1]) if spec.turned else (part.rows, *spec.shape[1:])
            memory = part.empty(shape, cfg.dtype, cfg.device)
            if whole is not None:
                memory.copy_(whole[:, first : first + part.rows].T)
                first += part.rows
            else:
                first = _read_part(stored, spec, part, first, memory, allow_non_finite)
            yield part.name, part.view(memory)


def _read_part(
    stored: StoredTensor,
    spec: TensorSpec,
    part: Part,
    first: int,
    memory: Tensor,
    allow_non_finite: bool,
) -> int:
    """Read the rows of a part, from ``first`` of each group on; gives the next part's first row."""
    rows, group = part.rows // spec.groups, spec.shape[0] // spec.groups
    for number, piece in enumerate(memory.split(rows)):
        read_rows(stored, number * group + first, piece, allow_non_finite)
    return first + rows
