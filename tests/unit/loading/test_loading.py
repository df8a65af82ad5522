import json
import os
import shutil
import socket
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformer_lens.utilities.tokenize_utils import get_tokenizer_with_bos

from tests.closeness import assert_close
from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.config.weights import physical_tensors
from tl_loops.errors import CheckpointError, ConfigError, UnknownModelError
from tl_loops.loading import open as loading
from tl_loops.loading.open import load_config, open_tensors, save_checkpoint
from tl_loops.loading.source import is_looped_name, resolve
from tl_loops.loading.tokenizer import load_tokenizer

FIXTURES = Path(__file__).parents[2] / "parity" / "fixtures"
NAMES = (
    "huginn",
    "ouro",
    "retrofitted_llama_default",
    "retrofitted_llama_llama3",
    "retrofitted_olmo_default",
)
BY_NAME = pytest.mark.parametrize("name", NAMES)


def raw(name):
    """The stored tensors, read by the safetensors library."""
    return load_file(FIXTURES / name / "model.safetensors")


def load(directory, **arguments):
    checkpoint = resolve(directory)
    cfg = load_config(checkpoint, device="cpu", **arguments)
    return cfg, dict(open_tensors(checkpoint, cfg))


def write(directory, name, tensors=None, **changes):
    """A copy of a fixture with changed tensors and config fields; ``...`` removes a field."""
    directory.mkdir(exist_ok=True)
    config = {**json.loads((FIXTURES / name / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    if tensors is None:
        tensors = raw(name)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, weights(directory))
    return directory


def weights(directory):
    return directory / "model.safetensors"


def shard(directory, parts=3):
    """Replace the single weight file by shards with an index."""
    tensors = load_file(weights(directory))
    weight_map = {key: f"model-0000{i % parts}.safetensors" for i, key in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({k: t for k, t in tensors.items() if weight_map[k] == file}, directory / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    weights(directory).unlink()
    return weight_map


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def refusal(directory, **arguments):
    with pytest.raises(CheckpointError) as error:
        load(directory, **arguments)
    return str(error.value)


# Values ---------------------------------------------------------------------------------------


@BY_NAME
def test_every_physical_weight_is_there_once_in_shape_and_type(name):
    checkpoint = resolve(FIXTURES / name)
    cfg = load_config(checkpoint, device="cpu")
    pairs = list(open_tensors(checkpoint, cfg))
    tensors = dict(pairs)
    assert len(pairs) == len(tensors)
    assert {key: tuple(t.shape) for key, t in tensors.items()} == {
        key: tensor.shape for key, tensor in physical_tensors(cfg).items()
    }
    assert all(t.dtype == torch.float32 for t in tensors.values())
    assert cfg.n_params == sum(t.numel() for t in tensors.values())


def test_ouro_projections_equal_the_stored_ones():
    cfg, tensors = load(FIXTURES / "ouro")
    stored, x = raw("ouro"), torch.randn(5, cfg.d_model, generator=torch.Generator().manual_seed(0))
    e = cfg.d_head
    for layer in range(cfg.n_core):
        key, P = f"model.layers.{layer}", f"core.{layer}"
        for short, W in (("q", "W_Q"), ("k", "W_K"), ("v", "W_V")):
            rows = stored[f"{key}.self_attn.{short}_proj.weight"]
            for head in range(cfg.n_heads):
                expected = x @ rows[head * e : (head + 1) * e].T
                assert_close(x @ tensors[f"{P}.attn.{W}"][head], expected)
        columns = stored[f"{key}.self_attn.o_proj.weight"]
        for head in range(cfg.n_heads):
            z = x[:, :e]
            expected = z @ columns[:, head * e : (head + 1) * e].T
            assert_close(z @ tensors[f"{P}.attn.W_O"][head], expected)
        for short, W in (("gate", "W_gate"), ("up", "W_in"), ("down", "W_out")):
            assert torch.equal(tensors[f"{P}.mlp.{W}"], stored[f"{key}.mlp.{short}_proj.weight"].T)
        for norm, w in (
            ("input_layernorm", "ln1"),
            ("input_layernorm_2", "ln1_post"),
            ("post_attention_layernorm", "ln2"),
            ("post_attention_layernorm_2", "ln2_post"),
        ):
            assert torch.equal(tensors[f"{P}.{w}.w"], stored[f"{key}.{norm}.weight"])
    assert torch.equal(tensors["embed.W_E"], stored["model.embed_tokens.weight"])
    assert torch.equal(tensors["unembed.W_U"], stored["lm_head.weight"].T)
    assert torch.equal(tensors["ln_final.w"], stored["model.norm.weight"])
    assert torch.equal(tensors["exit_gate.W"], stored["model.early_exit_gate.weight"].T)
    assert torch.equal(tensors["exit_gate.b"], stored["model.early_exit_gate.bias"])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ouro"])
def test_fused_projections_equal_the_reference_split(name):
    cfg, tensors = load(FIXTURES / name)
    stored, x = raw(name), torch.randn(5, cfg.d_model, generator=torch.Generator().manual_seed(0))
    kv = "" if cfg.n_key_value_heads is None else "_"
    kv_heads = cfg.n_key_value_heads or cfg.n_heads
    widths = [cfg.n_heads * cfg.d_head, kv_heads * cfg.d_head, kv_heads * cfg.d_head]
    blocks = [
        (f"transformer.{stored_phase}.{layer}", f"{phase}.{layer}")
        for stored_phase, phase, n in (
            ("prelude", "prelude", cfg.n_prelude),
            ("core_block", "core", cfg.n_core),
            ("coda", "coda", cfg.n_coda),
        )
        for layer in range(n)
    ]
    for key, P in blocks:
        q, k, v = F.linear(x, stored[f"{key}.attn.Wqkv.weight"]).split(widths, dim=1)
        for W, expected in (("W_Q", q), (f"{kv}W_K", k), (f"{kv}W_V", v)):
            got = torch.einsum("bd,hde->bhe", x, tensors[f"{P}.attn.{W}"]).flatten(1)
            assert_close(got, expected)
        W_O = tensors[f"{P}.attn.W_O"].flatten(0, 1)
        assert torch.equal(W_O, stored[f"{key}.attn.proj.weight"].T)
        gate, up = F.linear(x, stored[f"{key}.mlp.fc.weight"]).chunk(2, dim=-1)
        assert_close(x @ tensors[f"{P}.mlp.W_gate"], gate)
        assert_close(x @ tensors[f"{P}.mlp.W_in"], up)
        assert torch.equal(tensors[f"{P}.mlp.W_out"], stored[f"{key}.mlp.proj.weight"].T)
    assert torch.equal(tensors["injection.W"], stored["transformer.adapter.weight"].T)
    assert torch.equal(tensors["ln_final.w"], stored["transformer.ln_f.weight"])


def test_huginn_norms_and_query_key_biases():
    _, tensors = load(FIXTURES / "huginn")
    stored = raw("huginn")
    for number, w in enumerate(("ln1", "ln1_post", "ln2", "ln2_post"), start=1):
        key = f"transformer.core_block.2.norm_{number}.weight"
        assert torch.equal(tensors[f"core.2.{w}.w"], stored[key])
    bias = stored["transformer.coda.1.attn.qk_bias"]
    assert torch.equal(tensors["coda.1.attn.b_Q"], bias[0, 0])
    assert torch.equal(tensors["coda.1.attn.b_K"], bias[1, 0])
    assert "unembed.W_U" not in tensors


def test_retrofitted_norms():
    _, llama = load(FIXTURES / "retrofitted_llama_default")
    stored = raw("retrofitted_llama_default")
    assert torch.equal(llama["core.1.ln1.w"], stored["transformer.core_block.1.norm_1.weight"])
    assert torch.equal(llama["core.1.ln2.w"], stored["transformer.core_block.1.norm_2.weight"])
    _, olmo = load(FIXTURES / "retrofitted_olmo_default")
    stored, key = raw("retrofitted_olmo_default"), "transformer.core_block.1"
    assert torch.equal(olmo["core.1.ln1_post.w"], stored[f"{key}.norm_1.weight"])
    assert torch.equal(olmo["core.1.ln2_post.w"], stored[f"{key}.norm_2.weight"])
    assert torch.equal(olmo["core.1.attn.q_norm.w"], stored[f"{key}.attn.q_norm.weight"])
    assert torch.equal(olmo["core.1.attn.k_norm.w"], stored[f"{key}.attn.k_norm.weight"])
    assert "core.1.ln1.w" not in olmo


# Storage --------------------------------------------------------------------------------------


def assert_laid_for_linear(cfg, tensors):
    for name, physical in physical_tensors(cfg).items():
        tensor = tensors[name]
        # Each weight fills its own memory: nothing is kept alive beside it.
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name
        row_major = {
            "plain": lambda t: t,
            "transposed": lambda t: t.T,
            "heads_in": lambda t: t.transpose(1, 2),
            "heads_out": lambda t: t.permute(2, 0, 1),
        }[physical.storage](tensor)
        assert row_major.is_contiguous(), name
        assert row_major.reshape(row_major.shape[0], -1).data_ptr() == tensor.data_ptr(), name


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_views_that_linear_takes_without_a_copy(name, dtype):
    assert_laid_for_linear(*load(FIXTURES / name, dtype=dtype))


def test_headers_are_checked_before_any_data_is_read(tmp_path, monkeypatch):
    tensors = raw("ouro")
    del tensors["model.norm.weight"]
    checkpoint = resolve(write(tmp_path / "c", "ouro", tensors))
    cfg = load_config(checkpoint, device="cpu")

    def fail(*_):
        raise AssertionError("data was read")

    monkeypatch.setattr(loading, "read_rows", fail)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        open_tensors(checkpoint, cfg)


def test_tensors_are_read_one_at_a_time(monkeypatch):
    checkpoint = resolve(FIXTURES / "ouro")
    cfg = load_config(checkpoint, device="cpu")
    reads, read_rows = [], loading.read_rows

    def counted(*arguments):
        reads.append(arguments[0].key)
        return read_rows(*arguments)

    monkeypatch.setattr(loading, "read_rows", counted)
    stream = open_tensors(checkpoint, cfg)
    assert reads == []
    for count, _ in enumerate(stream, start=1):
        assert len(reads) == count


# Types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_types_are_converted_as_torch_converts_them(tmp_path, stored, wanted, monkeypatch):
    # Small pieces, so that conversion crosses their borders.
    monkeypatch.setattr("tl_loops.loading.files._PIECE", 1000)
    tensors = {key: tensor.to(stored) for key, tensor in raw("ouro").items()}
    cfg, loaded = load(write(tmp_path / "c", "ouro", tensors), dtype=wanted)
    assert cfg.dtype == wanted
    embedding = tensors["model.embed_tokens.weight"].to(wanted)
    assert loaded["embed.W_E"].dtype == wanted
    assert torch.equal(loaded["embed.W_E"], embedding)
    expected = tensors["model.layers.1.mlp.up_proj.weight"].to(wanted).T
    assert torch.equal(loaded["core.1.mlp.W_in"], expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_spellings_of_a_type(dtype):
    assert load_config(resolve(FIXTURES / "ouro"), dtype=dtype).dtype == torch.bfloat16


def test_the_default_type_is_float32():
    assert load_config(resolve(FIXTURES / "ouro")).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["int8", "half", torch.int64])
def test_other_types_are_refused(dtype):
    with pytest.raises(ConfigError, match=r"torch\.float32.*got"):
        load_config(resolve(FIXTURES / "ouro"), dtype=dtype)


def test_quantised_tensors_are_refused(tmp_path):
    tensors = raw("ouro")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    message = refusal(write(tmp_path / "c", "ouro", tensors))
    assert "key 'lm_head.weight' is stored as I8, expected one of F64, F32" in message


# Config arguments -----------------------------------------------------------------------------


def test_iterations_and_other_fields_can_be_chosen():
    cfg = load_config(
        resolve(FIXTURES / "huginn"), n_iterations=7, state_seed=None, n_ctx=9, device="cpu"
    )
    assert cfg.notation == "(2, 4⊗7, 2)_I" and cfg.n_layers == 2 + 28 + 2
    assert cfg.state_seed is None and cfg.n_ctx == 9 and cfg.device == "cpu"
    assert cfg.original_architecture == "RavenForCausalLM" and cfg.model_name == "huginn"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"d_model": 8}, "d_model is fixed by the weights of ouro"),
        ({"n_layers": 8}, "use n_iterations"),
        ({"state_sead": 1}, "state_seed"),
        ({"n_iterations": 0}, "n_iterations"),
    ],
)
def test_impossible_choices_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(resolve(FIXTURES / "ouro"), **overrides)


