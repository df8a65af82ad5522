import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.config.weights import physical_tensors
from tl_loops.errors import CheckpointError
from tl_loops.families.hrm_text import HRM_TEXT_SPLIT
from tl_loops.families.huginn import HUGINN
from tl_loops.families.nanochat import NANOCHAT_RECURSIVE
from tl_loops.families.native import NATIVE
from tl_loops.families.ouro import OURO
from tl_loops.families.parcae import PARCAE
from tl_loops.families.registry import FAMILIES, is_looped_config, recognise
from tl_loops.families.retrofitted import RETROFITTED_LLAMA, RETROFITTED_OLMO
from tl_loops.loading.catalogue import catalogue, find_known, near_names
from tl_loops.loading.save import config_to_json
from tl_loops.mechanisms.value_embeddings import has_value_embedding
from tl_loops.model.looped import LoopedTransformer

FIXTURES = Path(__file__).parents[2] / "parity" / "fixtures"
FAMILY_OF = {
    "huginn": HUGINN,
    "ouro": OURO,
    "retrofitted_llama_default": RETROFITTED_LLAMA,
    "retrofitted_llama_llama3": RETROFITTED_LLAMA,
    "retrofitted_olmo_default": RETROFITTED_OLMO,
    "parcae": PARCAE,
    "nanochat_recursive": NANOCHAT_RECURSIVE,
    "hrm_text": HRM_TEXT_SPLIT,
}
RELEASED = {name: json.loads((FIXTURES / name / "config.json").read_text()) for name in FAMILY_OF}
BY_NAME = pytest.mark.parametrize("name", FAMILY_OF)


