"""What a bridged family is: where its tensors fire, and how its Hugging Face model is run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tl_loops.model.bridged.taps import Tap


def _no_arguments(model: Any, tokens: Tensor, initial_state: Tensor | None) -> dict[str, Any]:
    return {}


def _nothing(model: Any) -> AbstractContextManager:
    return nullcontext()


def _no_counts(bridge: Any) -> tuple[()]:
    return ()


@dataclass(frozen=True)
class BridgedFamily:
    """How TransformerBridge runs a family.

    Attributes:
        name: Name of the family in ``tl_loops.families``.
        adapter: Class name of TransformerLens's adapter.
        taps: The taps of an unrolled bridge.
        missing: Ends of hook names that cannot be given, with the reason.
        arguments: Further arguments of the bridge's forward pass, from the unrolled bridge, the
            tokens [batch, pos] and the initial state that was asked for, if any.
        iterations: Makes the Hugging Face model run the iterations of the unrolled bridge, for a
            block of code.
        counts: What ``iterations`` sets for a time: objects and names of their attributes.
        masks: Whether the Hugging Face model honours an attention mask.
        spellings: Beginnings of parameter names in the Hugging Face model, each with the one that
            the family's checkpoints have for it.
        split: Modules whose weights the bridge runs as several ``[out, in]`` matrices, and the
            modules that hold these.
    """

    name: str
    adapter: str
    taps: Callable[[Any], Iterable[Tap]]
    missing: Mapping[str, str] = field(default_factory=dict)
    arguments: Callable[[Any, Tensor, Tensor | None], dict[str, Any]] = _no_arguments
    iterations: Callable[[Any], AbstractContextManager] = _nothing
    counts: Callable[[Any], Sequence[tuple[Any, str]]] = _no_counts
    masks: bool = True
    spellings: tuple[tuple[str, str], ...] = ()
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


SPLIT_INPUTS: dict[str, str] = dict.fromkeys(
    ("hook_q_input", "hook_k_input", "hook_v_input", "hook_attn_in", "hook_mlp_in", "hook_result"),
    "the Hugging Face block has one input for all heads and one output of all heads; "
    "tl_loops.LoopedTransformer computes them one by one",
)
"""Optional hook points of LoopedTransformer that no bridged model gives."""