def test_a_contradictory_config_is_blamed_on_its_file(tmp_path):
    directory = write(tmp_path / "c", "ouro", num_key_value_heads=2)
    with pytest.raises(CheckpointError, match=r"c/config\.json.*multiple of n_key_value_heads=2"):
        load_config(resolve(directory))


# Refused tensors ------------------------------------------------------------------------------


def test_all_wrong_tensors_are_named_at_once(tmp_path):
    tensors = raw("ouro")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.zeros(47)
    tensors["model.layers.3.input_layernorm.weight"] = torch.zeros(48)
    message = refusal(write(tmp_path / "c", "ouro", tensors))
    assert str(tmp_path / "c") in message
    missing = "key 'model.layers.1.mlp.up_proj.weight' is missing, expected shape (80, 48)"
    assert f"model.safetensors: {missing}" in message
    assert "model.safetensors: key 'model.norm.weight' has shape (47,), expected (48,)" in message
    assert "key 'model.layers.3.input_layernorm.weight' of shape (48,) is unexpected" in message


def test_long_lists_of_problems_are_cut(tmp_path):
    tensors = {"model.norm.weight": torch.zeros(48)}
    message = refusal(write(tmp_path / "c", "ouro", tensors))
    assert message.count("\n") == 13 and "more" in message.splitlines()[-1]


