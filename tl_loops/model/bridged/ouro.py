"""Ouro after TransformerBridge: every layer fires once per iteration, in order."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tl_loops.model.bridged.family import SPLIT_INPUTS, BridgedFamily
from tl_loops.model.bridged.llama_layer import LLAMA_PLACES, norm_places
from tl_loops.model.bridged.taps import Reading, SumWith, Tap, View, block_taps, tap

_PLACES: dict[str, str | tuple[str, View]] = {
    **LLAMA_PLACES,
    **norm_places("ln1", "ln1_post", "ln2", "ln2_post"),
    "ln2_post.hook_out": "hook_mlp_out",
    "hook_out": "hook_resid_post",
}
"""Hook points of a bridged layer, and what LoopedTransformer calls them."""


def _taps(model: Any) -> Iterator[Tap]:
    layout = model.layout
    iterations = range(layout.n_iterations)
    yield tap("embed.hook_out", [["hook_embed"]])
    for layer in range(layout.n_core):
        source = f"blocks.{layer}"
        blocks = [layout.index(iteration=t, layer=layer) for t in iterations]
        entries: list[list[str | Reading]] = [[f"blocks.{i}.hook_resid_pre"] for i in blocks]
        if layer == 0:
            for t, entry in enumerate(entries):
                begin = ["hook_initial_state"] if t == 0 else []
                entry[:0] = [*begin, f"iter.{t}.hook_state_in", f"iter.{t}.hook_injected"]
        yield tap(f"{source}.hook_in", entries)
        # The stream between the two branches is seen at the first one's output.
        streams = [f"blocks.{i}.hook_resid_pre" for i in blocks]
        yield tap(
            f"{source}.ln1_post.hook_out",
            [
                [
                    f"blocks.{i}.hook_attn_out",
                    Reading(f"blocks.{i}.hook_resid_mid", SumWith(stream), (stream,)),
                ]
                for i, stream in zip(blocks, streams, strict=True)
            ],
        )
        yield from block_taps(source, blocks, _PLACES)
    norms = [f"iter.{t}.norm" for t in iterations[:-1]] + ["ln_final"]
    for point in ("hook_scale", "hook_normalized"):
        yield tap(f"ln_final.{point}", [[f"{norm}.{point}"] for norm in norms])
    yield tap("ln_final.hook_out", [[f"iter.{t}.hook_state_out"] for t in iterations])
    yield tap("@model.early_exit_gate", [[f"iter.{t}.hook_exit_gate"] for t in iterations])
    for point in ("hook_in", "hook_out"):
        yield tap(f"unembed.{point}", [[f"unembed.{point}"]])


def _arguments(model: Any, tokens: Tensor, initial_state: Tensor | None) -> dict[str, Any]:
    # The released key-value cache does not run with current transformers.
    return {"use_cache": False}


@contextmanager
def _iterations(model: Any) -> Iterator[None]:
    stack = model.bridge.original_model.model
    before, stack.total_ut_steps = stack.total_ut_steps, model.cfg.n_iterations
    try:
        yield
    finally:
        stack.total_ut_steps = before


BRIDGED_OURO = BridgedFamily(
    name="ouro",
    adapter="OuroArchitectureAdapter",
    taps=_taps,
    missing=SPLIT_INPUTS,
    arguments=_arguments,
    iterations=_iterations,
    counts=lambda bridge: [(bridge.original_model.model, "total_ut_steps")],
)
