"""Config keys that a reference reads: each is read, refused by name, or known to have no effect."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from tl_loops import CheckpointError
from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.families.base import COMMON_FLAGS, COMMON_WITHOUT_EFFECT, Family
from tl_loops.families.registry import FAMILIES

FIXTURES = Path(__file__).parents[2] / "parity" / "fixtures"
BY_NAME = {family.name: family for family in FAMILIES}

LLAMA = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache
    tie_word_embeddings rope_theta rope_scaling attention_dropout attention_bias mlp_bias head_dim
    pretraining_tp dtype torch_dtype bos_token_id eos_token_id pad_token_id model_type
    architectures"""
WINDOWS = "use_sliding_window sliding_window max_window_layers layer_types"
RAVEN = """activation_checkpoint_impl architecture_class_name bias block_class_name block_size
    effective_expected_depth head_dim init_orthogonal init_strategy init_values injection_type
    intermediate_size mean_backprop_depth mean_recurrence mlp_class_name n_embd n_heads n_layers
    n_layers_in_coda n_layers_in_prelude n_layers_in_recurrent_block nonlin_name norm_class_name
    norm_eps num_key_value_heads padded_vocab_size padding_multiple qk_bias rope_base
    sampling_scheme state_init test_time_noise test_time_noise_type tie_embeddings vocab_size"""
PUZZLES = """H_cycles L_cycles H_layers L_layers hidden_size expansion num_heads pos_encodings
    rms_norm_eps rope_theta halt_max_steps halt_exploration_prob forward_dtype puzzle_emb_ndim
    num_puzzle_identifiers vocab_size seq_len batch_size causal arch"""
PARCAE = """emb_scale logit_scale rope_settings use_abacus randomize_positions_from
    block_class_name norm_class_name attn_impl norm_eps mlp_class_name nonlin_name bias qk_bias
    init_strategy init_orthogonal skip_initialization mup_model_scaling_factor use_fused_head
    debias_attention center_attention clip_qkv qk_norm logit_softcap activation_checkpoint_impl
    simple_ops strategy injection_type n_layers_in_recurrent_block n_layers_in_prelude
    n_layers_in_coda state_init recurrent_embedding_dimension
    recurrent_intermediation_embedding_dimension recurrent_num_attention_heads prelude_norm
    sampling_scheme mean_recurrence mean_backprop_depth lockstep_n lockstep_k curriculum_target
    recurrent_iteration_method tie_embeddings block_size n_embd intermediate_size
    num_attention_heads num_key_value_heads vocab_size padded_vocab_size padding_multiple head_size
    n_query_groups full_config"""
XLLM = """
    arch ddp_backend num_layers model_dim chunk_size num_heads num_kv_heads head_dim v_head_dim
    qknorm attn_act_func apply_attn_gate attn_gate_func causal_attn_backend sca_backend
    apply_bias_term ffn_hidden_dim awm_orthogonal_update num_values num_activated_values
    mova_backend num_experts num_activated_experts num_shared_experts num_dense_layers
    expert_inter_dim moe_router_score_func moe_router_bias moe_router_bias_update_rate
    moe_router_scaling_factor moe_expert_backend moe_permutation_backend causal_conv_width
    causal_conv_backend causal_conv_weight_normalization init_mode init_std init_embed_std
    init_logits_std vocab_size output_size timenorm_num_groups timenorm_beta1 timenorm_beta2
    timenorm_backend layernorm_num_groups memory_efficient_norm norm_affine timenorm_eps
    layernorm_eps rmsnorm_eps apply_rmsnorm residual_func residual_heads rope_base rope_head_dim
    dropout hidden_dropout attention_dropout swiglu scale_emb layerwise_ckpt loop_times
    loop_start_layer loop_end_layers loop_input_injection loop_diagonal_dt_init
    loop_diagonal_a_init dense_prelude_input_injection dense_prelude_input_layers
    dense_prelude_source_layer dense_prelude_diagonal_dt_init dense_prelude_diagonal_a_init
    huginn_prelude_layers huginn_recurrent_layers huginn_coda_layers huginn_state_init
    huginn_input_injection huginn_diagonal_dt_init huginn_diagonal_a_init
    huginn_hierarchical_state huginn_hierarchical_h_cycles huginn_hierarchical_l_cycles
    huginn_split_module_repeats huginn_depth_control huginn_sampling_scheme
    huginn_antithetic_sampling huginn_poisson_lognormal_target_mean huginn_poisson_lognormal_sigma
    huginn_poisson_lognormal_max huginn_backprop_depth huginn_depth_prior
    huginn_depth_prior_entropy huginn_prelude_norm huginn_recurrent_exit_norm
    huginn_prelude_orthogonal huginn_ortho_projection_eps fused_block recompute_q recompute_v
    recompute_attention recompute_awk recompute_fc1_out recompute_fc3_out recompute_router
    recompute_logits fused_output_layer"""