@pytest.mark.parametrize("name", ["ouro", "huginn"])
@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(part=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(tmp_path, name, part):
    directory = write(tmp_path / "c", name)
    whole = weights(directory).read_bytes()
    weights(directory).write_bytes(whole[: int(part * len(whole))])
    assert "model.safetensors: truncated" in refusal(directory)


def test_bytes_behind_the_tensors_are_refused(tmp_path):
    directory = write(tmp_path / "c", "ouro")
    weights(directory).write_bytes(weights(directory).read_bytes() + b"more")
    assert "has bytes beyond its tensors" in refusal(directory)


def test_a_file_that_shrinks_between_header_and_data_is_refused(tmp_path):
    checkpoint = resolve(write(tmp_path / "c", "ouro"))
    cfg = load_config(checkpoint, device="cpu")
    stream = open_tensors(checkpoint, cfg)
    whole = weights(tmp_path / "c").read_bytes()
    weights(tmp_path / "c").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"truncated: key 'model\..*' lacks"):
        list(stream)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"PK\x03\x04 not at all a checkpoint", "is not a safetensors file"),
        (b"", "truncated inside its header (0 bytes in all)"),
        ((4).to_bytes(8, "little") + b"[  ]", "is not a readable safetensors file"),
        ((4).to_bytes(8, "little") + b"{{{{", "is not a readable safetensors file"),
        ((9).to_bytes(8, "little") + b'{"a": {}}', "bad header entry for key 'a'"),
    ],
)
def test_files_that_are_no_safetensors_are_refused(tmp_path, content, message):
    directory = write(tmp_path / "c", "ouro")
    weights(directory).write_bytes(content)
    found = refusal(directory)
    assert message in found and "model.safetensors: " in found
    assert found.count("\n") == 1  # not every key is listed as missing on top


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        [],
    ],
)
def test_headers_that_contradict_themselves_are_refused(tmp_path, entry):
    directory = write(tmp_path / "c", "ouro")
    header = json.dumps({"model.norm.weight": entry}).encode()
    weights(directory).write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
    assert "for key 'model.norm.weight'" in refusal(directory) or "key 'model.norm.weight' has" in (
        refusal(directory)
    )


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path):
    directory = write(tmp_path / "c", "huginn")
    weights(directory).unlink()
    torch.save(raw("huginn"), directory / "pytorch_model.bin")
    message = refusal(directory)
    assert "only as pytorch_model.bin" in message and "safetensors.torch.save_file" in message


