"""LoopFormer: a looped nanoGPT whose blocks are modulated by time and step size.

A run of T iterations takes T steps of size 1 / T, so the number of iterations also changes what
each of them does. Of the same code, ``tmlt`` is the loop whose blocks are modulated by the number
of the iteration alone, and ``base_loop`` the one without a modulation. Models whose type ends in
``_ee`` differ from these in training alone, which adds the loss of a run with fewer iterations.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import CheckpointError
from tl_loops.families.base import (
    Family,
    KnownModel,
    Part,
    Released,
    TensorSpec,
    fused,
    heads_in,
    heads_out,
    read,
    transposed,
    whole,
)
from tl_loops.mechanisms.time_conditioning import N_FREQUENCIES

_TIME, _STEP = ("time_embedder", "time"), ("dt_embedder", "step")
_EMBEDDERS = {True: (_TIME, _STEP), "iteration": (_TIME,), False: ()}
"""The parts of the condition by ``time_conditioning``: stored name, name here."""


def _derive(released: Released) -> dict[str, Any]:
    d_model = released.get("n_embd") or released["hidden_size"]
    heads = released.get("n_head") or released["num_attention_heads"]
    if not heads or d_model % heads:
        raise CheckpointError(f"'n_embd' = {d_model} must be a multiple of 'n_head' = {heads}")
    return {"d_head": d_model // heads}


def _tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    d, d_mlp, e = cfg.d_model, cfg.d_mlp or 0, cfg.d_head
    yield whole("transformer.wte.weight", (cfg.d_vocab, d), "embed.W_E")
    yield whole("transformer.wpe.weight", (cfg.n_ctx, d), "pos_embed.W_pos")
    for embedder, part in _EMBEDDERS[cfg.time_conditioning]:
        key, name = f"{embedder}.mlp", f"time_conditioning.{part}"
        yield whole(f"{key}.0.weight", (d, N_FREQUENCIES), f"{name}.W_in", transposed)
        yield whole(f"{key}.0.bias", (d,), f"{name}.b_in")
        yield whole(f"{key}.2.weight", (d, d), f"{name}.W_out", transposed)
        yield whole(f"{key}.2.bias", (d,), f"{name}.b_out")
    for layer in range(cfg.n_core):
        key, name = f"transformer.h.blocks.{layer}", f"core.{layer}"
        parts = (Part(f"{name}.attn.{weight}", d, heads_in(e)) for weight in ("W_Q", "W_K", "W_V"))
        yield fused(f"{key}.attn.c_attn.weight", d, *parts)
        yield whole(f"{key}.attn.c_proj.weight", (d, d), f"{name}.attn.W_O", heads_out(e))
        yield whole(f"{key}.mlp.c_fc.weight", (d_mlp, d), f"{name}.mlp.W_in", transposed)
        yield whole(f"{key}.mlp.c_proj.weight", (d, d_mlp), f"{name}.mlp.W_out", transposed)
        if cfg.time_conditioning:
            modulation = f"{key}.adaLN_modulation.1"
            yield whole(f"{modulation}.weight", (4 * d, d), f"{name}.modulation.W", transposed)
            yield whole(f"{modulation}.bias", (4 * d,), f"{name}.modulation.b")
        else:
            yield whole(f"{key}.norm_1.weight", (d,), f"{name}.ln1.w")
            yield whole(f"{key}.norm_2.weight", (d,), f"{name}.ln2.w")
    yield whole("transformer.norm_f.weight", (d,), "ln_final.w")


_DEFAULTS = {
    "block_size": 1024,
    "vocab_size": 50304,
    "n_layer": 3,
    "n_head": 32,
    "n_embd": 2048,
    "intermediate_dim": 5120,
}

LOOPFORMER = Family(
    name="loopformer",
    paper="",
    model_types=("loopformer",),
    architectures=("LoopFormerGPTForCausalLM",),
    fields={
        "d_model": read("n_embd", "hidden_size"),
        "n_heads": read("n_head", "num_attention_heads"),
        "d_mlp": read("intermediate_dim", "intermediate_size", "n_inner"),
        "d_vocab": read("vocab_size"),
        "n_ctx": read("block_size", "n_positions", "max_position_embeddings"),
        "n_core": read("n_layer", "num_hidden_layers"),
        # The name in the training code; released files leave it out, and its default counts.
        "n_iterations": read("max_model_loops", default=8),
    },
    fixed={
        "block_norm": "pre",
        "block_norm_weight": False,
        # What torch's RMSNorm takes where none is given, of float32: norms work in float32 here.
        "eps": torch.finfo(torch.float32).eps,
        "initial_state": "embed",
        "positional_embedding_type": "standard",
        "act_fn": "gelu",
        "gated_mlp": False,
        "time_conditioning": True,
        "tie_word_embeddings": True,
    },
    flags={"bias": (False,), "tie_word_embeddings": (True,)},
    derive=_derive,
    tensors=_tensors,
    # The class that generates text holds the model under this name.
    spellings=(("gpt.", ""),),
    tied=("lm_head.weight", "transformer.wte.weight"),
    known=tuple(
        KnownModel(
            f"armenjeddi/LoopFormer-{blocks}block-{iterations}iterations{data}",
            (f"loopformer-{blocks}block-{iterations}iterations{data.lower()}",),
            {**_DEFAULTS, "n_layer": blocks, "max_model_loops": iterations},
            (*_DEFAULTS, "max_model_loops"),
            silent={"max_model_loops": iterations},
        )
        for data in ("", "-FineWeb300K")
        for blocks, iterations in ((3, 8), (2, 12), (1, 24))
    ),
)

BASE_LOOP = replace(
    LOOPFORMER,
    name="loopformer-base",
    model_types=("base_loop", "base_loop_ee"),
    architectures=(),
    fixed={**LOOPFORMER.fixed, "block_norm_weight": True, "time_conditioning": False},
    known=tuple(
        KnownModel(
            f"armenjeddi/{name}",
            (name.lower(),),
            {**_DEFAULTS, "max_model_loops": 8},
            (*_DEFAULTS, "max_model_loops"),
            silent={"max_model_loops": 8},
        )
        for name in ("Base-Loop-3block-8iterations", "Base-Loop-EE-3block-8iterations")
    ),
)
"""The same loop without the modulation, whose norms have gains."""

TMLT = replace(
    LOOPFORMER,
    name="tmlt",
    model_types=("tmlt", "tmlt_ee"),
    architectures=(),
    fixed={**LOOPFORMER.fixed, "time_conditioning": "iteration"},
    known=(),
)
"""The same loop, modulated by the number of the iteration alone."""