def stored_shapes(name):
    with safe_open(FIXTURES / name / "model.safetensors", "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}


def config(name, **changes):
    """The config of a fixture with changed released fields; a change to ``...`` removes one."""
    released = {**RELEASED[name], **changes}
    released = {key: value for key, value in released.items() if value is not ...}
    fields = FAMILY_OF[name].config_fields(released, "config.json")
    return LoopedTransformerConfig.from_dict({**fields, "device": "cpu"})


# Recognition ----------------------------------------------------------------------------------


@BY_NAME
def test_a_checkpoint_is_recognised_by_config_and_tensor_names(name):
    family = recognise(RELEASED[name], "config.json", lambda: stored_shapes(name))
    assert family is FAMILY_OF[name]


def test_tensor_names_are_not_asked_for_where_the_model_type_is_enough():
    def fail():
        raise AssertionError("read headers without need")

    assert recognise({"model_type": "ouro"}, "config.json", fail) is OURO
    assert recognise({"architectures": ["OuroForCausalLM"]}, "config.json", fail) is OURO


def test_an_ordinary_model_is_refused_with_what_was_found():
    released = {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    assert not is_looped_config(released)
    with pytest.raises(CheckpointError, match=r"'mamba'.*MambaForCausalLM.*huginn_raven.*ouro"):
        recognise(released, "config.json", list)


def test_a_feedforward_model_is_recognised_but_is_not_looped():
    released = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert not is_looped_config(released)
    assert recognise(released, "config.json", list).feedforward


def test_a_shared_model_type_with_foreign_tensors_is_refused():
    with pytest.raises(CheckpointError, match=r"huginn.*fit none of them: some\.weight"):
        recognise({"model_type": "huginn_raven"}, "config.json", lambda: ["some.weight"])


@pytest.mark.parametrize("architectures", [None, "RavenForCausalLM", 3, [3, None], {}])
def test_odd_architecture_entries_do_not_crash_recognition(architectures):
    assert not is_looped_config({"architectures": architectures})


# Config maps ----------------------------------------------------------------------------------


def test_huginn_config():
    cfg = config("huginn")
    assert cfg.notation == "(2, 4⊗3, 2)_I"
    assert (cfg.d_model, cfg.n_heads, cfg.d_head, cfg.d_mlp, cfg.d_vocab) == (48, 3, 16, 80, 96)
    assert (cfg.block_norm, cfg.injection, cfg.initial_state) == (
        "post_residual",
        "concat",
        "normal",
    )
    assert cfg.norm_before_coda and not cfg.norm_between_iterations and not cfg.exit_gate
    assert (cfg.rotary_layout, cfg.rotary_base, cfg.n_ctx) == ("interleaved", 50_000.0, 64)
    assert cfg.embed_scale == math.sqrt(48)
    assert cfg.initial_state_std == pytest.approx(math.sqrt(2 / 5))
    assert cfg.qk_bias and cfg.tie_word_embeddings and cfg.n_key_value_heads is None
    assert cfg.padded_vocab is None and cfg.default_prepend_bos
    assert cfg.normalization_type == "RMS" and cfg.eps == 1e-6


def test_ouro_config():
    cfg = config("ouro")
    assert cfg.notation == "(0, 3⊗4, 0)"
    assert (cfg.block_norm, cfg.injection, cfg.initial_state) == ("sandwich", None, "embed")
    assert cfg.norm_between_iterations and cfg.exit_gate and not cfg.norm_before_coda
    assert (cfg.rotary_layout, cfg.rotary_base) == ("half", 1e6)
    assert not cfg.tie_word_embeddings and not cfg.qk_bias and cfg.embed_scale == 1.0
    assert cfg.default_prepend_bos and cfg.n_ctx == 64


@pytest.mark.parametrize(
    ("released", "threshold"),
    [(1.0, None), (1, None), (None, None), (1.5, None), (0.9, 0.9), (0, 0.0), (..., None)],
)
def test_ouros_released_exit_threshold_means_the_last_iteration(released, threshold):
    assert config("ouro", early_exit_threshold=released).exit_threshold == threshold


def test_retrofitted_configs():
    llama, olmo = config("retrofitted_llama_default"), config("retrofitted_olmo_default")
    assert (llama.block_norm, llama.qk_norm) == ("pre", None)
    assert (olmo.block_norm, olmo.qk_norm) == ("post_branch", "full")
    assert (llama.n_key_value_heads, olmo.n_key_value_heads) == (2, None)
    assert (llama.eps, olmo.eps) == (1e-5, 1e-6)
    for cfg in (llama, olmo):
        assert cfg.notation == "(2, 3⊗4, 2)_I"
        # Kept from the Huginn config of the conversion, not sqrt(2 / (5 * 64)).
        assert cfg.initial_state_std == 0.008703882797784892
        assert cfg.embed_scale == 1.0 and cfg.injection == "concat"
        assert not cfg.norm_before_coda and not cfg.tie_word_embeddings and not cfg.qk_bias
        assert (cfg.rotary_layout, cfg.rotary_base, cfg.n_ctx) == ("half", 500_000.0, 64)
        assert not cfg.use_NTK_by_parts_rope


def test_parcae_config():
    cfg = config("parcae")
    assert cfg.notation == "(2, 2⊗4, 2)_I"
    assert (cfg.block_norm, cfg.injection, cfg.initial_state) == ("pre", "gated_diagonal", "normal")
    assert cfg.norm_injection and cfg.linear_before_coda and cfg.value_embeddings
    assert not cfg.norm_before_coda and not cfg.norm_between_iterations
    assert (cfg.qk_norm, cfg.act_fn, cfg.gated_mlp) == ("head", "half_relu2", False)
    assert (cfg.rotary_layout, cfg.rotary_base) == ("interleaved", 50_000.0)
    assert cfg.initial_state_std == math.sqrt(2 / (5 * 64)) and cfg.embed_scale == 1.0
    assert [has_value_embedding(cfg, i) for i in range(6)] == [False, True] * 3
    assert "ln_injection" in cfg.describe() and "values" in cfg.describe()


@pytest.mark.parametrize("at_top", [True, False])
def test_parcae_is_recognised_without_a_model_type(at_top):
    fields = RELEASED["parcae"]["full_config"]
    released = {**fields, "_class_name": "Parcae"} if at_top else {"full_config": fields}
    assert recognise(released, "config.json", list) is PARCAE
    read = PARCAE.config_fields(released, "config.json")
    assert read == PARCAE.config_fields(RELEASED["parcae"], "config.json")


def test_parcaes_rotary_settings_may_be_a_mapping():
    settings = {"use_rope": True, "rope_condense_ratio": 2, "rope_base": 77}
    cfg = config("parcae", rope_settings=settings)
    assert (cfg.rotary_base, cfg.rotary_scaling_factor) == (77.0, 2.0)


def test_nanochat_config():
    cfg = config("nanochat_recursive")
    assert cfg.notation == "(2, 3⊗4, 2)_I"
    assert (cfg.injection, cfg.initial_state) == ("concat_injection_first", "embed")
    assert cfg.post_embedding_ln and cfg.normalization_type == "RMSPre"
    assert (cfg.qk_norm, cfg.act_fn, cfg.d_mlp, cfg.gated_mlp) == ("head", "relu2", 256, False)
    assert (cfg.rotary_reversed, cfg.rotary_table_dtype) == (True, "bfloat16")
    assert cfg.output_logits_soft_cap == 15.0 and cfg.n_key_value_heads == 2
    assert "x = ln(W_E[tokens])" in cfg.describe()
    # Fractions of a mean number of iterations are cut, as int() does.
    assert config("nanochat_recursive", train_recur_mean=2.9).n_iterations == 2
    assert config("nanochat_recursive", train_recur_mean=...).n_iterations == 4


def test_hrm_text_config():
    cfg = config("hrm_text")
    assert (cfg.notation, cfg.stacks) == ("(0, 2⊗8, 0)", ("L", "L", "L", "H"))
    assert (cfg.initial_state, cfg.slow_initial_state) == ("learned", "embed")
    assert cfg.norm_between_iterations and cfg.normalization_type == "RMSPre"
    assert cfg.attn_gate and cfg.prefix_mask and cfg.embed_scale == 20.0
    # Without the depth of a stack, num_hidden_layers is it; with it, it counts all calls.
    assert config("hrm_text", num_layers_per_stack=..., num_hidden_layers=3).n_core == 3
    assert config("hrm_text", num_hidden_layers=77).n_core == 2
    assert config("hrm_text", embedding_scale=None, initializer_range=0.1).embed_scale == 10.0
    assert not config("hrm_text", prefix_lm=False).prefix_mask


def test_a_config_with_a_model_type_is_not_taken_for_nanochat():
    released = {**RELEASED["nanochat_recursive"], "model_type": "gpt2"}
    assert not is_looped_config(released)


def test_retrofitted_rotary_base_is_rope_theta_and_never_rope_base():
    assert config("retrofitted_llama_default", rope_theta=1e4).rotary_base == 1e4
    with pytest.raises(CheckpointError, match="rope_theta"):
        config("retrofitted_llama_default", rope_theta=...)


def test_retrofitted_context_falls_back_to_block_size():
    assert config("retrofitted_llama_default", max_position_embeddings=...).n_ctx == 4096


def test_llama3_scaling_becomes_ntk_by_parts():
    cfg = config("retrofitted_llama_llama3")
    assert cfg.use_NTK_by_parts_rope
    assert (
        cfg.NTK_by_parts_factor,
        cfg.NTK_by_parts_low_freq_factor,
        cfg.NTK_by_parts_high_freq_factor,
        cfg.NTK_original_ctx_len,
    ) == (32.0, 1.0, 4.0, 16)
    assert cfg.rotary_scaling_factor == 1.0


LLAMA3 = {
    "factor": 9.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {
            "rope_theta": ...,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6, **LLAMA3},
        },
        {
            "rope_theta": 1e6,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6, **LLAMA3},
            "rope_scaling": {"type": "llama3", **LLAMA3},
        },
    ],
)
def test_all_spellings_of_rotary_scaling_give_the_same_config(spelling):
    cfg = config("ouro", **spelling)
    assert cfg.rotary_base == 1e6 and cfg.NTK_original_ctx_len == 32
    assert cfg.NTK_by_parts_factor == 9.0
    assert (cfg.NTK_by_parts_low_freq_factor, cfg.NTK_by_parts_high_freq_factor) == (2.0, 5.0)