def test_a_directory_without_weights_is_refused(tmp_path):
    directory = write(tmp_path / "c", "ouro")
    weights(directory).unlink()
    assert "holds no weights: expected model.safetensors" in refusal(directory)


@pytest.mark.parametrize("content", ["", "[]", "{", '"ouro"', "\x00", "[" * 100_000])
def test_a_bad_config_file_is_refused(tmp_path, content):
    directory = write(tmp_path / "c", "ouro")
    (directory / "config.json").write_text(content)
    assert "config.json" in refusal(directory)
    assert not is_looped_name(directory)


# Shards ---------------------------------------------------------------------------------------


@BY_NAME
def test_sharded_equals_unsharded(tmp_path, name):
    directory = write(tmp_path / "c", name)
    shard(directory)
    assert_same(load(directory)[1], load(FIXTURES / name)[1])


def test_shards_without_an_index_load_too(tmp_path):
    directory = write(tmp_path / "c", "ouro")
    shard(directory)
    (directory / "model.safetensors.index.json").unlink()
    assert_same(load(directory)[1], load(FIXTURES / "ouro")[1])


@BY_NAME
def test_an_absent_shard_is_named_once_and_not_every_key_of_it(tmp_path, name):
    directory = write(tmp_path / "c", name)
    shard(directory)
    (directory / "model-00001.safetensors").unlink()
    message = refusal(directory)
    assert "names model-00001.safetensors, which is absent" in message
    assert message.count("\n") == 1


def test_a_truncated_shard_is_named(tmp_path):
    directory = write(tmp_path / "c", "ouro")
    shard(directory)
    file = directory / "model-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    message = refusal(directory)
    assert "model-00002.safetensors: truncated" in message and message.count("\n") == 1


def test_a_shard_without_a_key_that_the_index_places_there_is_named(tmp_path):
    directory = write(tmp_path / "c", "ouro")
    file = directory / shard(directory)["model.norm.weight"]
    save_file({k: t for k, t in load_file(file).items() if k != "model.norm.weight"}, file)
    message = refusal(directory)
    assert f"{file.name}: lacks key 'model.norm.weight'" in message and message.count("\n") == 1


