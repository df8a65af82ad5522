"""Files that survive a kill: artefacts and progress, there whole or not at all."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tl_loops.errors import CheckpointError


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one.

    The content goes to a temporary file beside the target, which then takes its name.

    Args:
        path: Where to; an existing file is replaced.
        content: The whole content.

    Raises:
        FileNotFoundError: The directory does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no directory {target.parent}")
    staged = target.with_name(f".{target.name}.writing")
    try:
        with open(staged, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(staged, target)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def save_artefact(
    path: str | Path, kind: str, tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> None:
    """Write tensors and metadata to one safetensors file, whole or not at all."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(plain, {"kind": kind, "metadata": json.dumps(metadata)}))


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
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if header.get("kind") != kind:
        raise ValueError(f"{path} holds {header.get('kind', 'no lens')!r}, expected {kind!r}")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"{path} lacks the tensor(s) {', '.join(missing)}")
    return tensors, json.loads(header["metadata"])


def save_progress(
    path: str | os.PathLike[str],
    kind: str,
    identity: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    n_done: int,
) -> None:
    """Write how far a run has come; a kill at any moment leaves this state or the one before.

    Args:
        path: Of the file.
        kind: What is run, such as ``"measurement"``.
        identity: What decides the result of the run, in JSON's types.
        tensors: What the run holds.
        n_done: How much of it is done.

    Raises:
        FileNotFoundError: The directory does not exist.
    """
    header = {
        "kind": f"tl_loops {kind}",
        "identity": json.dumps(identity),
        "n_done": str(n_done),
    }
    write_whole(path, save({name: t.contiguous() for name, t in tensors.items()}, header))


def load_progress(
    path: str | os.PathLike[str], kind: str, identity: Mapping[str, Any]
) -> tuple[dict[str, Tensor], int] | None:
    """How far a run has come.

    Args:
        path: Of the file.
        kind: As given to :func:`save_progress`.
        identity: Of the run that wants to go on.

    Returns:
        The tensors and how much is done; ``None`` if there is no file.

    Raises:
        CheckpointError: The file is damaged, is of another kind, or belongs to another run; the
            message says in what it differs.
    """
    if not Path(path).exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is no readable checkpoint of a {kind} ({error}); delete it or give another "
            "path"
        ) from error
    if header.get("kind") != f"tl_loops {kind}":
        raise CheckpointError(f"{path} is no checkpoint of a {kind}; give another path")
    theirs = json.loads(header["identity"])
    for field, value in json.loads(json.dumps(identity)).items():
        if theirs.get(field) != value:
            raise CheckpointError(
                f"{path} belongs to another run: {field} is {_short(theirs.get(field))} there and "
                f"{_short(value)} here; delete it or give another path"
            )
    return tensors, int(header["n_done"])


def _short(value: Any) -> str:
    return ", ".join(value) if isinstance(value, dict) else repr(value)