# The keys that the config class or the forward pass of each reference knows.
REFERENCE = {
    "huginn": RAVEN,
    "retrofitted-llama": f"{RAVEN} rope_theta rope_scaling rope_parameters max_position_embeddings",
    "retrofitted-olmo": f"{RAVEN} rope_theta rope_scaling rope_parameters max_position_embeddings",
    "ouro": f"{LLAMA} {WINDOWS} total_ut_steps early_exit_step early_exit_threshold chunk_size",
    "parcae": PARCAE,
    "nanochat-recursive": """sequence_len vocab_size n_layer n_head n_kv_head n_embd n_prelude
        n_recur_block n_coda train_recur_mean train_recur_max recur_warm_start bptt_k inject_mode
        kv_cache_recur_budget window_pattern""",
    "hrm-text": """H_cycles L_bp_cycles L_cycles attention_bias attention_dropout embedding_scale
        head_dim hidden_act hidden_size initializer_range intermediate_size max_position_embeddings
        mlp_bias num_attention_heads num_hidden_layers num_layers_per_stack prefix_lm rms_norm_eps
        rope_parameters tie_word_embeddings use_cache vocab_size""",
    "nanbeige": f"""{LLAMA} kv_channels num_loops loop_loss_weights skip_loop_final_norm
        qk_layernorm enable_double_loop_split loop_share_kv enable_depth_attention
        enable_hyper_connection""",
    "iquest-loop": f"{LLAMA} loop_num loop_window_size use_sliding_window sliding_window",
    "loopus": f"""{LLAMA} {WINDOWS} base_model_name_or_path base_config_dict encoder_layer_indices
        decoder_layer_indices reasoning_layer_indices N q_threshold q_eval_interval
        halting_strategy convergence_epsilon lma_window lma_heads""",
    "loopformer": """block_size vocab_size n_layer n_head n_embd intermediate_dim bias dropout
        bos_token_id eos_token_id pad_token_id max_model_loops""",
    "loopformer-base": """block_size vocab_size n_layer n_head n_embd intermediate_dim bias dropout
        bos_token_id eos_token_id pad_token_id max_model_loops""",
    "tmlt": """block_size vocab_size n_layer n_head n_embd intermediate_dim bias dropout
        bos_token_id eos_token_id pad_token_id max_model_loops""",
    "hrm": f"{PUZZLES}",
    "trm": f"{PUZZLES} puzzle_emb_len mlp_t no_ACT_continue",
    "ifm-loopedlm": XLLM,
    "dory": """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads head_dim hidden_act max_position_embeddings initializer_range use_cache
        pad_token_id bos_token_id eos_token_id tie_word_embeddings rope_parameters attention_bias
        attention_dropout mlp_bias sliding_window layer_types ngpt_alpha_init n_input_layers
        n_recurrent_layers n_output_layers n_recurrent_loops recurrent_kv_cache_mode""",
}
RELEASED = {
    "huginn": "huginn",
    "retrofitted-llama": "retrofitted_llama_default",
    "retrofitted-olmo": "retrofitted_olmo_default",
    "ouro": "ouro",
    "parcae": "parcae",
    "nanochat-recursive": "nanochat_recursive",
    "hrm-text": "hrm_text",
    "nanbeige": "wild/nanbeige_released",
    "iquest-loop": "wild/iquest_w4",
    "loopus": "wild/loopus_legacy_keys",
    "loopformer": "wild/loopformer_plain",
    "loopformer-base": "wild/loopformer_plain",
    "tmlt": "wild/loopformer_plain",
    "hrm": "wild/hrm_plain",
    "trm": "wild/trm_plain",
    "ifm-loopedlm": "ifm_loopedlm",
    "dory": "dory",
}
# Values at which a family reads further keys.
KINDS = {
    "ifm-loopedlm": (
        dict(arch="transformer", loop_start_layer=0),
        dict(huginn_hierarchical_state="shared_hl"),
    )
}
FEEDFORWARD = {family.name: family for family in FAMILIES if family.feedforward}
REFERENCE |= {
    name: " ".join(AutoConfig.for_model(family.model_types[0]).to_dict())
    for name, family in FEEDFORWARD.items()
}
EVERY = pytest.mark.parametrize("name", REFERENCE)


