"""The file of a run: what it is a run of, and the results of its batches, one after another.

A batch is appended when it is done, so that the cost of saving does not grow with the run. A kill
in the middle of an append leaves an unfinished end, which counts as not there.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tl_loops.errors import CheckpointError, shortened
from tl_loops.runs.shards import WHOLE, Shard
from tl_loops.writing import append_whole, check_regular, write_whole

_FORMAT = "tl_loops run 1"
_N_LENGTH = 8
_N_CHECK = 16


@dataclass(frozen=True)
class RunDescription:
    """What a run is a run of.

    Attributes:
        kind: What is run, such as ``"measurement"``.
        identity: What decides its result, in JSON's types; the size of its batches is part of it.
        n_batches: How many batches the whole run has.
        about: What its result says besides its numbers, in JSON's types.
    """

    kind: str
    identity: Mapping[str, Any]
    n_batches: int
    about: Mapping[str, Any]

    def check_same(self, other: "RunDescription", here: str, there: str) -> None:
        """Raise where another run is described.

        Args:
            other: The other description.
            here: What this one is called in the message.
            there: What the other one is called.

        Raises:
            CheckpointError: The message says what differs.
        """
        if self.kind != other.kind:
            raise CheckpointError(
                f"{there} holds another kind of run: {other.kind}; {here} is of kind {self.kind}; "
                "give another path"
            )
        mine, theirs = (json.loads(json.dumps(run.identity)) for run in (self, other))
        for field in dict.fromkeys((*mine, *theirs)):
            if mine.get(field) != theirs.get(field):
                a, b = _shown(theirs.get(field), mine.get(field))
                raise CheckpointError(
                    f"{there} belongs to another run: {field} is {a} there and {b} in {here}; "
                    "delete it or give another path"
                )
        if self.n_batches != other.n_batches:
            raise CheckpointError(
                f"{there} has {other.n_batches} batches and {here} has {self.n_batches}"
            )


@dataclass(frozen=True, eq=False)
class SavedRun:
    """A run, or a shard of one, as a file holds it.

    Attributes:
        run: What it is a run of.
        shard: Which shard.
        batches: The tensors of each batch that is done, by its number.
        name: What messages call it: the path of its file.
        n_bytes: Where the next batch is appended in the file.
    """

    run: RunDescription
    shard: Shard
    batches: Mapping[int, Mapping[str, Tensor]]
    name: str
    n_bytes: int = 0

    @property
    def missing(self) -> list[int]:
        """The batches of this shard that are not done."""
        wanted = range(self.run.n_batches)
        return [b for b in wanted if self.shard.takes(b) and b not in self.batches]

    def encoded(self) -> bytes:
        """The file's content, batches in the order of their numbers."""
        parts = [_header(self.run, self.shard)]
        parts += [_record(number, self.batches[number]) for number in sorted(self.batches)]
        return b"".join(parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        write_whole(path, self.encoded())


def start_file(path: str | os.PathLike[str], run: RunDescription, shard: Shard) -> SavedRun:
    """Write a file without any batch."""
    begun = SavedRun(run, shard, {}, str(path))
    begun.save(path)
    return replace(begun, n_bytes=len(begun.encoded()))


def append_batch(
    path: str | os.PathLike[str], n_bytes: int, number: int, tensors: Mapping[str, Tensor]
) -> int:
    """Append a batch to a file; a kill at any moment leaves the file with or without it.

    Args:
        path: Of the file.
        n_bytes: Where its last whole batch ends; what is after that is overwritten.
        number: Of the batch.
        tensors: Its results.

    Returns:
        Where the batch ends.

    Raises:
        OSError: The disk is full or fails; the file is left without the batch.
    """
    record = _record(number, tensors)
    append_whole(path, record, n_bytes)
    return n_bytes + len(record)


def read_file(path: str | os.PathLike[str]) -> SavedRun | None:
    """Read a file of a run.

    Returns:
        What it holds; ``None`` if there is no file.

    Raises:
        CheckpointError: It is damaged, or no file of a run.
    """
    if not check_regular(path).exists():
        return None
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return decoded(content, str(path))


def decoded(content: bytes, name: str) -> SavedRun:
    """What :meth:`SavedRun.encoded` made.

    Args:
        content: Of the file.
        name: What messages call it.

    Raises:
        CheckpointError: As :func:`read_file`.
    """
    run, shard, batches, place = None, WHOLE, {}, 0
    try:
        while place < len(content):
            part, end = _framed(content, place)
            if part is None:  # the unfinished end that a kill leaves
                break
            tensors, values = _content(part)
            if run is None:
                run, shard = _description(values)
            else:
                number = values["batch"]
                if number in batches or not 0 <= number < run.n_batches:
                    raise ValueError(f"batch {number} of {run.n_batches} is out of place")
                batches[number] = tensors
            place = end
        if run is None:
            raise ValueError("it has no header")
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{name} is no readable checkpoint or shard of a run ({error}); delete it or give "
            "another path"
        ) from error
    return SavedRun(run, shard, batches, name, place)


def _header(run: RunDescription, shard: Shard) -> bytes:
    values = {
        "format": _FORMAT,
        "kind": run.kind,
        "identity": run.identity,
        "n_batches": run.n_batches,
        "about": run.about,
        "shard": [shard.index, shard.count],
    }
    return _frame({}, values)


def _description(values: Mapping[str, Any]) -> tuple[RunDescription, Shard]:
    if values.get("format") != _FORMAT:
        raise ValueError(f"its format is {values.get('format')!r}, expected {_FORMAT!r}")
    names = ("kind", "identity", "n_batches", "about")
    return RunDescription(*(values[name] for name in names)), Shard(*values["shard"])


def _record(number: int, tensors: Mapping[str, Tensor]) -> bytes:
    return _frame(tensors, {"batch": number})


def _frame(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> bytes:
    """Tensors and values between their length and a checksum. Equal ones give equal bytes."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(plain, {"values": json.dumps(values)})
    length = len(content).to_bytes(_N_LENGTH, "little")
    return length + _check(length) + content + _check(content)


def _framed(content: bytes, place: int) -> tuple[bytes | None, int]:
    """What is framed at a place, and where the frame ends; ``None`` for an unfinished one."""
    start = place + _N_LENGTH + _N_CHECK
    length, check = content[place : place + _N_LENGTH], content[place + _N_LENGTH : start]
    if len(check) < _N_CHECK:
        return None, place
    if check != _check(length):
        raise ValueError("the length of a part does not fit its checksum: it is damaged")
    stop = start + int.from_bytes(length, "little")
    if stop + _N_CHECK > len(content):
        return None, place
    if content[stop : stop + _N_CHECK] != _check(content[start:stop]):
        raise ValueError("the checksum of a part does not fit its content: it is damaged")
    return content[start:stop], stop + _N_CHECK


def _content(part: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and values of what was framed."""
    n_header = int.from_bytes(part[:8], "little")
    metadata = json.loads(part[8 : 8 + n_header])["__metadata__"]
    return load(part), json.loads(metadata["values"])


def _check(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_N_CHECK).digest()


def _shown(a: Any, b: Any) -> tuple[str, str]:
    """Two values that differ, cut down to where they do."""
    if isinstance(a, dict) and isinstance(b, dict):
        if set(a) != set(b):
            return ", ".join(a) or "nothing", ", ".join(b) or "nothing"
        name = next(name for name in a if a[name] != b[name])
        return f"{name}={shortened(a[name])}", f"{name}={shortened(b[name])}"
    return shortened(a), shortened(b)
