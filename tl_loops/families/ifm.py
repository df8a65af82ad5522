"""IFM LoopedLM, parts 1 and 2: controlled comparisons of loops, in xLLM's own format.

``config.json`` holds xLLM's fields under ``"model"`` and no model type. Gains are stored as their
difference from 1. Published as IFM/LoopedLM-P1-* and IFM/LoopedLM-P2-*; the mixtures of experts
among them raise an error.

A model with a random initial state begins at a hash of channel and position, as the reference does
in evaluation. There the row of a batch, or the number of an example, shifts the hash:
``state_phase`` is that shift, 0 for the first row, and
:func:`tl_loops.mechanisms.initial_state.example_phase` gives it for an example.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.config.weights import key_value_name
from tl_loops.errors import CheckpointError
from tl_loops.families.base import (
    Family,
    KnownModel,
    Released,
    TensorSpec,
    heads_in,
    heads_out,
    read,
    transposed,
    whole,
)
from tl_loops.families.shared import xllm
from tl_loops.families.shared.xllm import FAST, SLOW

_NORMS = {"attention.norm": "ln1", "nffn.norm": "ln2"}


def _signs(released: Released) -> bool:
    model = released.get("model")
    return isinstance(model, Mapping) and {"model_dim", "num_layers"} <= model.keys()


def _spread(released: Released) -> Released:
    model = released.get("model")
    if not isinstance(model, Mapping):
        raise CheckpointError(f"'model' must be a mapping of xLLM's fields, found {model!r}")
    for key, what in (
        ("num_experts", "blocks with a mixture of experts, whose router chooses an MLP per token"),
        ("num_values", "mixtures of value projections"),
    ):
        if model.get(key):
            raise CheckpointError(f"{key!r} is {model[key]!r}: {what}, are not implemented")
    if "student" in released:
        raise CheckpointError(
            "'student' says that these are the two blocks of a distilled prefill, which predict "
            "the state of a teacher and have no embedding or head; load the teacher instead"
        )
    return {**{key: value for key, value in released.items() if key != "model"}, **model}


def plus_one(stored: Tensor) -> Tensor:
    """A gain from its stored difference from 1, in its own memory and type."""
    return stored.add_(1)


def _tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    d, vocab = cfg.d_model, cfg.d_vocab
    yield whole("embed.weight", (vocab, d), "embed.W_E")
    for number, name in enumerate(_stored_layers(cfg)):
        yield from _layer(cfg, f"layers.{number}", name)
    if cfg.norm_injection:
        yield whole("huginn_prelude_norm_module.weight", (d,), "ln_injection.w", plus_one)
    yield from _injection_tensors(cfg)
    yield whole("output.final_norm.weight", (d,), "ln_final.w", plus_one)
    yield whole("output.output.weight", (vocab, d), "unembed.W_U", transposed)


def _stored_layers(cfg: LoopedTransformerConfig) -> list[str]:
    """The physical names of the layers in the order in which they are stored."""
    n_core = cfg.n_core // cfg.layer_repeats
    stacks = [""] if cfg.stacks is None or cfg.shared_stacks else [f".{SLOW}", f".{FAST}"]
    core = [f"core{stack}.{layer}" for stack in stacks for layer in range(n_core)]
    ends = [
        [f"{phase}.{layer}" for layer in range(size)]
        for phase, size in (("prelude", cfg.n_prelude), ("coda", cfg.n_coda))
    ]
    return [*ends[0], *core, *ends[1]]


def _injection_tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    d = cfg.d_model
    if cfg.injection == "concat":
        yield whole("input_injection.adapter.weight", (d, 2 * d), "injection.W", transposed)
        if cfg.injection_bias:
            yield whole("input_injection.adapter.bias", (d,), "injection.b")
    elif cfg.injection is not None:
        yield whole("input_injection.A_log", (d,), "injection.A_log")
        yield whole("input_injection.dt_bias", (d,), "injection.dt_bias")
        yield whole("input_injection.input_adapter.weight", (d, d), "injection.W_B", transposed)


def _layer(cfg: LoopedTransformerConfig, key: str, name: str) -> Iterator[TensorSpec]:
    d, d_mlp, e = cfg.d_model, cfg.d_mlp or 0, cfg.d_head
    width, kv_width = cfg.n_heads * e, (cfg.n_key_value_heads or cfg.n_heads) * e
    W_K, W_V = key_value_name(cfg, "W_K"), key_value_name(cfg, "W_V")
    for stored, norm in _NORMS.items():
        yield whole(f"{key}.{stored}.weight", (d,), f"{name}.{norm}.w", plus_one)
    attn, mlp = f"{key}.attention", f"{key}.nffn"
    yield whole(f"{attn}.wq.weight", (width, d), f"{name}.attn.W_Q", heads_in(e))
    yield whole(f"{attn}.wk.weight", (kv_width, d), f"{name}.attn.{W_K}", heads_in(e))
    yield whole(f"{attn}.wv.weight", (kv_width, d), f"{name}.attn.{W_V}", heads_in(e))
    yield whole(f"{attn}.wo.weight", (d, width), f"{name}.attn.W_O", heads_out(e))
    first, second = ("W_gate", "W_in") if cfg.gated_mlp else ("W_in", None)
    yield whole(f"{mlp}.fc1.weight", (d_mlp, d), f"{name}.mlp.{first}", transposed)
    yield whole(f"{mlp}.fc2.weight", (d, d_mlp), f"{name}.mlp.W_out", transposed)
    if second is not None:
        yield whole(f"{mlp}.fc3.weight", (d_mlp, d), f"{name}.mlp.{second}", transposed)


def _model(width: int, vocab: int, layers: int, times: int, **fields: Any) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "model_dim": width,
        "num_heads": width // 64,
        "num_kv_heads": width // 256,
        "head_dim": 64,
        "ffn_hidden_dim": width * 17 // 6,
        "vocab_size": vocab,
        "apply_bias_term": True,
        "apply_rmsnorm": True,
        "swiglu": True,
        "rmsnorm_eps": 1e-6,
        "rope_base": 1_000_000.0,
        "loop_times": times,
        **fields,
    }


def _part_1(layers: int = 28, times: int = 1, **fields: Any) -> dict[str, Any]:
    return _model(1536, 250_624, layers, times, **fields)


def _part_1_huginn(**fields: Any) -> dict[str, Any]:
    sizes = {"huginn_prelude_layers": 8, "huginn_coda_layers": 8, "huginn_state_init": "normal"}
    return _part_1(28, 8, **{"arch": "huginn", **sizes, **fields})


def _part_2(width: int, **fields: Any) -> dict[str, Any]:
    kind = {"arch": "huginn", "huginn_depth_control": True, "huginn_state_init": "normal"}
    return _model(width, 64_256, 4, 5, **{**kind, **fields})


_WIDTHS = {"s": 1536, "m": 3072, "l": 6144}
_PART_1: dict[str, dict[str, Any]] = {
    "dense-d28-336b": _part_1(),
    "dense-d112-336b": _part_1(112),
    "dense-d112-500b": _part_1(112),
    "dense-ouro-336b": _part_1(times=4),
    "dense-middle-336b": _part_1_huginn(huginn_state_init="input", huginn_input_injection="none"),
    "dense-ouro-raw-injection-336b": _part_1(times=4, loop_input_injection="diagonal"),
    "dense-middle-prelude-injection-336b": _part_1_huginn(huginn_state_init="input"),
    "dense-huginn-336b": _part_1_huginn(),
    "dense-huginn-500b": _part_1_huginn(),
    "dense-shared-hl-336b": _part_1_huginn(huginn_hierarchical_state="shared_hl"),
    "dense-split-hl-336b": _part_1_huginn(huginn_hierarchical_state="split_hl"),
    "dense-split-hl-x2-336b": _part_1_huginn(
        huginn_hierarchical_state="split_hl", huginn_split_module_repeats=2
    ),
}
_VARIANTS: dict[str, dict[str, Any]] = {
    "huginn-linear": {
        "huginn_input_injection": "linear",
        "huginn_recurrent_exit_norm": "parameterless_rms",
    },
    "parcae": {"huginn_prelude_norm": "rms"},
    "orthoinj": {"huginn_prelude_orthogonal": True},
}
_PART_2: dict[str, dict[str, Any]] = {
    **{
        f"huginn-{size}-{depths}": _part_2(width)
        for size, width in _WIDTHS.items()
        for depths in ("fixed-r5", "fixed-pln5", "learned-entropy0", "learned-entropy0p01")
    },
    **{
        f"huginn-{size}-{name}": _part_2(_WIDTHS[size], **fields)
        for size in "sm"
        for name, fields in _VARIANTS.items()
    },
    **{f"d4-{size}": _model(_WIDTHS[size], 64_256, 4, 1) for size in "sm"},
}


def _known(part: str, models: Mapping[str, dict[str, Any]]) -> Iterator[KnownModel]:
    for name, model in models.items():
        name = f"LoopedLM-{part}-{name}"
        # The fields are those of the released recipes; no released file was seen.
        yield KnownModel(f"IFM/{name}", (name.lower(),), {"model": model}, ("model",))


IFM_LOOPEDLM = Family(
    name="ifm-loopedlm",
    paper="2610.06833",
    model_types=("ifm_loopedlm",),
    architectures=(),
    signs=_signs,
    spread=_spread,
    fields={
        "d_model": read("model_dim"),
        "n_heads": read("num_heads"),
        "n_key_value_heads": read("num_kv_heads", default=None),
        "d_mlp": read("ffn_hidden_dim"),
        "d_vocab": read("vocab_size"),
        "eps": read("rmsnorm_eps", kind=float, default=1e-6),
        "rotary_base": read("rope_base", kind=float, default=100_000.0),
        "gated_mlp": read("swiglu", kind=bool, default=False),
    },
    fixed={
        "block_norm": "pre",
        # The length of the sequences in training; the rotation itself has no limit.
        "n_ctx": 8192,
        "rotary_layout": "interleaved",
        "tie_word_embeddings": False,
        "default_prepend_bos": True,
    },
    flags={
        "attn_act_func": ("softmax",),
        "qknorm": (False,),
        "apply_attn_gate": (False,),
        "residual_func": ("base", "add"),
        "layernorm_num_groups": (1,),
        "norm_affine": (True,),
        "dense_prelude_input_injection": ("none",),
        "num_experts": (0,),
        "num_values": (0,),
    },
    without_effect={
        **dict.fromkeys(("hidden_dropout", "layerwise_ckpt", "ddp_backend"), "training only"),
        **dict.fromkeys(
            ("huginn_sampling_scheme", "huginn_antithetic_sampling", "huginn_backprop_depth"),
            "training only: evaluation runs 'loop_times' iterations",
        ),
        **dict.fromkeys(
            (
                "huginn_poisson_lognormal_target_mean",
                "huginn_poisson_lognormal_sigma",
                "huginn_poisson_lognormal_max",
                "huginn_depth_prior",
                "huginn_depth_prior_entropy",
            ),
            "training only: evaluation runs 'loop_times' iterations",
        ),
        **dict.fromkeys(
            ("init_mode", "init_std", "init_embed_std", "init_logits_std"), "initialisation"
        ),
        **dict.fromkeys(
            (
                "huginn_diagonal_dt_init",
                "huginn_diagonal_a_init",
                "loop_diagonal_dt_init",
                "loop_diagonal_a_init",
                "dense_prelude_diagonal_dt_init",
                "dense_prelude_diagonal_a_init",
            ),
            "initialisation",
        ),
        **dict.fromkeys(
            ("fused_block", "fused_output_layer", "memory_efficient_norm", "chunk_size"), "speed"
        ),
        **dict.fromkeys(("causal_attn_backend", "sca_backend"), "speed"),
        **dict.fromkeys((f"recompute_{x}" for x in ("q", "v", "attention", "awk")), "memory"),
        **dict.fromkeys(
            (f"recompute_{x}" for x in ("fc1_out", "fc3_out", "router", "logits")), "memory"
        ),
        **dict.fromkeys(
            (
                "num_activated_experts",
                "num_shared_experts",
                "num_dense_layers",
                "expert_inter_dim",
                "moe_router_score_func",
                "moe_router_bias",
                "moe_router_bias_update_rate",
                "moe_router_scaling_factor",
                "moe_expert_backend",
                "moe_permutation_backend",
                "mova_backend",
                "num_activated_values",
            ),
            "of mixtures of experts, which raise ('num_experts', 'num_values')",
        ),
        **dict.fromkeys(
            ("dense_prelude_input_layers", "dense_prelude_source_layer"),
            "of 'dense_prelude_input_injection', which must be 'none'",
        ),
        **dict.fromkeys(("attn_gate_func", "residual_heads"), "of an option that raises"),
        "layernorm_eps": "of LayerNorm, which raises ('apply_rmsnorm')",
        **dict.fromkeys(
            ("awm_orthogonal_update", "causal_conv_width", "causal_conv_backend"),
            "of the architecture gekko, which raises ('arch')",
        ),
        **dict.fromkeys(
            (
                "causal_conv_weight_normalization",
                "timenorm_num_groups",
                "timenorm_beta1",
                "timenorm_beta2",
                "timenorm_backend",
                "timenorm_eps",
            ),
            "of the architecture gekko, which raises ('arch')",
        ),
        "huginn_depth_control": "names the class; its options are read one by one",
        "tokenizer": "of the tokenizer, which is read from its own files",
    },
    derive=xllm.derive,
    tensors=_tensors,
    # A loop over a plain stack has its injection under this name.
    spellings=(("loop_input_injection_module.", "input_injection."),),
    known=(*_known("P1", _PART_1), *_known("P2", _PART_2)),
)
