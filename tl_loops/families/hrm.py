"""HRM and TRM: puzzle models with two states, which see their whole input at once.

HRM (2506.21734) calls two stacks, TRM (2510.04871) one stack for both states. They are published as
pickles of the training code beside a YAML file of its settings; converted to safetensors, with the
settings of ``arch`` and of the data set (``vocab_size``, ``seq_len``, ``num_puzzle_identifiers``)
as ``config.json``, they load here.

The rows that name a puzzle stand before the input: slice j of puzzle p is token ``d_vocab +
p * n_slices + j``, and token ``d_vocab + n_extra_tokens`` is a row of zeros. Logits at these
positions mean nothing. The Q head, which halts in training alone, is not loaded.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import CheckpointError
from tl_loops.families.base import (
    Family,
    KnownModel,
    Part,
    Released,
    TensorSpec,
    checked,
    read,
    transposed,
    whole,
)
from tl_loops.families.shared import fused

_SIGNS = {"H_cycles", "L_cycles", "L_layers", "hidden_size", "num_heads", "halt_max_steps"}
_PREFIX = "_orig_mod.model.inner."
"""The training code compiles the model inside its loss."""

_MULTIPLE = 256
_MOST_CYCLES = 10_000


def _spread(released: Released) -> Released:
    arch = released.get("arch")
    return {**arch, **released} if isinstance(arch, Mapping) else released


def _signs(released: Released) -> bool:
    return released.get("model_type") is None and _spread(released).keys() >= _SIGNS


def _number(released: Released, key: str, default: int | None = None) -> int:
    value = released.get(key, default)
    if value is None:
        raise CheckpointError(f"the required field {key!r} is missing")
    return checked(key, value, int)


def _puzzle_rows(released: Released, prefix_length: int | None) -> tuple[int, int]:
    """Number of embeddings that name puzzles, and of positions that they take."""
    d, width = released["hidden_size"], _number(released, "puzzle_emb_ndim", 0)
    if width % d:
        raise CheckpointError(
            f"'puzzle_emb_ndim' is {width}, which is not implemented; expected a multiple of "
            f"'hidden_size' = {d}"
        )
    slices = width // d
    length = slices if prefix_length in (None, 0) else prefix_length
    if length < slices:
        raise CheckpointError(
            f"'puzzle_emb_len' is {length}, but 'puzzle_emb_ndim' = {width} fills {slices} rows"
        )
    count = _number(released, "num_puzzle_identifiers") if width else 0
    return count * slices, length


def _derive(released: Released, of_trm: bool) -> dict[str, Any]:
    H_cycles, L_cycles = _number(released, "H_cycles"), _number(released, "L_cycles")
    segments = _number(released, "halt_max_steps")
    if not all(1 <= number <= _MOST_CYCLES for number in (H_cycles, L_cycles, segments)):
        raise CheckpointError(
            f"'H_cycles' = {H_cycles}, 'L_cycles' = {L_cycles} and 'halt_max_steps' = {segments} "
            f"must be at least 1 and at most {_MOST_CYCLES:,}"
        )
    n_core = _number(released, "L_layers")
    if not of_trm and _number(released, "H_layers") != n_core:
        raise CheckpointError(
            f"'H_layers' is {released['H_layers']}, which is not implemented; expected 'L_layers' "
            f"= {n_core}"
        )
    d, heads = released["hidden_size"], released["num_heads"]
    if not heads or d % heads:
        raise CheckpointError(f"'hidden_size' = {d} must be a multiple of 'num_heads' = {heads}")
    rows, length = _puzzle_rows(released, _number(released, "puzzle_emb_len", 16) if of_trm else 0)
    expansion = checked("expansion", released.get("expansion"), float)
    return {
        "n_core": n_core,
        # In evaluation the reference always runs all segments.
        "n_iterations": H_cycles * (L_cycles + 1) * segments,
        "stacks": ("L",) * L_cycles + ("H",),
        "shared_stacks": of_trm,
        "d_head": d // heads,
        "d_mlp": -(-round(expansion * d * 2 / 3) // _MULTIPLE) * _MULTIPLE,
        "embed_scale": math.sqrt(d),
        "n_ctx": _number(released, "seq_len") + length,
        "n_extra_tokens": rows,
        "extra_token_slices": max(1, released.get("puzzle_emb_ndim", 0) // d),
    }


def _tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    d, vocab = cfg.d_model, cfg.d_vocab
    yield whole(f"{_PREFIX}embed_tokens.embedding_weight", (vocab, d), "embed.W_E")
    if cfg.n_extra_tokens:
        yield from _puzzle_embedding(cfg)
    yield whole(f"{_PREFIX}L_init", (d,), "initial_state.state")
    yield whole(f"{_PREFIX}H_init", (d,), "slow_initial_state.state")
    for stack in ("L",) if cfg.shared_stacks else ("L", "H"):
        for layer in range(cfg.n_core):
            name = f"core.{layer}" if cfg.shared_stacks else f"core.{stack}.{layer}"
            key = f"{_PREFIX}{stack}_level.layers.{layer}"
            yield from fused.layer(cfg, key, name, "self_attn", "qkv_proj", ("W_Q", "W_K", "W_V"))
    yield whole(f"{_PREFIX}lm_head.weight", (vocab, d), "unembed.W_U", transposed)


def _puzzle_embedding(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    # All puzzles are stored with as many slices as fit into a row.
    d, slices = cfg.d_model, cfg.extra_token_slices
    count = cfg.n_extra_tokens // slices
    part = Part("embed.W_extra", count, lambda stored: stored.view(-1, d))
    yield TensorSpec(f"{_PREFIX}puzzle_emb.weights", (count, slices * d), (part,))


def _has_two_stacks(keys: Collection[str]) -> bool:
    return any(".H_level." in key for key in keys)


def _family(
    name: str,
    paper: str,
    of_trm: bool,
    has_tensors: Callable[[Collection[str]], bool],
    known: tuple[KnownModel, ...] = (),
) -> Family:
    return Family(
        name=name,
        paper=paper,
        model_types=(),
        architectures=(),
        signs=_signs,
        spread=_spread,
        fields={
            "d_model": read("hidden_size"),
            "n_heads": read("num_heads"),
            "d_vocab": read("vocab_size"),
            "eps": read("rms_norm_eps", kind=float, default=1e-5),
            "rotary_base": read("rope_theta", kind=float, default=10_000.0),
        },
        fixed={
            "block_norm": "post_norm",
            "normalization_type": "RMSPre",
            "final_norm": False,
            "attention_dir": "bidirectional",
            "initial_state": "learned",
            "slow_initial_state": "learned",
            "injection": "add",
            "rotary_layout": "half",
            "default_prepend_bos": False,
        },
        flags={"pos_encodings": ("rope",), "mlp_t": (False,), "causal": (False,)},
        without_effect={
            **dict.fromkeys(("halt_exploration_prob", "no_ACT_continue", "loss"), "training"),
            **dict.fromkeys(("batch_size", "global_batch_size"), "training"),
            "arch": "its fields are read where none stand outside it",
            "forward_dtype": "the type is chosen at loading",
            "name": "a name",
            **({"H_layers": "the reference has one stack"} if of_trm else {}),
        },
        derive=lambda released: _derive(released, of_trm),
        tensors=_tensors,
        has_tensors=has_tensors,
        spellings=((_PREFIX.removeprefix("_orig_mod."), _PREFIX),),  # without the compiler
        ignored=(f"{_PREFIX}q_head.weight", f"{_PREFIX}q_head.bias"),
        known=known,
    )


def _published(puzzle: str, vocab_size: int, seq_len: int) -> KnownModel:
    released = {
        "H_cycles": 2,
        "L_cycles": 2,
        "H_layers": 4,
        "L_layers": 4,
        "hidden_size": 512,
        "num_heads": 8,
        "expansion": 4,
        "puzzle_emb_ndim": 512,
        "pos_encodings": "rope",
        "halt_max_steps": 16,
        "vocab_size": vocab_size,
        "seq_len": seq_len,
        "num_puzzle_identifiers": 1,
    }
    name = f"sapientinc/HRM-checkpoint-{puzzle}"
    return KnownModel(name, (), released, tuple(released), pickled=True)


HRM = _family(
    "hrm",
    "2506.21734",
    False,
    _has_two_stacks,
    (_published("sudoku-extreme", 11, 81), _published("maze-30x30-hard", 6, 900)),
)
TRM = _family("trm", "2510.04871", True, lambda keys: not _has_two_stacks(keys))
