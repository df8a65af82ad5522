"""Feedforward models after TransformerBridge, whose layers a loop runs several times."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from tl_loops.model.bridged.family import SPLIT_INPUTS, BridgedFamily
from tl_loops.model.bridged.llama_layer import LLAMA_PLACES, norm_places
from tl_loops.model.bridged.taps import (
    HEADS_FIRST,
    Reading,
    SumWith,
    Tap,
    View,
    block_end,
    block_taps,
    tap,
)

_ROTATED = ("attn.hook_rot_q", "attn.hook_rot_k")
_PLAIN_MLP = {"mlp.in.hook_out": "mlp.hook_pre", "mlp.out.hook_in": "mlp.hook_post"}


def _places(model: Any) -> dict[str, str | tuple[str, View]]:
    """Hook points of a bridged layer, and what LoopedTransformer calls them inside its block."""
    cfg = model.cfg
    places = dict(LLAMA_PLACES)
    if cfg.positional_embedding_type == "standard" or _ROTATED[0] in model._bridged.missing:
        places = {place: shown for place, shown in places.items() if shown not in _ROTATED}
    if not cfg.gated_mlp:
        places = {place: shown for place, shown in places.items() if not place.startswith("mlp.")}
        places |= _PLAIN_MLP
    if cfg.qk_norm is not None:
        for place, name in norm_places("attn.q_norm", "attn.k_norm").items():
            places[place] = name if cfg.qk_norm == "full" else (name, HEADS_FIRST)
    return places


def _branch_norms(model: Any) -> dict[str, str]:
    """The norms of a layer by their names in the bridge, and in the block."""
    if model.cfg.block_norm != "post_branch":
        return {"ln1": "ln1", "ln2": "ln2"}
    # TransformerLens 3 calls a norm after a branch as it does one before it.
    after = "_post" if "blocks.0.ln1_post.hook_out" in model.bridge.hook_dict else ""
    return {f"ln{branch}{after}": f"ln{branch}_post" for branch in (1, 2)}


def _taps(model: Any) -> Iterator[Tap]:
    cfg, layout = model.cfg, model.layout
    yield tap("embed.hook_out", [["hook_embed"]])
    if cfg.positional_embedding_type == "standard":
        yield tap("pos_embed.hook_out", [["hook_pos_embed"]])
    passes: dict[str, list[int]] = {}
    for i in range(layout.n_layers):
        passes.setdefault(layout.physical_name(i), []).append(i)
    for layer, blocks in enumerate(passes.values()):
        yield from _layer_taps(model, f"blocks.{layer}", blocks)
    for point in ("hook_scale", "hook_normalized"):
        yield tap(f"ln_final.{point}", [[f"ln_final.{point}"]])
    for point in ("hook_in", "hook_out"):
        yield tap(f"unembed.{point}", [[f"unembed.{point}"]])


def _layer_taps(model: Any, source: str, blocks: list[int]) -> Iterator[Tap]:
    cfg, layout = model.cfg, model.layout
    entries: list[list[str | Reading]] = []
    ends: list[list[str | Reading]] = []
    for i in blocks:
        t, begin = layout.begins_at(i), ["hook_initial_state"] if i == layout.core_start else []
        if t is not None:
            begin += [f"iter.{t}.hook_state_in", f"iter.{t}.hook_injected"]
        entries.append([*begin, f"blocks.{i}.hook_resid_pre"])
        ends.append([*block_end(layout, i)])
    yield tap(f"{source}.hook_in", entries)
    yield tap(f"{source}.hook_out", ends)

    norms = _branch_norms(model)
    branches = ("attn", "mlp") if cfg.block_norm == "pre" else tuple(norms)
    attn_out: list[list[str | Reading]] = [[f"blocks.{i}.hook_attn_out"] for i in blocks]
    if not cfg.parallel_attn_mlp:
        # The stream between the two branches is seen at the first one's output.
        for i, readings in zip(blocks, attn_out, strict=True):
            stream = f"blocks.{i}.hook_resid_pre"
            readings.append(Reading(f"blocks.{i}.hook_resid_mid", SumWith(stream), (stream,)))
    yield tap(f"{source}.{branches[0]}.hook_out", attn_out)
    places: dict[str, str | tuple[str, View]] = {
        **_places(model),
        **{
            f"{stored}.{point}": f"{norm}.{point}"
            for stored, norm in norms.items()
            for point in ("hook_scale", "hook_normalized")
        },
        f"{branches[1]}.hook_out": "hook_mlp_out",
    }
    yield from block_taps(source, blocks, places)


def _arguments(model: Any, tokens: Tensor, initial_state: Tensor | None) -> dict[str, Any]:
    # A cache of transformers has one entry per layer, which its passes would share.
    return {"use_cache": False}


@contextmanager
def _iterations(model: Any) -> Iterator[None]:
    """Run the layers of each loop again, after their first pass, with what they were called with.

    Every layer gets its own arguments (mask, rotations) at each pass, and only the stream changes.
    Modules and lists of the Hugging Face model stay as they are.
    """
    with ExitStack() as stack:
        for loop in model.layout.loops:
            blocks = [model.bridge.blocks[layer] for layer in range(loop.start, loop.stop)]
            stack.enter_context(_again(blocks, loop.n_iterations))
        yield


@contextmanager
def _again(core: list[Any], n_iterations: int) -> Iterator[None]:
    """Run some layers in a row ``n_iterations`` times instead of once."""
    given: dict[int, tuple[bool, tuple[Any, ...], dict[str, Any]]] = {}
    again = False

    def remember(layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not again:  # All but the stream, which is another at each pass.
                others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
                given[layer] = bool(args), args[1:], others

        return hook

    def repeat(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        nonlocal again
        if again:
            return None
        again = True
        try:
            for _ in range(n_iterations - 1):
                for layer, block in enumerate(core):
                    stream = output[0] if isinstance(output, tuple) else output
                    first, others, named = given[layer]
                    if first:
                        output = block(stream, *others, **named)
                    else:
                        output = block(*others, hidden_states=stream, **named)
        finally:
            again = False
        return output

    with ExitStack() as stack:
        for layer, block in enumerate(core):
            handle = block.register_forward_pre_hook(remember(layer), with_kwargs=True)
            stack.callback(handle.remove)
        stack.callback(core[-1].register_forward_hook(repeat).remove)
        yield


def _feedforward(name: str, adapter: str, **differences: Any) -> BridgedFamily:
    usual: dict[str, Any] = {"missing": SPLIT_INPUTS}
    return BridgedFamily(
        name=name,
        adapter=f"{adapter}ArchitectureAdapter",
        taps=_taps,
        arguments=_arguments,
        iterations=_iterations,
        **{**usual, **differences},
    )


_QKV = ("q", "k", "v")

BRIDGED_FEEDFORWARD: tuple[BridgedFamily, ...] = (
    _feedforward("gpt2", "GPT2", split={"attn.c_attn": tuple(f"attn.{x}" for x in _QKV)}),
    _feedforward("llama", "Llama"),
    _feedforward("mistral", "Mistral"),
    _feedforward("qwen2", "Qwen2"),
    _feedforward("qwen3", "Qwen3"),
    _feedforward("olmo2", "Olmo2"),
    _feedforward(
        "gpt-neox",
        "Neox",
        spellings=(("lm_head.", "embed_out."),),
        split={"attention.query_key_value": tuple(f"attention.{x}" for x in _QKV)},
        missing={
            **SPLIT_INPUTS,
            **dict.fromkeys(
                _ROTATED,
                "the bridge's attention over joined queries, keys and values rotates them where no "
                "hook reaches; tl_loops.LoopedTransformer has it",
            ),
        },
    ),
)
"""The feedforward families that TransformerLens has an adapter for and tl_loops loops."""
