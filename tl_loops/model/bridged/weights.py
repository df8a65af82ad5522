"""The weights of a bridge as those of a looped transformer, without a copy."""

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import LoopedSemanticsError
from tl_loops.families.base import Family, TensorSpec
from tl_loops.model.bridged.family import BridgedFamily
from tl_loops.model.weights import Weights

_WRAPPED = re.compile(r"\._original_component\b")


def check_unprocessed(bridge: Any) -> None:
    """Raise on a bridge whose weights TransformerLens has folded or centred.

    Raises:
        LoopedSemanticsError: It has.
    """
    if getattr(bridge, "_weights_processed", False):
        raise LoopedSemanticsError(
            "enable_compatibility_mode() has processed this bridge's weights, which then differ "
            "from those of the Hugging Face model: boot it anew, and pass no_processing=True"
        )


def named_weights(bridge: Any) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a bridge under the names that they have in the Hugging Face model."""
    parameters = bridge.original_model.named_parameters(remove_duplicate=False)
    return ((_WRAPPED.sub("", name), parameter) for name, parameter in parameters)


def shared_weights(
    bridge: Any, family: Family, bridged: BridgedFamily, cfg: LoopedTransformerConfig
) -> Weights:
    """The parameters that run in a bridge as physical weights, each a view of its memory.

    Args:
        bridge: The bridge.
        family: What its checkpoints hold.
        bridged: How the bridge holds it.
        cfg: Config of the looped transformer.

    Raises:
        LoopedSemanticsError: A parameter is missing or of another shape.
    """
    parameters: dict[str, Tensor] = {}
    for name, parameter in named_weights(bridge):
        for found, expected in bridged.spellings:
            if name.startswith(found):
                name = expected + name.removeprefix(found)
        parameters[family.spelled(name)] = parameter.detach()
    for spec in family.tensors(cfg):
        for held in _as_held(spec, bridged):
            stored = parameters.get(held.key)
            if stored is None or tuple(stored.shape) != held.shape:
                found = "is missing" if stored is None else f"has shape {tuple(stored.shape)}"
                raise LoopedSemanticsError(
                    f"the Hugging Face model is no {family.name} as tl_loops knows it: parameter "
                    f"{held.key} {found}, expected shape {held.shape}"
                )
            rows, start = stored.T if held.turned else stored, 0
            for part in held.parts:
                yield part.name, part.view(rows[start : start + part.rows])
                start += part.rows


def _as_held(spec: TensorSpec, bridged: BridgedFamily) -> Iterator[TensorSpec]:
    """A stored tensor as the bridge holds it: whole, or a tensor for each of its parts."""
    for joined, modules in bridged.split.items():
        if f".{joined}." in spec.key:
            n_in = spec.shape[:1] if spec.turned else spec.shape[1:]
            width = n_in if len(spec.shape) == 2 else ()
            for module, part in zip(modules, spec.parts, strict=True):
                key = spec.key.replace(f".{joined}.", f".{module}.")
                yield TensorSpec(key, (part.rows, *width), (part,))
            return
    yield spec