def test_a_key_that_no_shard_holds_is_named_with_its_shape(tmp_path):
    tensors = raw("ouro")
    del tensors["model.norm.weight"]
    directory = write(tmp_path / "c", "ouro", tensors)
    shard(directory)
    expected = "all 3 weight files: key 'model.norm.weight' is missing, expected shape (48,)"
    assert expected in refusal(directory)


def test_a_key_in_two_files_is_refused(tmp_path):
    directory = write(tmp_path / "c", "ouro")
    shard(directory)
    (directory / "model.safetensors.index.json").unlink()
    save_file({"model.norm.weight": torch.zeros(48)}, directory / "more.safetensors")
    assert "key 'model.norm.weight' is also in" in refusal(directory)


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/etc/passwd", "", 3])
def test_an_index_that_leaves_the_directory_is_refused(tmp_path, place):
    directory = write(tmp_path / "c", "ouro")
    weight_map = {**shard(directory), "model.norm.weight": place}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert "expected the name of a file beside it" in refusal(directory)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', "no"])
def test_a_bad_index_is_refused(tmp_path, content):
    directory = write(tmp_path / "c", "ouro")
    shard(directory)
    (directory / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(directory)


# Tied embeddings and tables -------------------------------------------------------------------


def test_a_repeated_tied_embedding_and_the_rotary_table_are_not_weights(tmp_path):
    tensors = raw("huginn")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    angles = torch.outer(torch.arange(64.0), 50_000.0 ** -(torch.arange(8.0) / 8))
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    tensors["freqs_cis"] = table[None, :, None].double()
    directory = write(tmp_path / "c", "huginn", tensors)
    assert_same(load(directory)[1], load(FIXTURES / "huginn")[1])
    del tensors["lm_head.weight"], tensors["freqs_cis"]
    assert_same(load(write(tmp_path / "d", "huginn", tensors))[1], load(directory)[1])


def test_a_tied_embedding_that_differs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tl_loops.loading.files._PIECE", 500)
    tensors = raw("huginn")
    head = tensors["transformer.wte.weight"].clone()
    head[-1, -1] += 1e-3
    tensors["lm_head.weight"] = head
    message = refusal(write(tmp_path / "c", "huginn", tensors))
    assert "'lm_head.weight' differs from 'transformer.wte.weight'" in message


def test_a_tied_embedding_of_another_shape_is_refused(tmp_path):
    tensors = {**raw("huginn"), "lm_head.weight": torch.zeros(95, 48)}
    message = refusal(write(tmp_path / "c", "huginn", tensors))
    assert "'lm_head.weight' has shape (95, 48), expected (96, 48)" in message


def test_an_untied_checkpoint_needs_its_unembedding(tmp_path):
    tensors = raw("ouro")
    del tensors["lm_head.weight"]
    assert "'lm_head.weight' is missing" in refusal(write(tmp_path / "c", "ouro", tensors))
    directory = write(tmp_path / "d", "ouro", tensors, tie_word_embeddings=True)
    assert "unembed.W_U" not in load(directory)[1]


# Names and directories ------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize(
    "name",
    ["huginn-0125", "HUGINN-0125", "ByteDance/Ouro-1.4B", "tl-loops-tiny", "recurrent-llama-3.2-8"],
)
def test_looped_names(name, no_network):
    assert is_looped_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "meta-llama/Llama-3.2-1B",
        "",
        "/",
        "no/such/dir",
        "a\0b",
        "x" * 5000,
        None,
        3,
        b"ouro-1.4b",
        ["ouro-1.4b"],
    ],
)
def test_other_names_are_not_looped_and_raise_nothing(name, no_network):
    assert is_looped_name(name) is False


def test_directories_are_looped_by_their_config(tmp_path, no_network):
    assert is_looped_name(FIXTURES / "ouro") and is_looped_name(str(FIXTURES / "huginn"))
    assert not is_looped_name(tmp_path)
    ordinary = tmp_path / "gpt"
    ordinary.mkdir()
    (ordinary / "config.json").write_text('{"model_type": "gpt2", "architectures": null}')
    assert not is_looped_name(ordinary)


def test_a_directory_wins_over_a_name_if_it_holds_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("huginn-0125")
    assert is_looped_name("huginn-0125")
    write(tmp_path / "huginn-0125", "ouro")
    checkpoint = resolve("huginn-0125")
    assert checkpoint.directory == Path("huginn-0125")
    assert load_config(checkpoint).notation == "(0, 3⊗4, 0)"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ouro-1.5b", "'ouro-1.5b' is neither.*Did you mean ouro-1.4b"),
        ("no/such/model", r"neither a directory nor a known looped model\. Other checkpoints"),
    ],
)
def test_unknown_names_suggest_near_ones(name, message, no_network):
    with pytest.raises(UnknownModelError, match=message):
        resolve(name)