class Asked(dict):
    """A config that notes the keys it is asked for."""

    def __init__(self, content, asked):
        super().__init__(content)
        self.asked = asked

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)


def released(name: str) -> dict:
    if name in FEEDFORWARD:
        content = AutoConfig.for_model(FEEDFORWARD[name].model_types[0]).to_dict()
        return content | ({"sliding_window": None} if name == "mistral" else {})
    return json.loads((FIXTURES / RELEASED[name] / "config.json").read_text())


def read_keys(family: Family, content: dict) -> set[str]:
    asked: set[str] = set()

    def spread(given):
        spread_out = family.spread(given) if family.spread is not None else given
        return Asked(spread_out, asked)

    object.__setattr__(copy := Family(**family.__dict__), "spread", spread)
    copy.config_fields(Asked(content, asked), "config.json")
    return asked


def known_keys(family: Family, content: dict) -> set[str]:
    recognised = {"model_type", "architectures", "_class_name", "model_class_name"}
    listed = {*COMMON_FLAGS, *COMMON_WITHOUT_EFFECT, *family.flags, *family.without_effect}
    alternatives = {key for source in family.fields.values() for key in source.keys}
    asked = read_keys(family, content)
    for change in KINDS.get(family.name, ()):
        asked |= read_keys(family, {**content, "model": {**content["model"], **change}})
    return listed | recognised | alternatives | asked


def test_every_family_lists_the_keys_of_its_reference():
    assert {name for name in BY_NAME if name not in ("native", "hrm-text-split")} == set(REFERENCE)


@EVERY
def test_every_key_that_the_reference_reads_is_read_refused_or_without_effect(name):
    content = released(name)
    unknown = set(REFERENCE[name].split()) - known_keys(BY_NAME[name], content)
    assert not unknown


@EVERY
def test_every_key_of_a_released_file_is_read_refused_or_without_effect(name):
    content = released(name)
    family = BY_NAME[name]
    spread = family.spread(content) if family.spread is not None else content
    unknown = set(spread) - known_keys(family, content) - {"base_config_dict.model_type"}
    assert not unknown


@EVERY
def test_no_key_is_both_without_effect_and_refused_or_read_as_a_field(name):
    family = BY_NAME[name]
    fields = {key for source in family.fields.values() for key in source.keys}
    refused = {*COMMON_FLAGS, *family.flags} | fields
    assert not refused & set(family.without_effect)
    assert not (set(COMMON_FLAGS) | fields) & set(COMMON_WITHOUT_EFFECT)
    assert all(reason for reason in family.without_effect.values())


