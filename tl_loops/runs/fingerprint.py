"""Which weights a model has: a hash that is computed when it is asked for, and once while it holds.

Hashing reads every weight, about two seconds a gigabyte.
"""

import hashlib
import json
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from tl_loops.layout.model import Model
from tl_loops.upstream.config_fields import CHANGES_NO_NUMBER

_SAMPLED = 4096
"""Elements of each weight that are compared besides PyTorch's count of its changes."""

_KEPT_ALIVE = 256 * 2**20
"""Bytes of weights up to which a fingerprint that is not yet asked for keeps its model alive."""

_PIECE = 2**22
"""Numbers that are copied at once."""

State = tuple[Any, ...]

_known: "weakref.WeakKeyDictionary[nn.Module, tuple[str, State, str]]" = weakref.WeakKeyDictionary()
"""The last hash of each model, with the architecture and the state of the weights that it is of."""


def model_fingerprint(model: Model) -> str:
    """Hash of a model's architecture and of every weight; the iterations are not part of it.

    Two models with one fingerprint give the same numbers on the same device. Reads all weights,
    but not again while they are unchanged. A change shows in PyTorch's count of changes, in the
    place of the memory or, after an edit through ``.data``, which PyTorch does not count, in 4,096
    elements of each weight.
    """
    architecture, state = _architecture(model), _state(model)
    module: Any = model
    known = _known.get(module)
    if known is not None and state is not None and known[:2] == (architecture, state):
        return known[2]
    found = _hashed(architecture, model)
    if state is not None:
        _known[module] = (architecture, state, found)
    return found


class PendingFingerprint:
    """A model's fingerprint of now, which is computed when it is first asked for.

    It is lost where the weights change before, or where the model is deleted before. Small models
    are kept alive until then.

    Args:
        model: The model.
    """

    def __init__(self, model: Model):
        self.architecture, self.state = _architecture(model), _state(model)
        n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.kept = model if n_bytes <= _KEPT_ALIVE else None
        self.model = weakref.ref(model)
        # Tensors of inference mode have no count of their changes.
        self.found = _hashed(self.architecture, model) if self.state is None else None

    def __call__(self) -> str | None:
        """The fingerprint; ``None`` where it is lost."""
        model = self.model()
        if self.found is not None or model is None:
            return self.found
        if (_architecture(model), _state(model)) != (self.architecture, self.state):
            return None
        return model_fingerprint(model)


def _architecture(model: Model) -> str:
    cfg = {name: v for name, v in model.cfg.to_dict().items() if name not in CHANGES_NO_NUMBER}
    return json.dumps(cfg, sort_keys=True, default=str)


def _state(model: Model) -> State | None:
    """What differs after a change of the weights, or ``None`` where nothing tells."""
    found = []
    for parameter in model.parameters():
        if parameter.is_inference():
            return None
        found.append(
            (
                parameter.data_ptr(),
                parameter._version,
                parameter.dtype,
                parameter.shape,
                parameter.stride(),
                _sample(parameter),
            )
        )
    return tuple(found)


def _sample(parameter: Tensor) -> bytes:
    """Elements at equal distances in memory."""
    flat = parameter.detach()
    n = flat.numel()
    step = max(1, n // _SAMPLED) | 1  # odd: not in one column
    dense = flat.untyped_storage().nbytes() >= (flat.storage_offset() + n) * flat.element_size()
    if dense:  # without a copy of weights that are not row-major
        flat = flat.as_strided((-(-n // step),), (step,), flat.storage_offset())
    else:
        flat = flat.flatten()[::step]
    compact = flat.cpu().clone(memory_format=torch.contiguous_format)
    return compact.view(torch.uint8).numpy().tobytes()


def _hashed(architecture: str, model: Model) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(architecture.encode())
    # Shared weights come once. Without their names: those of a coda count the iterations.
    for parameter in model.parameters():
        digest.update(f"{parameter.dtype} {list(parameter.shape)}".encode())
        rows = parameter.reshape(1) if parameter.ndim == 0 else parameter
        # Piece by piece: most weights are views, of which a copy is made.
        for piece in rows.split(max(1, _PIECE // max(1, rows[:1].numel()))):
            digest.update(content_bytes(piece))
    return digest.hexdigest()


def content_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor in row-major order, as bytes; without a copy where they are so."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    flat = flat.as_strided(flat.shape, (1,))  # a single number may have any stride
    return flat.view(torch.uint8).numpy().data