def test_a_file_and_an_empty_directory_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(UnknownModelError, match="is a file; give the directory"):
        resolve(file)
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        resolve(tmp_path)


def test_a_revision_of_local_files_is_refused():
    with pytest.raises(ConfigError, match="revision='main'"):
        resolve(FIXTURES / "ouro", revision="main")


def test_the_packaged_model_loads_without_network(no_network):
    checkpoint = resolve("TL-Loops-Tiny")
    cfg = load_config(checkpoint, device="cpu")
    tensors = dict(open_tensors(checkpoint, cfg))
    assert sum(tensor.numel() for tensor in tensors.values()) == cfg.n_params
    assert load_tokenizer(checkpoint) is not None
    assert checkpoint.name == cfg.model_name == "tl-loops-tiny"


# Hub ------------------------------------------------------------------------------------------


def hub_cache(tmp_path, repository, source):
    """A hub cache that holds one revision of a repository, as the hub client lays it out."""
    folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    commit = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copytree(source, folder / "snapshots" / commit)
    return tmp_path / "hub"


def test_a_known_name_loads_from_the_hub_cache_without_network(tmp_path, no_network):
    cache = hub_cache(tmp_path, "ByteDance/Ouro-1.4B", FIXTURES / "ouro")
    checkpoint = resolve("ouro-1.4b", cache_dir=cache, local_files_only=True)
    cfg = load_config(checkpoint, device="cpu")
    assert cfg.model_name == "Ouro-1.4B"
    assert_same(dict(open_tensors(checkpoint, cfg)), load(FIXTURES / "ouro")[1])


def test_a_name_that_is_not_in_the_cache_says_what_to_do(tmp_path, no_network):
    with pytest.raises(CheckpointError, match=r"ByteDance/Ouro-2\.6B could not be fetched.*local"):
        resolve("ouro-2.6b", cache_dir=tmp_path, local_files_only=True)


def test_downloads_take_neither_pickles_nor_code(monkeypatch, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    seen = {}

    def snapshot_download(repository, **arguments):
        seen.update(arguments, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"huginn-0125 holds no safetensors.*convert them"):
        resolve("HUGINN")
    (tmp_path / "model.safetensors").touch()
    resolve("HUGINN", revision="abc", token="t", cache_dir="c", local_files_only=False)
    assert seen["repository"] == "tomg-group-umd/huginn-0125"
    assert (seen["revision"], seen["token"], seen["cache_dir"]) == ("abc", "t", "c")
    taken = {
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "merges.txt",
        "chat_template.jinja",
        "tokenizer/tokenizer.json",
    }
    left = {
        "pytorch_model.bin",
        "model.pt",
        "modeling_ouro.py",
        "README.md",
        "checkpoint-5/model.safetensors",
        "original/config.json",
        "original/tokenizer.json",
        "tokenizer/modeling.py",
        "pytorch_model.bin.index.json",
    }
    filtered = filter_repo_objects(
        taken | left,
        allow_patterns=seen["allow_patterns"],
        ignore_patterns=seen["ignore_patterns"],
    )
    assert set(filtered) == taken


# Tokenizer ------------------------------------------------------------------------------------


def tokenizer(bos="<bos>", **settings):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate([bos, "<eos>", "<unk>", "one", "two"])}
    built = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token=bos, eos_token="<eos>", unk_token="<unk>", **settings
    )


@BY_NAME
@pytest.mark.parametrize("with_class", [True, False])
def test_a_tokenizer_loads_from_local_files(tmp_path, name, with_class, no_network):
    directory = write(tmp_path / "c", name)
    tokenizer().save_pretrained(directory)
    described = directory / "tokenizer_config.json"
    settings = json.loads(described.read_text())
    settings = {k: v for k, v in settings.items() if with_class or k != "tokenizer_class"}
    described.write_text(json.dumps(settings))
    loaded = load_tokenizer(resolve(directory))
    assert loaded.encode("two one zero") == [0, 4, 3, 2]
    assert loaded.encode("two", add_special_tokens=False) == [4]
    # TransformerLens takes it as it is, and does not reload the directory by its config.json.
    assert get_tokenizer_with_bos(loaded) is loaded
    assert loaded.bos_token == "<bos>" and loaded.eos_token_id == 1


def test_a_bos_token_that_the_tokenizer_cannot_prepend_is_left_to_transformer_lens(tmp_path):
    directory = write(tmp_path / "c", "retrofitted_llama_llama3")
    tokenizer(bos="<s:bos>").save_pretrained(directory)
    loaded = load_tokenizer(resolve(directory))
    assert loaded.encode("two") == [4] and loaded.bos_token == "<s:bos>"
    assert get_tokenizer_with_bos(loaded) is loaded


