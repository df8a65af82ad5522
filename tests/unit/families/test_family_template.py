"""The template of a family: filled in, registered, loaded, checked and compared."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tl_loops import LoopedTransformer
from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import CheckpointError
from tl_loops.families import registry
from tl_loops.model.check import check

DOCS = Path(__file__).parents[3] / "docs"
CONFIG = {
    "model_type": "spiral",
    "architectures": ["SpiralForCausalLM"],
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "n_prelude": 1,
    "n_core": 2,
    "n_coda": 1,
    "n_loops": 3,
    "hidden_act": "silu",
}


@pytest.fixture
def spiral(tmp_path, monkeypatch):
    """A checkpoint directory of a family made from the template, and its tensors."""
    text = (DOCS / "templates" / "family.py").read_text(encoding="utf-8")
    for old, new in (("mymodel", "spiral"), ("Mymodel", "Spiral"), ("MYMODEL", "SPIRAL")):
        text = text.replace(old, new)
    (tmp_path / "spiral.py").write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("spiral", tmp_path / "spiral.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, module.SPIRAL))
    cfg = LoopedTransformerConfig.from_dict(module.SPIRAL.config_fields(CONFIG, "config.json"))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        spec.key: torch.randn(spec.shape, generator=generator) * 0.2 + ("norm" in spec.key)
        for spec in module.SPIRAL.tensors(cfg)
    }
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, directory / "model.safetensors")
    return directory, tensors


def rms(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def rotated(x):
    """Half-split rotation of [batch, head, pos, 8] with base 10000."""
    angles = torch.outer(torch.arange(x.shape[2]).float(), 10000.0 ** -(torch.arange(4) / 4))
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :4], x[..., 4:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def layer(x, t, key):
    y = rms(x, t[f"{key}.input_layernorm.weight"])
    q, k, v = (
        F.linear(y, t[f"{key}.self_attn.{n}_proj.weight"]).unflatten(-1, (-1, 8)).transpose(1, 2)
        for n in "qkv"
    )
    k, v = rotated(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    z = F.scaled_dot_product_attention(rotated(q), k, v, is_causal=True)
    x = x + F.linear(z.transpose(1, 2).flatten(-2), t[f"{key}.self_attn.o_proj.weight"])
    y = rms(x, t[f"{key}.post_attention_layernorm.weight"])
    gate, up = (F.linear(y, t[f"{key}.mlp.{n}_proj.weight"]) for n in ("gate", "up"))
    return x + F.linear(F.silu(gate) * up, t[f"{key}.mlp.down_proj.weight"])


def test_the_template_loads_passes_its_checks_and_computes_what_it_says(spiral):
    directory, t = spiral
    report = check(directory)
    assert report.passed and report.family == "spiral"
    model = LoopedTransformer.from_pretrained_no_processing(directory)
    tokens = torch.randint(0, 50, (2, 9))
    e = layer(t["model.embed_tokens.weight"][tokens], t, "model.prelude.0")
    s = e
    for _ in range(3):
        s = s + e
        for i in range(2):
            s = layer(s, t, f"model.core.{i}")
    expected = F.linear(
        rms(layer(s, t, "model.coda.0"), t["model.norm.weight"]), t["lm_head.weight"]
    )
    with torch.no_grad():
        assert (model(tokens) - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_the_template_refuses_what_it_does_not_build(spiral):
    directory, _ = spiral
    for changes, message in (
        (dict(sliding_window=8), "'sliding_window' is 8"),
        (dict(hidden_act="gelu"), "'hidden_act' is 'gelu'"),
        (dict(num_attention_heads=5), "no multiple"),
    ):
        (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))
        with pytest.raises(CheckpointError, match=message):
            check(directory)


def test_the_document_names_every_numbered_line_and_runs(capsys):
    template = (DOCS / "templates" / "family.py").read_text(encoding="utf-8")
    text = (DOCS / "adding_a_family.md").read_text(encoding="utf-8")
    for number in range(1, 8):
        assert f"({number})" in template and f"\n{number}. " in text
    exec(text.split("```python\n")[1].split("```")[0], {})
    assert "x = s + e" in capsys.readouterr().out
    from tests.unit.model.test_check import CHECKS

    for name in ("stored tensors", *CHECKS):
        assert name in text
