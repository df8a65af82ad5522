"""A checkpoint directory as files: its config, the headers of its weights, and their bytes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_loops.errors import CheckpointError, shortened
from tl_loops.loading.header import StoredTensor, read_header
from tl_loops.loading.json_file import open_regular, read_json
from tl_loops.mechanisms.tensors import FLOATS

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.*")

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler", "adapter_model")
"""How pickles begin that stand beside weights and are none."""

_LONGEST_NAME = 255
"""Bytes of a file's name, on every usual file system."""

_PIECE = 1 << 18
"""Elements that are converted at a time, so that a conversion needs no second whole tensor.

Small enough that the buffers leave no holes between the weights in the allocator's memory.
"""


@dataclass
class Headers:
    """What the headers of all weight files say.

    Attributes:
        tensors: All stored tensors by key.
        problems: What is wrong with files, one line each.
        lost: Keys that the index assigns to files that could not be read.
        incomplete: Whether a file could not be read of which no index tells what it holds.
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)
    incomplete: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A local checkpoint directory.

    Attributes:
        directory: Where ``config.json`` and the weights are.
        name: The model's name, for ``cfg.model_name`` and messages.
        silent: Fields that count where ``config.json`` does not hold them.
        read_as: The family to read it as, where the caller says so.
    """

    directory: Path
    name: str
    silent: Mapping[str, Any] = field(default_factory=dict)
    read_as: str | None = None

    @property
    def config_path(self) -> Path:
        """Path of ``config.json``."""
        return self.directory / CONFIG_FILE

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of ``config.json``.

        Raises:
            CheckpointError: The file is missing or not a JSON object.
        """
        return {**self.silent, **read_json(self.config_path)}

    @cached_property
    def headers(self) -> Headers:
        """Headers of the weight files: no tensor data is read.

        Raises:
            CheckpointError: The directory holds no safetensors file at all.
        """
        headers = Headers()
        unreadable = False
        for file in self._weight_files(headers):
            try:
                found = read_header(file)
            except CheckpointError as problem:
                headers.problems.append(str(problem))
                unreadable = True
                continue
            for tensor in found:
                if tensor.key in headers.tensors:
                    other = headers.tensors[tensor.key].file.name
                    headers.problems.append(f"{file.name}: key {tensor.key!r} is also in {other}")
                headers.tensors[tensor.key] = tensor
        self._check_index(headers, unreadable)
        return headers

    def _weight_files(self, headers: Headers) -> list[Path]:
        single, index = self.directory / WEIGHTS_FILE, self.directory / INDEX_FILE
        if single.exists():
            return [single]
        if index.exists():
            files = []
            for name in sorted(set(self._weight_map.values())):
                if (self.directory / name).exists():
                    files.append(self.directory / name)
                else:
                    headers.problems.append(f"{INDEX_FILE}: names {name}, which is absent")
            return files
        files = sorted(set(self.directory.glob("*.safetensors")) - set(self.adapters))
        if not files:
            raise CheckpointError(self._no_weights())
        return files

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        index = self.directory / INDEX_FILE
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no 'weight_map' from keys to files")
        for key, name in weight_map.items():
            if not isinstance(name, str) or not _is_name_of_file(name):
                raise CheckpointError(
                    f"{index} places key {shortened(key)} in {shortened(name)}; expected the name "
                    "of a file beside it"
                )
        return weight_map

    def _check_index(self, headers: Headers, unreadable: bool) -> None:
        readable = {tensor.file.name for tensor in headers.tensors.values()}
        if (self.directory / WEIGHTS_FILE).exists() or not (self.directory / INDEX_FILE).exists():
            headers.incomplete = unreadable
            return
        for key, name in self._weight_map.items():
            stored = headers.tensors.get(key)
            if stored is None and name not in readable:
                headers.lost.add(key)
            elif stored is None or stored.file.name != name:
                headers.problems.append(
                    f"{name}: lacks key {key!r}, which {INDEX_FILE} places there"
                )
                headers.lost.add(key)

    @property
    def adapters(self) -> list[Path]:
        """Files of a low-rank adapter (LoRA), which changes the weights and is not read."""
        return sorted(file for name in ADAPTER_FILES for file in self.directory.glob(name))

    def _no_weights(self) -> str:
        pickles = sorted(
            file.name
            for file in self.directory.iterdir()
            if file.suffix in _PICKLES and not file.name.startswith(_NO_WEIGHTS)
        )
        if pickles:
            return (
                f"{self.directory} holds its weights only as {', '.join(pickles)}. "
                f"{conversion(pickles)}"
            )
        adapter = ""
        if self.adapters:
            adapter = f"; {self.adapters[0].name} is of an adapter: merge it into its base model"
        return (
            f"{self.directory} holds no weights: expected {WEIGHTS_FILE}, or {INDEX_FILE} and the "
            f"files that it names{adapter}"
        )


def conversion(pickles: list[str]) -> str:
    """What a message says about weights that are pickles, with a line that converts them.

    Args:
        pickles: Names of the files, or ``["FILE"]`` where they are not known.
    """
    return (
        "Such files are pickles, which can run code when they are opened, and are not read; "
        "convert them once, in their directory and in an environment you trust: "
        "import torch, safetensors.torch; safetensors.torch.save_file({key: tensor.detach().clone("
        "memory_format=torch.contiguous_format) for file in "
        f"{pickles} for key, tensor in torch.load(file, map_location='cpu', weights_only=True)"
        f".items()}}, {WEIGHTS_FILE!r})"
    )


def _is_name_of_file(name: str) -> bool:
    return (
        name not in ("", "..")
        and Path(name).name == name
        and name.isprintable()
        and len(name.encode()) <= _LONGEST_NAME
    )


def read_rows(
    stored: StoredTensor, first: int, target: Tensor, allow_non_finite: bool = False
) -> None:
    """Fill a tensor with the rows of a stored one, from ``first`` on.

    The file is read, not mapped: mapped pages would count as memory beside the weights. A change of
    type, strides or device goes piece by piece.

    Args:
        stored: What to read.
        first: Row of it that becomes ``target[0]``.
        target: ``[rows, *stored.shape[1:]]``, of any strides, floating type and device.
        allow_non_finite: Whether NaN and infinities may be among the numbers.

    Raises:
        CheckpointError: The file ends early or cannot be read; or a number is NaN or infinite, or
            too large for the target's type.
    """
    stored_dtype, row = FLOATS[stored.dtype], math.prod(stored.shape[1:])
    direct = target.is_contiguous() and target.device.type == "cpu" and target.dtype == stored_dtype
    step = max(1, _PIECE // max(1, row))
    buffer = torch.empty(0)
    if not direct:
        buffer = torch.empty((min(step, len(target)), *stored.shape[1:]), dtype=stored_dtype)
    try:
        with open_regular(stored.file, buffering=0) as stream:
            stream.seek(stored.offset + first * row * stored_dtype.itemsize)
            for begin in range(0, len(target), step):
                rows = target[begin : begin + step]
                piece = rows if direct else buffer[: len(rows)]
                _fill(stream, piece.view(-1), stored)
                if not allow_non_finite:
                    _check_finite(piece, target.dtype, stored)
                if not direct:
                    rows.copy_(piece)
    except OSError as error:
        raise CheckpointError(f"{stored.file}: key {stored.key!r}: {error}") from error


def _check_finite(piece: Tensor, dtype: torch.dtype, stored: StoredTensor) -> None:
    """Raise on NaN, infinities, and what becomes infinite in another type."""
    if not piece.numel():
        return
    ends = torch.stack(torch.aminmax(piece))  # one pass without a copy; NaN is both ends
    if not bool(ends.isfinite().all()):
        raise CheckpointError(
            f"{stored.file}: key {stored.key!r} holds NaN or infinite numbers, so the model would "
            "compute none; get the file again, or pass allow_non_finite=True to load it as it is"
        )
    if not bool(ends.to(dtype).isfinite().all()):
        raise CheckpointError(
            f"{stored.file}: key {stored.key!r} holds {float(ends.abs().max()):.3g}, which "
            f"{dtype} cannot hold; load in a wider dtype, or pass "
            "allow_non_finite=True to make it infinite"
        )


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors hold the same numbers, compared piece by piece."""
    if one.shape != other.shape:
        return False
    rows, row = one.shape[0], math.prod(one.shape[1:])
    step = max(1, _PIECE // max(1, row))
    for first in range(0, rows, step):
        shape = (min(step, rows - first), *one.shape[1:])
        a, b = (torch.empty(shape, dtype=torch.float64) for _ in range(2))
        read_rows(one, first, a, True)
        read_rows(other, first, b, True)
        if not torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True):
            return False
    return True


def _fill(stream: Any, target: Tensor, stored: StoredTensor) -> None:
    """Read into a row-major CPU tensor until it is full."""
    waiting = target.view(torch.uint8).numpy().data
    while waiting:
        count = stream.readinto(waiting)
        if not count:
            raise CheckpointError(
                f"{stored.file}: truncated: key {stored.key!r} lacks {len(waiting):,} bytes"
            )
        waiting = waiting[count:]