def test_without_tokenizer_files_there_is_one_warning(recwarn):
    warnings.simplefilter("always")
    assert load_tokenizer(resolve(FIXTURES / "ouro")) is None
    assert len(recwarn) == 1 and "no tokenizer files" in str(recwarn[0].message)


def test_a_bad_tokenizer_is_refused(tmp_path):
    directory = write(tmp_path / "c", "ouro")
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer files in .*c cannot be used"):
        load_tokenizer(resolve(directory))


def test_a_tokenizer_with_code_of_its_own_runs_none(tmp_path):
    directory = write(tmp_path / "c", "ouro")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "tokenization_own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n"
    )
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}})
    )
    with pytest.raises(CheckpointError, match="cannot be used"):
        load_tokenizer(resolve(directory))
    assert not (tmp_path / "ran").exists()


# Native format --------------------------------------------------------------------------------


@BY_NAME
@pytest.mark.parametrize("shard_bytes", [10**9, 50_000])
def test_native_round_trip(tmp_path, name, shard_bytes):
    cfg, tensors = load(FIXTURES / name, n_iterations=5)
    save_checkpoint(tmp_path / "a" / "b", cfg, tensors, max_shard_bytes=shard_bytes)
    files = {file.name for file in (tmp_path / "a" / "b").iterdir()}
    assert ("model.safetensors" in files) == (shard_bytes == 10**9)
    assert all(not file.startswith(".") for file in files)
    again_cfg, again = load(tmp_path / "a" / "b")
    assert again_cfg.to_dict() == cfg.to_dict()
    assert_same(again, tensors)
    assert_laid_for_linear(again_cfg, again)


def test_native_files_are_plain_safetensors_in_transformer_lens_orientation(tmp_path):
    cfg, tensors = load(FIXTURES / "ouro")
    save_checkpoint(tmp_path / "c", cfg, tensors)
    stored = load_file(tmp_path / "c" / "model.safetensors")
    assert_same(stored, tensors)
    assert all(tensor.is_contiguous() for tensor in stored.values())
    document = json.loads((tmp_path / "c" / "config.json").read_text())
    assert document["model_type"] == "tl_loops" and document["format_version"] == 1
    assert document["config"]["dtype"] == "float32"
    assert document["config"]["n_core"] == 3 and document["config"]["block_norm"] == "sandwich"
    assert not {"device", "n_params", "seed"} & document["config"].keys()


def test_native_keeps_the_saved_type_unless_told_otherwise(tmp_path):
    cfg, tensors = load(FIXTURES / "ouro", dtype="bfloat16")
    save_checkpoint(tmp_path / "c", cfg, tensors)
    assert load(tmp_path / "c")[0].dtype == torch.bfloat16
    again, values = load(tmp_path / "c", dtype="float32")
    assert again.dtype == torch.float32
    assert torch.equal(values["embed.W_E"], tensors["embed.W_E"].float())


def test_native_mixed_types_are_aligned(tmp_path):
    cfg, tensors = load(FIXTURES / "ouro")
    tensors["ln_final.w"] = tensors["ln_final.w"].double()
    tensors["exit_gate.b"] = tensors["exit_gate.b"].bfloat16()
    save_checkpoint(tmp_path / "c", cfg, tensors)
    assert_same(load_file(tmp_path / "c" / "model.safetensors"), tensors)


def test_native_tensors_of_any_strides(tmp_path):
    cfg, tensors = load(FIXTURES / "ouro")
    spread = {key: torch.stack((tensor, tensor + 1), -1)[..., 0] for key, tensor in tensors.items()}
    save_checkpoint(tmp_path / "c", cfg, spread)
    assert_same(load_file(tmp_path / "c" / "model.safetensors"), tensors)


def test_saving_checks_the_tensors_first(tmp_path):
    cfg, tensors = load(FIXTURES / "ouro")
    del tensors["ln_final.w"]
    tensors["extra"] = torch.zeros(1)
    tensors["embed.W_E"] = tensors["embed.W_E"][:-1]
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(tmp_path / "c", cfg, tensors)
    for part in (
        "'ln_final.w' is missing, expected shape (48,)",
        "'extra' is not a weight of this config",
        "'embed.W_E' has shape (95, 48), expected (96, 48)",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "c").exists()


class FolderTokenizer:
    def save_pretrained(self, directory):
        (directory / "templates").mkdir()
        (directory / "templates" / "one.jinja").touch()


def test_folders_that_a_tokenizer_saves_are_replaced_too(tmp_path):
    cfg, tensors = load(FIXTURES / "ouro")
    for _ in range(2):
        save_checkpoint(tmp_path / "c", cfg, tensors, tokenizer=FolderTokenizer())
    assert [file.name for file in (tmp_path / "c" / "templates").iterdir()] == ["one.jinja"]


