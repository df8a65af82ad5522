"""JSON files of a checkpoint: read whole, or errors that name them."""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from tl_loops.errors import CheckpointError, shortened

_MOST_BYTES = 1_000_000_000
"""An index of a million tensors has a tenth of it."""

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(file: Path, buffering: int = -1) -> BinaryIO:
    """A file opened for reading; what is no file is neither read nor waited for.

    Raises:
        OSError: It is absent or cannot be opened.
        CheckpointError: It is a directory, a pipe, a socket or a device.
    """
    found = stat.S_IFMT(os.stat(file).st_mode)
    if found != stat.S_IFREG:
        raise CheckpointError(f"{file.name}: is {_KINDS.get(found, 'no file')}, expected a file")
    return open(file, "rb", buffering=buffering)


def read_json(file: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object.

    Raises:
        CheckpointError: The file is missing, unreadable, or holds something else.
    """
    try:
        with open_regular(file) as stream:
            encoded = stream.read(_MOST_BYTES + 1)
        if len(encoded) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        content = parse_json(encoded)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except CheckpointError as error:
        raise CheckpointError(f"{file.parent / str(error)}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, found {type(content).__name__}")
    return content


def parse_json(encoded: bytes) -> Any:
    """What JSON text in UTF-8 says.

    Raises:
        ValueError: It is not UTF-8, not JSON, nested too deeply, gives a key twice with different
            values, or holds half of a surrogate pair, which no text can be written with.
    """
    text = encoded.decode("utf-8")
    try:
        content = json.loads(text, object_pairs_hook=_unique)
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair (\\ud800 to \\udfff)") from None
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        for key, value in pairs:
            if content[key] != value:
                raise ValueError(f"key {shortened(key)} is there twice with different values")
    return content
