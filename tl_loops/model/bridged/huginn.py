"""Huginn (Raven) after TransformerBridge: its own attention, so neither scores nor patterns."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tl_loops.model.bridged.family import SPLIT_INPUTS, BridgedFamily
from tl_loops.model.bridged.taps import Columns, Reading, Tap, View, block_end, block_taps, tap

_NORMS = {"norm_1": "ln1", "norm_2": "ln1_post", "norm_3": "ln2", "norm_4": "ln2_post"}
_STACKS = {"prelude": "prelude", "core": "core_block", "coda": "coda"}


def _places(cfg: Any) -> dict[str, str | tuple[str, View]]:
    """Hook points of a bridged layer, and what LoopedTransformer calls them."""
    width = cfg.n_heads * cfg.d_head
    return {
        **{
            f"{stored}.{point}": f"{norm}.{point}"
            for stored, norm in _NORMS.items()
            for point in ("hook_scale", "hook_normalized")
        },
        "attn.o.hook_in": ("attn.hook_z", Columns(0, width, cfg.d_head)),
        "attn.hook_out": "hook_attn_out",
        "norm_2.hook_out": "hook_resid_mid",
        "mlp.out.hook_in": "mlp.hook_post",
        "mlp.hook_out": "hook_mlp_out",
    }


def _taps(model: Any) -> Iterator[Tap]:
    cfg, layout = model.cfg, model.layout
    iterations = range(layout.n_iterations)
    for phase, stack in _STACKS.items():
        for layer in range(getattr(layout, f"n_{phase}")):
            if phase == "core":
                blocks = [layout.index(iteration=t, layer=layer) for t in iterations]
            else:
                blocks = [layout.index(phase=phase, layer=layer)]
            yield from _layer_taps(model, f"{stack}.{layer}", blocks)
    # The adapter reads the state and e side by side.
    state = Columns(0, cfg.d_model)
    yield tap(
        "@transformer.adapter:in",
        [
            [
                *([Reading("hook_initial_state", state)] if t == 0 else []),
                Reading(f"iter.{t}.hook_state_in", state),
            ]
            for t in iterations
        ],
    )
    for point in ("hook_scale", "hook_normalized"):
        yield tap(f"ln_final.{point}", [[f"ln_coda.{point}"], [f"ln_final.{point}"]])
    for point in ("hook_in", "hook_out"):
        yield tap(f"unembed.{point}", [[f"unembed.{point}"]])


def _layer_taps(model: Any, source: str, blocks: list[int]) -> Iterator[Tap]:
    cfg, layout = model.cfg, model.layout
    entries: list[list[str | Reading]] = []
    ends: list[list[str | Reading]] = []
    for i in blocks:
        t, entry, end = layout.begins_at(i), [f"blocks.{i}.hook_resid_pre"], block_end(layout, i)
        if i == 0:  # The embedding is scaled outside of any module.
            entry.insert(0, "hook_embed")
        if t is not None:
            entry.insert(0, f"iter.{t}.hook_injected")
        if i == layout.core_start - 1:
            end.append("hook_injection")
        entries.append([*entry])
        ends.append([*end])
    yield tap(f"{source}.hook_in", entries)
    yield tap(f"{source}.hook_out", ends)

    attn = model.blocks[blocks[0]].attn
    width, d_head, d_mlp = cfg.n_heads * cfg.d_head, cfg.d_head, cfg.d_mlp
    fused = {
        "attn.hook_q": Columns(0, width, d_head, attn.b_Q),
        "attn.hook_k": Columns(width, width, d_head, attn.b_K),
        "attn.hook_v": Columns(2 * width, width, d_head),
    }
    gated = {"mlp.hook_pre": Columns(0, d_mlp), "mlp.hook_pre_linear": Columns(d_mlp, d_mlp)}
    for place, views in (("attn.qkv.hook_out", fused), ("mlp.in.hook_out", gated)):
        firings = [[Reading(f"blocks.{i}.{n}", view) for n, view in views.items()] for i in blocks]
        yield tap(f"{source}.{place}", firings)
    yield from block_taps(source, blocks, _places(cfg))


def _arguments(model: Any, tokens: Tensor, initial_state: Tensor | None) -> dict[str, Any]:
    """The initial state that LoopedTransformer would draw, and steps that keep gradients."""
    if initial_state is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        like = torch.empty(
            *tokens.shape, model.cfg.d_model, device=tokens.device, dtype=model.cfg.dtype
        )
        initial_state = model.initial_state(like, positions)
    # A plain number would run all steps without gradients; a pair is (without, with).
    return {
        "input_states": initial_state,
        "num_steps": (0, model.cfg.n_iterations),
        "use_cache": False,
    }


BRIDGED_HUGINN = BridgedFamily(
    name="huginn",
    adapter="RavenArchitectureAdapter",
    taps=_taps,
    missing={
        **SPLIT_INPUTS,
        **dict.fromkeys(
            ("attn.hook_pattern", "attn.hook_attn_scores", "attn.hook_rot_q", "attn.hook_rot_k"),
            "Huginn's own attention code computes it where no hook reaches; "
            "tl_loops.LoopedTransformer has it",
        ),
    },
    arguments=_arguments,
    masks=False,
)
