"""Checkpoint directories for tests of loading: copies of the fixtures, changed."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parents[2] / "parity" / "fixtures"


def stored(name: str) -> dict[str, torch.Tensor]:
    """The stored tensors of a fixture, read by the safetensors library."""
    return load_file(FIXTURES / name / "model.safetensors")


def written(
    directory: Path, name: str, tensors: dict[str, torch.Tensor] | None = None, **changes: Any
) -> Path:
    """A copy of a fixture with other tensors and config fields; ``...`` removes a field."""
    directory.mkdir(exist_ok=True)
    config = {**json.loads((FIXTURES / name / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = stored(name) if tensors is None else tensors
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        directory / "model.safetensors",
    )
    return directory


def raw_file(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file of a header, as JSON or as it is, and bytes."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data
