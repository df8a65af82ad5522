"""A checkpoint directory as files: its config, the headers of its weights, and their bytes."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_loops.errors import CheckpointError
from tl_loops.mechanisms.tensors import FLOATS

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_ITEM_SIZES = {
    **{name: dtype.itemsize for name, dtype in FLOATS.items()},
    **{"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8},
    **{"C64": 8, "F8_E4M3": 1, "F8_E5M2": 1},
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_HEADER = 100_000_000
_PIECE = 1 << 18
"""Elements that are converted at a time, so that a conversion needs no second whole tensor.

Small enough that the buffers leave no holes between the weights in the allocator's memory.
"""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: ``nbytes`` at ``offset`` of ``file``, of a safetensors type."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


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
    """

    directory: Path
    name: str
    silent: Mapping[str, Any] = field(default_factory=dict)

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
            size = file.stat().st_size
            end = max((tensor.offset + tensor.nbytes for tensor in found), default=size)
            if end != size:
                what = "truncated" if end > size else "has bytes beyond its tensors"
                headers.problems.append(
                    f"{file.name}: {what}: its tensors end at byte {end:,}, the file at {size:,}"
                )
            for tensor in found:
                if tensor.key in headers.tensors:
                    other = headers.tensors[tensor.key].file.name
                    headers.problems.append(f"{file.name}: key {tensor.key!r} is also in {other}")
                headers.tensors[tensor.key] = tensor
        self._check_index(headers, unreadable)
        return headers

    def _weight_files(self, headers: Headers) -> list[Path]:
        single, index = self.directory / WEIGHTS_FILE, self.directory / INDEX_FILE
        if single.is_file():
            return [single]
        if index.is_file():
            files = []
            for name in sorted(set(self._weight_map.values())):
                if (self.directory / name).is_file():
                    files.append(self.directory / name)
                else:
                    headers.problems.append(f"{INDEX_FILE}: names {name}, which is absent")
            return files
        files = sorted(self.directory.glob("*.safetensors"))
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
            if not isinstance(name, str) or not name or Path(name).name != name:
                raise CheckpointError(
                    f"{index} places key {key!r} in {name!r}; expected the name of a file beside it"
                )
        return weight_map

    def _check_index(self, headers: Headers, unreadable: bool) -> None:
        readable = {tensor.file.name for tensor in headers.tensors.values()}
        if (self.directory / WEIGHTS_FILE).is_file() or not (self.directory / INDEX_FILE).is_file():
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

    def _no_weights(self) -> str:
        pickles = sorted(file.name for file in self.directory.iterdir() if file.suffix in _PICKLES)
        if pickles:
            return (
                f"{self.directory} holds its weights only as {', '.join(pickles)}. Such files are "
                "pickles, which can run code when they are opened, and are not read. Convert them "
                f"once in an environment you trust: safetensors.torch.save_file(torch.load("
                f"{pickles[0]!r}, weights_only=True), {WEIGHTS_FILE!r})"
            )
        return (
            f"{self.directory} holds no weights: expected {WEIGHTS_FILE}, or {INDEX_FILE} and the "
            "files that it names"
        )


def read_json(file: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object.

    Raises:
        CheckpointError: The file is missing, unreadable, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, found {type(content).__name__}")
    return content


def read_header(file: Path) -> list[StoredTensor]:
    """Read the header of a safetensors file.

    Raises:
        CheckpointError: The header is truncated, not JSON, or contradicts itself.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            start = stream.read(8)
            if start == b"version ":
                raise CheckpointError(
                    f"{file.name}: is a Git LFS pointer, not the weights; fetch them (git lfs pull)"
                )
            length = int.from_bytes(start, "little")
            if len(start) < 8 or (length > size - 8 and length <= _MAX_HEADER):
                raise CheckpointError(
                    f"{file.name}: truncated inside its header ({size:,} bytes in all)"
                )
            if length > _MAX_HEADER:
                raise CheckpointError(f"{file.name}: is not a safetensors file")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("the header is not a JSON object")
        header.pop("__metadata__", None)
        tensors = [_entry(file, key, entry, 8 + length) for key, entry in header.items()]
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{file.name}: is not a readable safetensors file: {error}"
        ) from error
    return tensors


def _entry(file: Path, key: str, entry: Any, data: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"bad header entry for key {key!r}") from None
    numbers = (*shape, begin, end)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"bad shape or offsets for key {key!r}")
    if dtype in _ITEM_SIZES and end - begin != math.prod(shape) * _ITEM_SIZES[dtype]:
        raise ValueError(
            f"key {key!r} has {end - begin} bytes, which does not fit {dtype} of shape {shape}"
        )
    return StoredTensor(file, key, str(dtype), shape, data + begin, end - begin)


def read_rows(stored: StoredTensor, first: int, target: Tensor) -> None:
    """Fill a tensor with the rows of a stored one, from ``first`` on.

    The file is read, not mapped: mapped pages would count as memory beside the weights. A change of
    type, strides or device goes piece by piece.

    Args:
        stored: What to read.
        first: Row of it that becomes ``target[0]``.
        target: ``[rows, *stored.shape[1:]]``, of any strides, floating type and device.

    Raises:
        CheckpointError: The file ends early or cannot be read.
    """
    stored_dtype, row = FLOATS[stored.dtype], math.prod(stored.shape[1:])
    direct = target.is_contiguous() and target.device.type == "cpu" and target.dtype == stored_dtype
    try:
        with open(stored.file, "rb", buffering=0) as stream:
            stream.seek(stored.offset + first * row * stored_dtype.itemsize)
            if direct:
                _fill(stream, target.view(-1), stored)
                return
            step = max(1, _PIECE // max(1, row))
            buffer = torch.empty((min(step, len(target)), *stored.shape[1:]), dtype=stored_dtype)
            for begin in range(0, len(target), step):
                piece = buffer[: len(target) - begin]
                _fill(stream, piece.view(-1), stored)
                target[begin : begin + step].copy_(piece)
    except OSError as error:
        raise CheckpointError(f"{stored.file}: key {stored.key!r}: {error}") from error


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors hold the same numbers, compared piece by piece."""
    if one.shape != other.shape:
        return False
    rows, row = one.shape[0], math.prod(one.shape[1:])
    step = max(1, _PIECE // max(1, row))
    for first in range(0, rows, step):
        shape = (min(step, rows - first), *one.shape[1:])
        a, b = (torch.empty(shape, dtype=torch.float64) for _ in range(2))
        read_rows(one, first, a)
        read_rows(other, first, b)
        if not torch.equal(a, b):
            return False
    return True


def _fill(stream: RawIOBase, target: Tensor, stored: StoredTensor) -> None:
    """Read into a row-major CPU tensor until it is full."""
    waiting = target.view(torch.uint8).numpy().data
    while waiting:
        count = stream.readinto(waiting)
        if not count:
            raise CheckpointError(
                f"{stored.file}: truncated: key {stored.key!r} lacks {len(waiting):,} bytes"
            )
        waiting = waiting[count:]