def fields_of(name: str, /, **changes) -> dict:
    return BY_NAME[name].config_fields({**released(name), **changes}, "config.json")


def test_keys_without_effect_change_no_field():
    for name in REFERENCE:
        family, plain = BY_NAME[name], fields_of(name)
        # 'initializer_range' is the unit of Dory's scales, and gives HRM-Text its scale where
        # 'embedding_scale' is missing.
        counts = {"full_config", "arch"} | ({"initializer_range"} if name == "dory" else set())
        for key in {*family.without_effect, *COMMON_WITHOUT_EFFECT} - counts:
            assert fields_of(name, **{key: 0.123}) == plain, (name, key)


def test_the_unit_of_scales_counts():
    assert fields_of("dory", initializer_range=0.08)["logit_scale"] == 1 / 0.08


@pytest.mark.parametrize(
    ("step", "expected"), [(None, None), (0, 0), (2, 2), (4, None), (-1, None), (9, None)]
)
def test_a_configured_exit_step_is_that_of_the_reference(step, expected):
    assert fields_of("ouro", early_exit_step=step)["exit_step"] == expected


@pytest.mark.parametrize("step", [1.0, "1", True])
def test_a_configured_exit_step_that_is_no_iteration_is_refused(step):
    with pytest.raises(CheckpointError, match="'early_exit_step' must be an iteration or null"):
        fields_of("ouro", early_exit_step=step)


@pytest.mark.parametrize("name", ["retrofitted-llama", "nanbeige", "iquest-loop"])
def test_rope_type_counts_beside_its_older_name(name):
    scaled = dict(factor=2.0, rope_type="linear", type="default")
    for order in (scaled, dict(reversed(scaled.items()))):
        assert fields_of(name, rope_scaling=order)["rotary_scaling_factor"] == 2.0
    assert "rotary_scaling_factor" not in fields_of(
        name, rope_scaling=dict(type="linear", rope_type="default", factor=2.0)
    )


def test_rope_types_that_ouros_released_class_reads_otherwise_are_refused():
    scaling = dict(rope_type="default", type="linear", factor=2.0)
    with pytest.raises(CheckpointError, match="'rope_type' 'default' and 'type' 'linear'"):
        fields_of("ouro", rope_scaling=scaling)


def test_loopus_reads_the_layers_fields_from_the_base_models_config_alone():
    stray = fields_of("loopus", hidden_size=7, rms_norm_eps=0.5, rope_theta=3.0)
    assert stray == fields_of("loopus")
    base = released("loopus")["base_config_dict"]
    composite = {"model_type": "qwen3_vl", "text_config": base}
    assert fields_of("loopus", base_config_dict=composite) == fields_of("loopus")


def test_the_number_of_iterations_is_what_the_config_says():
    assert fields_of("loopus", N=20)["n_iterations"] == 20
    assert fields_of("loopformer")["n_iterations"] == 8
    assert fields_of("loopformer", max_model_loops=12)["n_iterations"] == 12


def test_a_known_model_fills_in_what_its_file_does_not_say(tmp_path, monkeypatch):
    from tl_loops.loading import source
    from tl_loops.loading.open import load_config

    content = released("loopformer")
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(source, "_download", lambda *args, **kwargs: tmp_path)
    for blocks, iterations in ((3, 8), (2, 12), (1, 24)):
        found = source.resolve(f"loopformer-{blocks}block-{iterations}iterations")
        assert load_config(found, device="cpu").n_iterations == iterations
    (tmp_path / "config.json").write_text(json.dumps({**content, "max_model_loops": 5}))
    found = source.resolve("armenjeddi/LoopFormer-2block-12iterations-FineWeb300K")
    cfg = load_config(found, device="cpu")
    assert isinstance(cfg, LoopedTransformerConfig) and cfg.n_iterations == 5
