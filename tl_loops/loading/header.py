"""The header of a safetensors file, by the rules of the format.

The rules are those of the format's description: the length of the header (8 bytes, little endian),
a JSON object in UTF-8 that begins with a brace, and the tensors' bytes, which fill the rest of the
file without holes and without overlap.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_loops.errors import CheckpointError, shortened
from tl_loops.loading.json_file import open_regular, parse_json
from tl_loops.mechanisms.tensors import FLOATS

_ITEM_SIZES = {
    **{name: dtype.itemsize for name, dtype in FLOATS.items()},
    **{"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8},
    **{"C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1},
}
_PACKED = ("F4", "F6_E2M3", "F6_E3M2")
"""Types of the format with less than a byte an element: known, not weights here."""

_MAX_HEADER = 100_000_000
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: ``nbytes`` at ``offset`` of ``file``, of a safetensors type."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: Path) -> list[StoredTensor]:
    """Read the header of a safetensors file.

    Returns:
        Its tensors in the order of their bytes, which fill the file from the header on.

    Raises:
        CheckpointError: The file breaks a rule of the format; the message names file and key.
    """
    try:
        with open_regular(file) as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            length = _header_length(stream.read(8), size)
            encoded = stream.read(length)
        if not encoded.startswith(b"{"):
            raise ValueError("the header does not begin with '{'")
        header = parse_json(encoded)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or any(type(v) is not str for v in metadata.values()):
            raise ValueError("'__metadata__' must map text to text")
        tensors = [_entry(file, key, entry, 8 + length) for key, entry in header.items()]
        tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
        _check_places(tensors, 8 + length, size)
    except CheckpointError as error:
        told = str(error)
        raise CheckpointError(told if told.startswith(file.name) else f"{file.name}: {told}") from (
            None
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file.name}: is not a readable safetensors file: {error}"
        ) from error
    return tensors


def _header_length(start: bytes, size: int) -> int:
    if start == b"version ":
        raise CheckpointError("is a Git LFS pointer, not the weights; fetch them (git lfs pull)")
    length = int.from_bytes(start, "little")
    if start.startswith(_PICKLE_STARTS) and length > _MAX_HEADER:
        raise CheckpointError(
            "is not a safetensors file but a pickle under that name, which can run code when it is "
            "opened and is not read"
        )
    if len(start) < 8 or (length > size - 8 and length <= _MAX_HEADER):
        raise CheckpointError(f"truncated inside its header ({size:,} bytes in all)")
    if length > _MAX_HEADER:
        raise CheckpointError("is not a safetensors file")
    return length


def _entry(file: Path, key: str, entry: Any, data: int) -> StoredTensor:
    shown = shortened(key)
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"bad header entry for key {shown}") from None
    numbers = (*shape, begin, end)
    if not all(type(number) is int and 0 <= number < 2**64 for number in numbers):
        raise ValueError(f"bad shape or offsets for key {shown}")
    if not isinstance(dtype, str) or dtype not in (*_ITEM_SIZES, *_PACKED):
        raise ValueError(f"the format has no type {shortened(dtype)}, as key {shown} has")
    if dtype in _ITEM_SIZES and end - begin != math.prod(shape) * _ITEM_SIZES[dtype]:
        raise ValueError(
            f"key {shown} has {end - begin} bytes, which does not fit {dtype} of shape "
            f"{shortened(shape)}"
        )
    return StoredTensor(file, key, dtype, shape, data + begin, end - begin)


def _check_places(tensors: list[StoredTensor], data: int, size: int) -> None:
    """Whether the tensors, in the order of their bytes, fill the file."""
    end = data
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlap those of another" if tensor.offset < end else "leave a hole before them"
            raise CheckpointError(
                f"the bytes of key {shortened(tensor.key)} {what}: they begin at byte "
                f"{tensor.offset:,}, expected {end:,}"
            )
        end += tensor.nbytes
    if end != size:
        what = "truncated" if end > size else "has bytes beyond its tensors"
        raise CheckpointError(f"{what}: its tensors end at byte {end:,}, the file at {size:,}")