class BrokenTokenizer:
    def save_pretrained(self, directory):
        raise RuntimeError("disk full")


def test_a_failed_save_leaves_nothing(tmp_path):
    cfg, tensors = load(FIXTURES / "ouro")
    with pytest.raises(RuntimeError, match="disk full"):
        save_checkpoint(tmp_path / "c", cfg, tensors, tokenizer=BrokenTokenizer())
    assert not (tmp_path / "c").exists()


def test_a_failed_save_keeps_the_checkpoint_that_was_there(tmp_path):
    cfg, tensors = load(FIXTURES / "ouro")
    save_checkpoint(tmp_path / "c", cfg, tensors)
    before = {file.name: file.read_bytes() for file in (tmp_path / "c").iterdir()}
    changed = {key: tensor + 1 for key, tensor in tensors.items()}
    with pytest.raises(RuntimeError, match="disk full"):
        save_checkpoint(tmp_path / "c", cfg, changed, tokenizer=BrokenTokenizer())
    assert {file.name: file.read_bytes() for file in (tmp_path / "c").iterdir()} == before


@pytest.mark.parametrize(("first", "second"), [(10**9, 50_000), (50_000, 10**9), (50_000, 90_000)])
def test_saving_again_replaces_the_earlier_weights(tmp_path, first, second):
    cfg, tensors = load(FIXTURES / "ouro")
    save_checkpoint(tmp_path / "c", cfg, tensors, max_shard_bytes=first)
    changed = {key: tensor + 1 for key, tensor in tensors.items()}
    save_checkpoint(tmp_path / "c", cfg, changed, max_shard_bytes=second)
    assert_same(load(tmp_path / "c")[1], changed)
    files = sorted(file.name for file in (tmp_path / "c").iterdir())
    save_checkpoint(tmp_path / "fresh", cfg, changed, max_shard_bytes=second)
    assert files == sorted(file.name for file in (tmp_path / "fresh").iterdir())


def test_saving_over_another_format_is_refused(tmp_path):
    cfg, tensors = load(FIXTURES / "ouro")
    directory = write(tmp_path / "c", "ouro")
    before = weights(directory).read_bytes()
    with pytest.raises(CheckpointError, match="another format"):
        save_checkpoint(directory, cfg, tensors)
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"weights without config\.json"):
        save_checkpoint(directory, cfg, tensors)
    with pytest.raises(CheckpointError, match="is a file"):
        save_checkpoint(weights(directory), cfg, tensors)
    assert weights(directory).read_bytes() == before


def test_a_tokenizer_is_saved_beside_the_weights(tmp_path):
    cfg, tensors = load(FIXTURES / "ouro")
    for _ in range(2):
        save_checkpoint(
            tmp_path / "c", cfg, tensors, tokenizer=tokenizer(chat_template="{{ messages }}")
        )
    loaded = load_tokenizer(resolve(tmp_path / "c"))
    assert loaded.encode("two one") == [0, 4, 3] and loaded.chat_template == "{{ messages }}"


def test_a_config_written_by_hand_loads_whatever_its_architecture(tmp_path):
    cfg = LoopedTransformerConfig(
        d_model=12,
        d_head=4,
        n_heads=3,
        n_ctx=8,
        d_mlp=10,
        d_vocab=7,
        n_prelude=1,
        n_core=2,
        n_coda=1,
        n_iterations=3,
        injection="gated_diagonal",
        initial_state="learned",
        qk_norm="full",
        attn_bias=True,
        mlp_bias=True,
        unembed_bias=True,
        exit_gate=True,
        positional_embedding_type="standard",
        device="cpu",
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: tensor.empty().normal_(generator=generator)
        for name, tensor in physical_tensors(cfg).items()
    }
    save_checkpoint(tmp_path / "c", cfg, tensors)
    again, loaded = load(tmp_path / "c")
    assert again.to_dict() == cfg.to_dict()
    assert_same(loaded, tensors)
    assert_laid_for_linear(again, loaded)


def test_native_configs_with_unknown_or_wrong_fields_are_refused(tmp_path):
    cfg, tensors = load(FIXTURES / "ouro")
    save_checkpoint(tmp_path / "c", cfg, tensors)
    path = tmp_path / "c" / "config.json"
    document = json.loads(path.read_text())
    for field, value in (("n_cores", 3), ("d_model", "48"), ("block_norm", "none")):
        path.write_text(json.dumps({**document, "config": {**document["config"], field: value}}))
        message = refusal(tmp_path / "c")
        assert "c/config.json" in message and field in message
