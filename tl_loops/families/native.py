"""tl_loops's own format: the config by its fields, the weights under their physical names."""

from collections.abc import Iterator
from typing import Any

from tl_loops.config.config import LoopedTransformerConfig, dtype_name
from tl_loops.config.weights import physical_tensors
from tl_loops.errors import CheckpointError
from tl_loops.families.base import (
    Empty,
    Family,
    KnownModel,
    Part,
    Released,
    TensorSpec,
    as_is,
)
from tl_loops.mechanisms.tensors import FLOATS, PhysicalTensor

MODEL_TYPE = "tl_loops"
FORMAT_VERSION = 1


_DTYPES = {dtype_name(dtype): dtype for dtype in FLOATS.values()}


def _derive(released: Released) -> dict[str, Any]:
    version, fields = released.get("format_version"), released.get("config")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"'format_version' is {version!r}, this version of tl_loops reads {FORMAT_VERSION}"
        )
    if not isinstance(fields, dict):
        raise CheckpointError("the required field 'config' (a mapping of fields) is missing")
    dtype = fields.get("dtype", "float32")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"'config.dtype' is {dtype!r}, expected one of {', '.join(_DTYPES)}")
    # These two are otherwise filled in from the directory and the family.
    named = {"model_name": "custom", "original_architecture": None}
    return {**named, **fields, "dtype": _DTYPES[dtype]}


def _tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    for name, tensor in physical_tensors(cfg).items():
        part = Part(name, tensor.shape[0], as_is, _allocator(tensor))
        yield TensorSpec(name, tensor.shape, (part,))


def _allocator(tensor: PhysicalTensor) -> Empty:
    # Files are row-major in TransformerLens's orientation; the model wants F.linear's.
    return lambda shape, dtype, device: tensor.empty(dtype, device)


NATIVE = Family(
    name="native",
    paper="",
    model_types=(MODEL_TYPE,),
    architectures=(),
    fields={},
    fixed={},
    flags={},
    derive=_derive,
    tensors=_tensors,
    known=(
        KnownModel("tl-loops-tiny", packaged="tiny"),
        KnownModel("tl-loops-text", packaged="text"),
    ),
)