def test_linear_rotary_scaling_and_the_default_type():
    linear = config("ouro", rope_scaling={"rope_type": "linear", "factor": 4})
    assert linear.rotary_scaling_factor == 4.0 and not linear.use_NTK_by_parts_rope
    plain = config(
        "ouro", rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 10}
    )
    assert plain.rotary_base == 10.0 and plain.rotary_scaling_factor == 1.0


def test_a_padded_vocabulary_keeps_its_embedding_and_says_where_padding_starts():
    cfg = config("huginn", vocab_size=90)
    assert (cfg.d_vocab, cfg.padded_vocab) == (96, 90)


def test_tie_embeddings_decides_over_tie_word_embeddings():
    assert not config("retrofitted_llama_default", tie_word_embeddings=True).tie_word_embeddings
    assert config("huginn", tie_embeddings=..., tie_word_embeddings=...).tie_word_embeddings


REFUSALS = [
    ("ouro", {"use_sliding_window": True}, "'use_sliding_window' is True"),
    ("ouro", {"attention_bias": True}, "'attention_bias' is True"),
    ("ouro", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'.*'silu'"),
    ("ouro", {"layer_types": ["full_attention", "sliding_attention"]}, "'layer_types'"),
    ("ouro", {"layer_types": 3}, "'layer_types'"),
    ("ouro", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'.*not implemented"),
    ("ouro", {"rope_scaling": {"factor": 2.0}}, "no 'rope_type'"),
    ("ouro", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'low_freq_factor'"),
    ("ouro", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "above 0"),
    ("ouro", {"rope_scaling": "linear"}, "flat mapping"),
    ("ouro", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "flat mapping"),
    ("ouro", {"rope_parameters": {"rope_theta": 1.0}}, "twice with different values"),
    (
        "ouro",
        {
            "rope_parameters": {"rope_type": "default"},
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
        "disagree",
    ),
    ("ouro", {"early_exit_threshold": -1.0}, "'early_exit_threshold'"),
    ("ouro", {"early_exit_threshold": "high"}, "'early_exit_threshold' must be of type float"),
    ("ouro", {"quantization_config": {"bits": 4}}, "'quantization_config'"),
    ("ouro", {"total_ut_steps": ...}, "required field 'total_ut_steps' is missing"),
    ("ouro", {"hidden_size": "48"}, "'hidden_size' must be of type int, found '48'"),
    ("ouro", {"hidden_size": True}, "'hidden_size' must be of type int"),
    ("ouro", {"rms_norm_eps": float("nan")}, "'rms_norm_eps' must be a number"),
    ("ouro", {"head_dim": ..., "num_attention_heads": 5}, "no multiple"),
    ("huginn", {"test_time_noise": 0.1}, "'test_time_noise' is 0.1"),
    ("huginn", {"injection_type": "add"}, "'injection_type' is 'add'"),
    ("huginn", {"state_init": "zero"}, "'state_init' is 'zero'"),
    ("huginn", {"bias": True}, "'bias' is True"),
    ("huginn", {"nonlin_name": "GELU"}, "'nonlin_name'"),
    ("huginn", {"mlp_class_name": "BaseMLP"}, "'mlp_class_name'"),
    ("huginn", {"qk_norm": True}, "'qk_norm'"),
    ("huginn", {"num_key_value_heads": 1}, "'num_key_value_heads' is 1"),
    ("huginn", {"head_dim": 8}, "'head_dim' is 8"),
    ("huginn", {"n_heads": 5}, "multiple of 'n_heads'"),
    ("huginn", {"rope_theta": 1e4}, "'rope_theta' is 10000.0.*'rope_base' = 50000"),
    ("huginn", {"init_values": {"embed_scale": 1.0}}, "'init_values.embed_scale' is 1.0"),
    ("huginn", {"init_values": {"std": 0.5}}, "'init_values.std' is 0.5"),
    ("huginn", {"final_logit_softcapping": 30.0}, "'final_logit_softcapping'"),
    ("huginn", {"n_layers_in_coda": ...}, "'n_layers_in_coda' is missing"),
    ("retrofitted_llama_default", {"init_values": ...}, "'init_values' with 'std'"),
    ("retrofitted_llama_default", {"init_values": {"std": 0.1}}, "'init_values' with 'std'"),
    ("retrofitted_llama_default", {"qk_bias": True}, "'qk_bias' is True"),
    ("retrofitted_olmo_default", {"initial_state_mode": "embed-init"}, "'initial_state_mode'"),
    ("retrofitted_olmo_default", {"rope_scaling": {"rope_type": "dynamic"}}, "'dynamic'"),
    ("parcae", {"rope_settings": "RoPESettings(use_rope)"}, "'rope_settings' is .*a mapping"),
    ("parcae", {"rope_settings": None}, "'rope_settings' is None"),
    ("parcae", {"rope_settings": {"use_rope": False}}, "'rope_settings.use_rope' is False"),
    ("parcae", {"rope_settings": {"use_rope": True}}, "'rope_settings.rope_base' must be"),
    ("parcae", {"prelude_norm": False}, "'prelude_norm' is False"),
    ("parcae", {"qk_norm": False}, "'qk_norm' is False"),
    ("parcae", {"injection_type": "linear"}, "'injection_type' is 'linear'"),
    ("parcae", {"init_strategy": "takase"}, "'init_strategy'"),
    ("parcae", {"emb_scale": 2.0}, "'emb_scale' is 2.0"),
    ("parcae", {"logit_softcap": 15.0}, "'logit_softcap' is 15.0"),
    ("parcae", {"nonlin_name": "GELU"}, "'nonlin_name'"),
    ("parcae", {"recurrent_embedding_dimension": 32}, "'recurrent_embedding_dimension' is 32"),
    ("parcae", {"recurrent_num_attention_heads": 2}, "'recurrent_num_attention_heads' is 2"),
    ("parcae", {"num_attention_heads": 5}, "multiple of 'num_attention_heads'"),
    ("nanochat_recursive", {"inject_mode": "add"}, "'inject_mode' is 'add'"),
    ("nanochat_recursive", {"window_pattern": "SSSL"}, "'window_pattern' is 'SSSL'"),
    ("nanochat_recursive", {"n_head": 5}, "multiple of 'n_head'"),
    ("nanochat_recursive", {"train_recur_mean": 0.5}, "'train_recur_mean' must be at least 1"),
    ("nanochat_recursive", {"vocab_size": ...}, "'vocab_size' is missing"),
    ("hrm_text", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
    ("hrm_text", {"attention_bias": True}, "'attention_bias' is True"),
    ("hrm_text", {"H_cycles": 0}, "'H_cycles' = 0 and 'L_cycles' = 3 must be at least 1"),
    ("hrm_text", {"num_key_value_heads": 1}, "'num_key_value_heads' is 1"),
    ("hrm_text", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "'yarn'"),
    ("hrm_text", {"embedding_scale": None, "initializer_range": 0}, "must be above 0"),
    (
        "hrm_text",
        {"num_layers_per_stack": ..., "num_hidden_layers": ...},
        "'num_layers_per_stack' is missing",
    ),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSALS)
def test_other_mathematics_and_missing_fields_are_refused_by_name(name, changes, message):
    with pytest.raises(CheckpointError, match=message) as error:
        config(name, **changes)
    assert "config.json" in str(error.value) and FAMILY_OF[name].name in str(error.value)


def test_all_problems_of_a_config_are_named_at_once():
    with pytest.raises(CheckpointError) as error:
        config("ouro", attention_bias=True, total_ut_steps=..., hidden_size=None)
    for key in ("attention_bias", "total_ut_steps", "hidden_size"):
        assert f"'{key}'" in str(error.value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_damaged_config_is_read_or_refused_but_never_crashes(data):
    name = data.draw(st.sampled_from(sorted(FAMILY_OF)))
    key = data.draw(st.sampled_from(sorted(RELEASED[name])))
    released = {**RELEASED[name], key: data.draw(JSON_VALUES)}
    try:
        FAMILY_OF[name].config_fields(released, "config.json")
    except CheckpointError as error:
        assert "config.json" in str(error)


# Tensor maps ----------------------------------------------------------------------------------


@BY_NAME
def test_the_tensor_map_names_every_stored_key_with_its_shape(name):
    family, cfg = FAMILY_OF[name], config(name)
    specs = {spec.key: spec.shape for spec in family.tensors(cfg)}
    stored = {
        key: shape
        for key, shape in stored_shapes(name).items()
        if key not in family.ignored and not (cfg.tie_word_embeddings and key == family.tied[0])
    }
    assert specs == stored


@BY_NAME
def test_the_parts_are_the_physical_weights_each_once(name):
    cfg = config(name)
    shapes = {}
    for spec in FAMILY_OF[name].tensors(cfg):
        assert sum(part.rows for part in spec.parts) == spec.shape[0]
        for part in spec.parts:
            rows = torch.empty(part.rows, *spec.shape[1:], device="meta")
            assert part.name not in shapes
            shapes[part.name] = tuple(part.view(rows).shape)
    assert shapes == {key: tensor.shape for key, tensor in physical_tensors(cfg).items()}


ARCHITECTURES = st.fixed_dictionaries(
    {
        "n_prelude": st.integers(0, 2),
        "n_core": st.integers(1, 2),
        "n_coda": st.integers(0, 2),
        "n_iterations": st.integers(1, 3),
        "n_key_value_heads": st.sampled_from([None, 1, 2]),
        "qk_norm": st.sampled_from([None, "full", "head"]),
        "qk_bias": st.booleans(),
        "attn_bias": st.booleans(),
        "mlp_bias": st.booleans(),
        "unembed_bias": st.booleans(),
        "gated_mlp": st.booleans(),
        "tie_word_embeddings": st.booleans(),
        "exit_gate": st.booleans(),
        "injection": st.sampled_from(
            [None, "concat", "concat_injection_first", "add", "gated_diagonal", "orthogonal"]
        ),
        "injection_bias": st.booleans(),
        "initial_state": st.sampled_from(["embed", "normal", "zeros", "learned", "hashed_normal"]),
        "norm_injection": st.booleans(),
        "linear_before_coda": st.booleans(),
        "value_embeddings": st.booleans(),
        "attn_gate": st.booleans(),
        "stacks": st.sampled_from([None, ("a", "b"), ("a", "a", "b")]),
        "slow_initial_state": st.sampled_from(["embed", "learned"]),
        "post_embedding_ln": st.booleans(),
        "positional_embedding_type": st.sampled_from(["rotary", "standard"]),
        "norms": st.sampled_from(
            [
                ("RMS", "pre"),
                ("RMS", "sandwich"),
                ("RMS", "post_residual"),
                ("RMS", "post_branch"),
                ("RMSPre", "pre"),
                ("LNPre", "pre"),
                ("LN", "pre"),
            ]
        ),
    }
)


def architecture(drawn):
    drawn = dict(drawn)
    norm, placement = drawn.pop("norms")
    if drawn["stacks"] is None:
        drawn["slow_initial_state"] = "embed"
    else:
        drawn["n_iterations"] *= len(drawn["stacks"])
        drawn["exit_gate"] = False
        drawn["injection"] = drawn["injection"] and "add"
    drawn["norm_injection"] &= drawn["injection"] is not None
    drawn["injection_bias"] &= (drawn["injection"] or "").startswith("concat")
    drawn["linear_before_coda"] &= drawn["n_coda"] > 0
    if norm == "LN" and drawn["qk_norm"] == "full":
        drawn["qk_norm"] = None
    return LoopedTransformerConfig(
        d_model=12,
        value_gate_channels=3,
        d_head=4,
        n_heads=2,
        n_ctx=7,
        d_mlp=10,
        d_vocab=11,
        d_vocab_out=9 if not drawn["tie_word_embeddings"] else 11,
        normalization_type=norm,
        block_norm=placement,
        device="cpu",
        **drawn,
    )


@settings(deadline=None, max_examples=60)
@given(ARCHITECTURES)
def test_physical_tensors_are_the_parameters_of_the_model_in_number_shape_and_strides(drawn):
    cfg = architecture(drawn)
    parameters = dict(LoopedTransformer(cfg).physical_named_parameters())
    physical = physical_tensors(cfg)
    assert {name: tuple(value.shape) for name, value in parameters.items()} == {
        name: tensor.shape for name, tensor in physical.items()
    }
    assert sum(value.numel() for value in parameters.values()) == cfg.n_params
    for name, tensor in physical.items():
        laid = tensor.empty()
        if 1 not in tensor.shape:
            assert laid.stride() == parameters[name].stride(), name


# Native format --------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(ARCHITECTURES, st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_config_survives_json(drawn, dtype):
    cfg = architecture(drawn)
    cfg = LoopedTransformerConfig.from_dict(
        {**cfg.to_dict(), "dtype": dtype, "n_params": None, "model_name": "mine"}
    )
    document = {
        "model_type": "tl_loops",
        "format_version": 1,
        "config": json.loads(json.dumps(config_to_json(cfg))),
    }
    assert recognise(document, "config.json", list) is NATIVE
    back = LoopedTransformerConfig.from_dict(
        {**NATIVE.config_fields(document, "config.json"), "device": "cpu"}
    )
    assert back.to_dict() == cfg.to_dict()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"config": {}}, "'format_version' is None"),
        ({"format_version": 2, "config": {}}, "'format_version' is 2.*reads 1"),
        ({"format_version": 1}, "'config'"),
        ({"format_version": 1, "config": {"dtype": "int8"}}, "'config.dtype' is 'int8'"),
        ({"format_version": 1, "config": {"dtype": []}}, "'config.dtype'"),
    ],
)
def test_bad_native_documents_are_refused(document, message):
    with pytest.raises(CheckpointError, match=message):
        NATIVE.config_fields(document, "config.json")


# Catalogue ------------------------------------------------------------------------------------

PUBLISHED_COUNTS = {
    "ouro-1.4b": 1_434_652_673,
    "ouro-2.6b": 2_667_974_657,
    "recurrent-llama-3.2-8": 1_385_228_288,
    # Published is 3,911,400,096: with the tied unembedding and the rotary table counted too.
    "huginn-0125": 3_911_400_096 - 65536 * 5280 - 4096 * 48 * 2,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED_COUNTS.items())
def test_known_models_have_the_published_number_of_parameters(name, count):
    assert find_known(name).config().n_params == count


@pytest.mark.parametrize(
    ("name", "notation"),
    [
        ("huginn-0125", "(2, 4⊗32, 2)_I"),
        ("ByteDance/Ouro-2.6B-Thinking", "(0, 48⊗4, 0)"),
        ("smcleish/Recurrent-TinyLlama-3T-train-recurrence-16", "(4, 8⊗16, 4)_I"),
        ("recurrent-olmo-2-0425-32", "(4, 6⊗32, 4)_I"),
        ("RECURRENT-LLAMA-3.2-2-4-2-UNTRAINED", "(2, 4⊗32, 2)_I"),
    ],
)
def test_known_models_by_name_and_alias_in_any_case(name, notation):
    assert find_known(name).config().notation == notation


def test_names_and_aliases_are_unique_and_not_transformer_lens_names():
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    names = [name.lower() for entry in catalogue() for name in (entry.name, *entry.known.aliases)]
    assert len(names) == len(set(names))
    theirs = {alias.lower() for aliases in MODEL_ALIASES.values() for alias in aliases}
    assert not set(names) & (theirs | {name.lower() for name in OFFICIAL_MODEL_NAMES})
    assert all(alias == alias.lower() for e in catalogue() for alias in e.known.aliases)


def test_every_hub_model_lists_a_config_a_source_and_known_unverified_fields():
    hub = [entry for entry in catalogue() if entry.known.packaged is None]
    assert len(hub) == 77
    for entry in hub:
        cfg = entry.config()
        assert cfg.n_params > 1e7 and cfg.model_name == entry.name.split("/")[1]
        source = f"https://huggingface.co/{entry.name}"
        assert entry.source.removesuffix(" (pickles: convert them first)") == source
        assert set(entry.known.unverified) <= entry.known.released.keys()


def test_near_names():
    assert "ouro-1.4b" in near_names("ouro-1.5b")
    assert near_names("completely different") == []


def test_families_that_share_a_model_type_tell_tensors_apart():
    for family in FAMILIES:
        sharing = [other for other in FAMILIES if set(other.model_types) & set(family.model_types)]
        assert len(sharing) == 1 or family.has_tensors is not None


def test_families_are_data():
    assert all(dataclasses.is_dataclass(family) for family in FAMILIES)
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
