"""Fitted lenses as safetensors files that say what they were fitted on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tl_loops.files import write_whole

_SIZES = ("n_prelude", "n_core", "n_coda", "d_model", "d_vocab_out")


def model_sizes(cfg: Any) -> dict[str, int]:
    """The sizes of a model that a fitted lens depends on; iterations are not among them."""
    return {name: int(getattr(cfg, name)) for name in _SIZES}


def check_sizes(kind: str, fitted: dict[str, int], cfg: Any) -> None:
    """Refuse a lens that was fitted on a model of other sizes.

    Raises:
        ValueError: A size differs; the message names it.
    """
    for name, here in model_sizes(cfg).items():
        if fitted.get(name) != here:
            raise ValueError(
                f"this {kind} lens was fitted on a model with {name}={fitted.get(name)}, but this "
                f"model has {name}={here}"
            )


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
