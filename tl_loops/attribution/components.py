"""What an edge joins: the components that write to the residual stream, and those that read it."""

from dataclasses import dataclass
from typing import Literal

from tl_loops.layout.coordinate import Phase
from tl_loops.layout.labels import part_label
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model
from tl_loops.runs.activations import find_activation

Kind = Literal["embed", "attn", "head", "query", "key", "value", "mlp", "logits"]
_EMBED = "hook_embed"
_READS: dict[Kind, str] = {"query": "q", "key": "k", "value": "v"}


@dataclass(frozen=True)
class Component:
    """Something that writes to the residual stream or reads from it.

    Attributes:
        label: ``"embed"``, ``"r3.1_attn_out"``, ``"r3.1_mlp_out"``, ``"r3.L1H4"``,
            ``"r3.L1H4.query"`` (of keys and values: the key-value head), ``"logits"``.
        kind: What it is.
        name: Canonical hook name; empty for the logits.
        block: Index of the unrolled block.
        phase: Phase of the block.
        iteration: Iteration of a core block.
        layer: Layer inside the phase.
        head: Head, if it is one.
        stack: The stack that the iteration calls, for models with more than one.
    """

    label: str
    kind: Kind
    name: str
    block: int | None = None
    phase: Phase | None = None
    iteration: int | None = None
    layer: int | None = None
    head: int | None = None
    stack: str | None = None


def senders_of(model: Model, layout: LoopLayout, heads: bool) -> tuple[Component, ...]:
    """Embedding, attention (or its heads) and MLP of every block, in the order of the run."""
    found = [Component("embed", "embed", _EMBED)]
    for block in range(layout.n_layers):
        if heads:
            found += [_head(layout, block, h, "head", "z") for h in range(model.cfg.n_heads)]
        else:
            found.append(_whole(layout, block, "attn"))
        if not model.cfg.attn_only:
            found.append(_whole(layout, block, "mlp"))
    return tuple(found)


def receivers_of(
    model: Model, layout: LoopLayout, heads: bool, split_qkv: bool
) -> tuple[Component, ...]:
    """Every component that reads the stream, in the order of the run, and the logits last."""
    if not split_qkv:
        return (*senders_of(model, layout, heads)[1:], Component("logits", "logits", ""))
    found = []
    for block in range(layout.n_layers):
        for kind, name in _READS.items():
            n_heads = find_activation(model, name).n_heads(model.cfg) or 0
            found += [_head(layout, block, head, kind, name) for head in range(n_heads)]
        if not model.cfg.attn_only:
            found.append(_whole(layout, block, "mlp"))
    return (*found, Component("logits", "logits", ""))


def _whole(layout: LoopLayout, block: int, kind: Literal["attn", "mlp"]) -> Component:
    at = layout.coordinate(block)
    label = f"{layout.label(block)}_{kind}_out"
    name = f"blocks.{block}.hook_{kind}_out"
    return Component(label, kind, name, block, at.phase, at.iteration, at.layer, None, at.stack)


def _head(layout: LoopLayout, block: int, head: int, kind: Kind, name: str) -> Component:
    at = layout.coordinate(block)
    label = part_label(layout, block, "H", head) + ("" if kind == "head" else f".{kind}")
    full = f"blocks.{block}.attn.hook_{name}"
    return Component(label, kind, full, block, at.phase, at.iteration, at.layer, head, at.stack)
