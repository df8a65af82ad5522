"""Dory against the numbers of its implementation in transformers 5.24."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tl_loops import LoopedTransformer

FIXTURE = Path(__file__).parent / "fixtures" / "dory"
TOLERANCE = 1e-5


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach() - expected).abs().max() / expected.abs().max())


def load(directory: Path, **options) -> LoopedTransformer:
    with pytest.warns(UserWarning, match="tokenizer"):
        return LoopedTransformer.from_pretrained_no_processing(directory, device="cpu", **options)


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(FIXTURE / "expected.safetensors")


@pytest.fixture(scope="module")
def model() -> LoopedTransformer:
    return load(FIXTURE)


def changed(directory: Path, **changes) -> Path:
    """The fixture with other fields in its config."""
    shutil.copytree(FIXTURE, directory)
    config = {**json.loads((FIXTURE / "config.json").read_text()), **changes}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_logits_with_and_without_hooks_and_processing(model, expected):
    assert model.cfg.notation == "(2, 2⊗3, 1)_I"
    tokens = expected["tokens"]
    assert relative_error(model(tokens), expected["logits"]) < TOLERANCE
    cached, _ = model.run_with_cache(tokens)
    assert relative_error(cached, expected["logits"]) < TOLERANCE
    with pytest.warns(UserWarning):
        processed = LoopedTransformer.from_pretrained(FIXTURE, device="cpu")
    assert relative_error(processed(tokens), expected["logits"]) < TOLERANCE


def test_every_layer_every_injection_and_every_pattern(model, expected):
    _, cache = model.run_with_cache(expected["tokens"])
    assert len(expected["layer_out"]) == len(expected["patterns"]) == model.cfg.n_layers
    for index in range(model.cfg.n_layers):
        layer, pattern = cache["resid_post", index], cache["pattern", index]
        assert relative_error(layer, expected["layer_out"][index]) < TOLERANCE, index
        assert relative_error(pattern, expected["patterns"][index]) < TOLERANCE, index
    assert len(expected["injected"]) == model.cfg.n_iterations
    for t, entering in enumerate(expected["injected"]):
        assert relative_error(cache[f"iter.{t}.hook_injected"], entering) < TOLERANCE


def test_left_padding(model, expected):
    real, padded = expected["padding"].bool(), expected["logits_padded"]
    logits = model(expected["tokens"], attention_mask=expected["padding"])
    assert relative_error(logits[real], padded[real]) < TOLERANCE
    row = model(expected["tokens"][1:, 5:])
    assert relative_error(row, expected["logits_padded"][1:, 5:]) < TOLERANCE


@pytest.mark.parametrize("n_loops", [1, 2])
def test_other_numbers_of_loops(model, expected, n_loops):
    logits = model(expected["tokens"], n_iterations=n_loops)
    assert relative_error(logits, expected[f"logits_{n_loops}_loops"]) < TOLERANCE


@pytest.mark.parametrize("mode", ["per_loop", "last_loop"])
def test_decoding_with_keys_of_each_loop_and_of_the_last(expected, tmp_path, mode):
    model = load(changed(tmp_path / "model", recurrent_kv_cache_mode=mode))
    tokens, mask = expected["tokens"], expected["padding"]
    assert relative_error(model(tokens), expected["logits"]) < TOLERANCE  # one call is the same
    pieces = [tokens[:, :5], tokens[:, 5:7], *tokens[:, 7:].split(1, dim=1)]

    def decode(attention_mask=None):
        past, logits, stop = model.make_kv_cache(len(tokens)), [], 0
        for piece in pieces:
            start, stop = stop, stop + piece.shape[1]
            given = None if attention_mask is None else attention_mask[:, start:stop]
            logits.append(model(piece, past_kv_cache=past, attention_mask=given))
        return torch.cat(logits, dim=1)

    assert relative_error(decode(), expected[f"decoded_{mode}"]) < TOLERANCE
    real, padded = mask.bool(), expected[f"decoded_{mode}_padded"]
    assert relative_error(decode(mask)[real], padded[real]) < TOLERANCE
    apart = relative_error(expected["decoded_last_loop"], expected["logits"])
    assert apart > 0.05  # the two ways do differ


def test_gradients_are_those_of_the_original(expected):
    model = load(FIXTURE)
    tokens = expected["tokens"]
    logits = model(tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert relative_error(loss, expected["loss_by"]) < TOLERANCE
    loss.backward()
    physical = dict(model.physical_named_parameters())
    for stored, name, shaped in (
        ("model.layers.2.lambda_1", "core.0.attn_rate.w", lambda g: g),
        ("model.layers.2.self_attn.sqk", "core.0.attn.query_scale.w", lambda g: g.flatten()),
        ("model.layers.3.mlp.suv_up", "core.1.mlp.in_scale.w", lambda g: g),
        ("model.layers.3.self_attn.s_gate", "core.1.attn.gate_scale.w", lambda g: g.flatten()),
        ("lm_head.logit_scale", "unembed.w", lambda g: g),
        (
            "model.layers.0.self_attn.k_proj.weight",
            "prelude.0.attn._W_K",
            lambda g: g.transpose(1, 2).flatten(0, 1),
        ),
    ):
        gradient = physical[name].grad
        assert gradient is not None
        assert relative_error(shaped(gradient), expected[f"grad.{stored}"]) < 1e-4, name


def test_a_config_that_counts_layers_once_is_the_same_model(model, expected, tmp_path):
    config = json.loads((FIXTURE / "config.json").read_text())
    kinds = config["layer_types"][::2]
    halves = {key: config[key] // 2 for key in config if key.startswith(("n_input", "n_output"))}
    once = changed(
        tmp_path / "dory",
        layer_types=kinds,
        num_hidden_layers=5,
        n_recurrent_layers=None,
        **halves,
    )
    assert load(once).cfg == model.cfg


def test_what_is_saved_loads_again(model, expected, tmp_path):
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.cfg == model.cfg
    assert torch.equal(again(expected["tokens"]), model(expected["tokens"]))
