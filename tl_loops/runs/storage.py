"""Files of artefacts that survive a kill: there whole or not at all."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tl_loops.writing import write_whole

_CHECKSUM = b'"checksum":"'
_UNSEALED = "0" * 32


def _sealed(tensors: Mapping[str, Tensor], header: dict[str, str]) -> bytes:
    """A safetensors file whose header holds a checksum of every byte, its own taken as zeros."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = _in_order(save(plain, {**header, "checksum": _UNSEALED}))
    seal = _CHECKSUM + hashlib.blake2b(content, digest_size=16).hexdigest().encode()
    # Inside a value the quotes would be escaped, so that this is the entry itself.
    return content.replace(_CHECKSUM + _UNSEALED.encode(), seal, 1)


def _in_order(content: bytes) -> bytes:
    """The same file with its header sorted: safetensors writes it in an order of chance."""
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:begin]), sort_keys=True, separators=(",", ":"))
    encoded = header.encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + content[begin:]


def _unsealed(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of what :func:`_sealed` made.

    Raises:
        ValueError: What is wrong with the content.
    """
    try:
        tensors = load(content)
        n_header = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + n_header]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"it is not a readable safetensors file: {error}") from error
    checksum = header.get("checksum")
    if checksum is not None:
        seal, unsealed = _CHECKSUM + checksum.encode(), _CHECKSUM + _UNSEALED.encode()
        zeroed = content.replace(seal, unsealed, 1)
        if hashlib.blake2b(zeroed, digest_size=16).hexdigest() != checksum:
            raise ValueError("its checksum does not fit its content: it is damaged")
    return tensors, header


def save_artefact(
    path: str | Path, kind: str, tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> None:
    """Write tensors and metadata to one safetensors file, whole or not at all."""
    write_whole(path, _sealed(tensors, {"kind": kind, "metadata": json.dumps(metadata)}))


def load_artefact(
    path: str | Path, kind: str, names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_artefact` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, holds something else, or lacks a tensor.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        tensors, header = _unsealed(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if header.get("kind") != kind:
        raise ValueError(f"{path} holds {header.get('kind', 'no lens')!r}, expected {kind!r}")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"{path} lacks the tensor(s) {', '.join(missing)}")
    try:
        return tensors, json.loads(header["metadata"])
    except (KeyError, ValueError):
        raise ValueError(f"{path} cannot be read: its metadata is damaged") from None
