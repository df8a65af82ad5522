"""The config holds together or says what does not."""

import pytest
import torch

from tests.models import ARCHITECTURES, SIZES, tiny_config, tiny_model
from tl_loops import ConfigError, LoopedTransformerConfig


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameter_count_is_that_of_the_model(architecture: str):
    model = tiny_model(architecture)
    assert model.cfg.n_params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dictionary_round_trip(architecture: str):
    cfg = tiny_config(architecture)
    assert LoopedTransformerConfig.from_dict(cfg.to_dict()) == cfg


def test_weightless_norms_count_nothing():
    model = tiny_model("weightless", qk_norm="full")
    assert model.cfg.n_params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("given", "width"), [(-1, SIZES["d_vocab"]), (7, 7)])
def test_logits_are_as_wide_as_the_vocabulary_or_as_d_vocab_out(given, width):
    for architecture in ("ouro", "sphere"):  # whose logits have trained scales
        model = tiny_model(architecture, d_vocab_out=given)
        assert model.cfg.d_vocab_out == width
        weights = model.physical_state_dict()
        assert weights["unembed.W_U"].shape == (model.cfg.d_model, width)
        assert ("unembed.w" in weights) == (architecture == "sphere")
        assert weights.get("unembed.w", model.unembed.b_U).shape == (width,)
        assert model(torch.tensor([[1, 2]])).shape == (1, 2, width)


def test_published_parameter_counts():
    ouro = LoopedTransformerConfig(
        n_core=24,
        n_iterations=4,
        d_model=2048,
        d_head=128,
        n_heads=16,
        d_mlp=5632,
        d_vocab=49152,
        n_ctx=65536,
        block_norm="sandwich",
        norm_between_iterations=True,
        exit_gate=True,
        device="cpu",
    )
    assert ouro.n_params == 1_434_652_673
    assert (ouro.n_layers, ouro.n_physical_layers) == (96, 24)


def test_set_iterations_moves_the_depth():
    cfg = tiny_config("huginn")
    cfg.set_iterations(128)
    assert (cfg.n_layers, cfg.notation) == (2 + 256 + 2, "(2, 2⊗128, 2)_I")
    n_params = cfg.n_params
    assert LoopedTransformerConfig.from_dict(cfg.to_dict()).n_params == n_params
    for bad in (0, -1, True):
        with pytest.raises(ConfigError, match="integer of at least 1"):
            cfg.set_iterations(bad)


def test_describe_tells_the_data_flow():
    text = tiny_config("huginn").describe()
    assert "(2, 2⊗3, 2)_I" in text
    assert "x = [s, e] W" in text
    assert "x = ln1_post(x + attn(ln1(x)))" in text
    assert "x = ln_final(s); 2 x block" in text
    text = tiny_config("parcae").describe()
    assert "e = ln_injection(x)" in text and "x = s W; 2 x block" in text
    assert "v += 2·sigmoid(gate(ln1(x)))·W_E[tokens]" in text
    assert "logits = s W_U" in tiny_config("ouro").describe()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(block_norm="peri"), "block_norm must be one of 'pre', 'sandwich'"),
        (dict(injection="linear"), "injection must be one of None, 'concat'"),
        (dict(n_iterations=0), "n_iterations must be at least 1"),
        (dict(n_layers=7), "n_layers=7 contradicts"),
        (dict(use_local_attn=True), "use_local_attn=True is not supported"),
        (dict(use_qk_norm=True), "use qk_norm='full' or 'head'"),
        (dict(n_devices=2), "n_devices=2 is not supported"),
        (dict(initial_state_std=-1.0), "initial_state_std must be at least 0"),
        (dict(exit_threshold=0.5), "exit_threshold needs exit_gate"),
        (dict(norm_before_coda=True, norm_between_iterations=True), "exclude each other"),
        (dict(normalization_type="LN", block_norm="sandwich"), "a norm that does not centre"),
        (dict(n_key_value_heads=3), "must be a multiple"),
        (dict(act_fn="swish"), "act_fn must be one of"),
        (dict(norm_injection=True, injection=None), "norm_injection needs an injection"),
        (dict(linear_before_coda=True, n_coda=0), "linear_before_coda needs n_coda"),
        (dict(value_embeddings=True, value_gate_channels=33), "between 1 and d_model=32"),
        (dict(positional_embedding_type="alibi"), "positional_embedding_type must be one of"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config("retrofitted", **changes)


def test_unknown_and_missing_fields_are_named():
    with pytest.raises(
        ConfigError, match=r"unknown config field 'n_prelud'; did you mean n_prelude"
    ):
        LoopedTransformerConfig.from_dict({**SIZES, "n_prelud": 1})
    fields = {k: v for k, v in SIZES.items() if k not in ("d_model", "n_ctx")}
    with pytest.raises(ConfigError, match=r"lacks the required field.*d_model, n_ctx"):
        LoopedTransformerConfig.from_dict(fields)


def test_a_seed_in_the_config_leaves_the_global_generator_alone():
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny_model("retrofitted", seed=11)
    assert torch.equal(torch.rand(3), expected)
