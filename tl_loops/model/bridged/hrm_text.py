"""HRM-Text after TransformerBridge: two stacks, whose layers fire once per call of their stack."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tl_loops.errors import LoopedSemanticsError
from tl_loops.model.bridged.family import SPLIT_INPUTS, BridgedFamily
from tl_loops.model.bridged.llama_layer import LLAMA_PLACES, norm_places
from tl_loops.model.bridged.taps import (
    Constant,
    Gate,
    PartOfSum,
    Reading,
    ReadOnly,
    Scaled,
    SumWith,
    Tap,
    block_taps,
    tap,
)

_WEIGHTLESS = ReadOnly(
    "a bridge cannot take an edit or a gradient inside a norm that has no weight, as those of "
    "HRM-Text: edit what enters or leaves it, or call model.looped(), a LoopedTransformer over the "
    "same weights in memory"
)
_FIRST = {"L": "hook_initial_state", "H": "hook_slow_initial_state"}


def _taps(model: Any) -> Iterator[Tap]:
    cfg, layout = model.cfg, model.layout
    scaled = Scaled(cfg.embed_scale)
    # What the slow stack starts from is the embedding, and nothing else reads it.
    yield tap(
        "embed.hook_out",
        [[Reading("hook_embed", scaled), Reading("hook_slow_initial_state", scaled)]],
    )
    for stack in ("L", "H"):
        calls = [t for t, called in enumerate(layout.stacks) if called == stack]
        for layer in range(layout.n_core):
            source = f"{stack}_blocks.{layer}"
            blocks = [layout.index(iteration=t, layer=layer) for t in calls]
            streams = [f"blocks.{i}.hook_resid_pre" for i in blocks]
            entries: list[list[str | Reading]] = [[stream] for stream in streams]
            if layer == 0:
                for t, entry in zip(calls, entries, strict=True):
                    entry[:0] = _entry(model, t)
            yield tap(f"{source}.hook_in", entries)
            # The stream between the two branches is seen at the first one's output.
            yield tap(
                f"{source}.attn.hook_out",
                [
                    [
                        f"blocks.{i}.hook_attn_out",
                        Reading(f"blocks.{i}.hook_resid_mid", SumWith(stream), (stream,)),
                    ]
                    for i, stream in zip(blocks, streams, strict=True)
                ],
            )
            places = {
                **LLAMA_PLACES,
                **{place: (name, _WEIGHTLESS) for place, name in norm_places("ln1", "ln2").items()},
                "attn.hook_gate": ("attn.hook_gate", Gate(cfg.d_head)),
                "mlp.hook_out": "hook_mlp_out",
                "hook_out": "hook_resid_post",
            }
            yield from block_taps(source, blocks, places)
        last = layout.n_iterations - 1
        norms = ["ln_final" if t == last else f"iter.{t}.norm" for t in calls]
        for point in ("hook_scale", "hook_normalized"):
            readings = [[Reading(f"{norm}.{point}", _WEIGHTLESS)] for norm in norms]
            yield tap(f"{stack}_ln_final.{point}", readings)
        yield tap(f"{stack}_ln_final.hook_out", [[f"iter.{t}.hook_state_out"] for t in calls])
    for point in ("hook_in", "hook_out"):
        yield tap(f"unembed.{point}", [[f"unembed.{point}"]])


def _entry(model: Any, t: int) -> list[str | Reading]:
    """What the first layer of a call reads: the sum of the stack's own state and the other's."""
    stacks = model.layout.stacks
    own = stacks[t]
    other = "H" if own == "L" else "L"

    def source(stack: str) -> str:
        """The hook point that last saw a stack's state."""
        calls = [s for s in range(t) if stacks[s] == stack]
        return f"iter.{calls[-1]}.hook_state_out" if calls else _FIRST[stack]

    readings: list[str | Reading] = []
    if t == 0:
        readings.append(Reading("hook_initial_state", Constant(model.initial_state.state)))
    for name, stack in (("hook_state_in", own), ("hook_other_in", other)):
        term = source(stack)
        readings.append(Reading(f"iter.{t}.{name}", PartOfSum(term), (term,)))
    return [*readings, f"iter.{t}.hook_injected"]


def _arguments(model: Any, tokens: Tensor, initial_state: Tensor | None) -> dict[str, Any]:
    if initial_state is not None:
        raise LoopedSemanticsError(
            "the Hugging Face model behind the bridge takes no initial state: edit "
            "hook_initial_state instead"
        )
    return {"use_cache": False}


def _counts(bridge: Any) -> list[tuple[Any, str]]:
    stacks = bridge.original_model.model
    return [(stacks.config, "H_cycles"), (stacks, "L_bp_cycles_padded")]


@contextmanager
def _iterations(model: Any) -> Iterator[None]:
    """As many cycles as that many calls are, with gradients through all of them."""
    stacks = model.bridge.original_model.model
    config = stacks.config
    H_cycles = model.cfg.n_iterations // (config.L_cycles + 1)
    before = config.H_cycles, stacks.L_bp_cycles_padded
    # As released, the first calls of every cycle run without gradients.
    config.H_cycles, stacks.L_bp_cycles_padded = H_cycles, [config.L_cycles] * H_cycles
    try:
        yield
    finally:
        config.H_cycles, stacks.L_bp_cycles_padded = before


BRIDGED_HRM_TEXT = BridgedFamily(
    name="hrm-text-split",
    adapter="HrmTextArchitectureAdapter",
    taps=_taps,
    missing=SPLIT_INPUTS,
    arguments=_arguments,
    iterations=_iterations,
    counts=_counts,
)
