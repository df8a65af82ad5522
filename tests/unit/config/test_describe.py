"""What a config says of itself decides what its model computes."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import (
    ARCHITECTURES,
    MECHANISMS,
    SIDE_BY_SIDE,
    STACKS,
    tiny_config,
    tiny_model,
    tiny_tokens,
)
from tl_loops import ConfigError, LoopedTransformerConfig
from tl_loops.config.checks import CHOICES, UNSUPPORTED
from tl_loops.config.fields import computing, setting_of
from tl_loops.config.ranges import range_of
from tl_loops.config.weights import physical_tensors
from tl_loops.upstream.config_fields import DETAILS_OF_THE_UNSUPPORTED

FIELDS = {field.name: field for field in dataclasses.fields(LoopedTransformerConfig)}
COMPUTING = [
    name
    for name in computing(LoopedTransformerConfig)
    if name not in {*UNSUPPORTED, *DETAILS_OF_THE_UNSUPPORTED}
]
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in (*ARCHITECTURES, *MECHANISMS, *STACKS, *SIDE_BY_SIDE)},
    "llama3": ("retrofitted", dict(use_NTK_by_parts_rope=True, NTK_original_ctx_len=32)),
    "loopformer": ("weightless", dict(n_prelude=0, time_conditioning=True)),
    "tmlt": ("weightless", dict(n_prelude=0, time_conditioning="iteration")),
    "loopus": ("ouro", dict(state_gate_rank=2, halt_head=True, norm_between_iterations=False)),
    "iquest": ("ouro", dict(first_pass_window=3)),
    "hrm": ("hrm_text", dict(n_extra_tokens=4, prefix_mask=False)),
    "trm": ("hrm_text", dict(shared_stacks=True)),
    "repeated layers": ("hrm_text", dict(n_core=4, layer_repeats=2)),
    "scaled": ("huginn", dict(rotary_scaling_factor=2.0, output_logits_soft_cap=20.0)),
    "orthogonal": ("olmo_grouped", dict(injection="orthogonal", initial_state="hashed_normal")),
    "own_norm": (
        "retrofitted",
        dict(norm_between_iterations=True, own_norm_between_iterations=True, injection_bias=True),
    ),
    "windowed": ("retrofitted", dict(kv_sharing="window:2")),
    "near": ("retrofitted", dict(attn_window=3, attn_window_layers=(0,))),
}
# Values of fields that are neither numbers nor one of a few names.
OTHERS: dict[str, list[Any]] = {
    "dtype": [torch.float32, torch.bfloat16, torch.float64],
    "stacks": [None, ("L", "H"), ("L", "L", "H"), ("a", "b")],
    "kv_sharing": [None, "first", "all", "window:1", "window:2"],
    "attn_window_layers": [None, (0,), (1,), (0, 1)],
}
# Numbers next to those that architectures have, so that texts that round are found out.
NUMBERS = [0.0, 1e-6, 1.00000001e-6, 1e-5, 0.01, 0.0100001, 0.02, 0.02000001, 0.5, 0.6, 1.0, 2.0]
NUMBERS += [2.00000001, 4.0, math.sqrt(8), 5.0, 5.00001, 8.0, 20.0, 10000.0, 10000.001]
INTEGERS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32, 48, 50, 64]


def base(name: str, **changes: Any) -> LoopedTransformerConfig:
    """The config of one of :data:`BASES`, changed."""
    architecture, first = BASES[name]
    return tiny_config(architecture, **{**first, **changes})


def values(name: str) -> list[Any]:
    """What a field may hold, from what it says itself."""
    field, own = FIELDS[name], setting_of(FIELDS[name])
    choices = own.choices if own is not None and own.choices else CHOICES.get(name)
    if name in OTHERS or choices:
        return [*(OTHERS.get(name) or choices or ())]
    if str(field.type) in ("bool", "<class 'bool'>"):
        return [True, False]
    allowed = range_of(field)
    assert allowed is not None, f"{name}: add its values to this test"
    numbers = INTEGERS if allowed.kind is int else NUMBERS
    return [*numbers, *([None] if "None" in str(field.type) else [])]


def changed(name: str, **changes: Any) -> LoopedTransformerConfig | None:
    """One of :data:`BASES`, changed; ``None`` where the changes do not go together."""
    try:
        return base(name, **changes)
    except ConfigError:
        return None


def computed(name: str, changes: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """The shapes of the weights of a model, and its logits for a few tokens."""
    architecture, first = BASES[name]
    model, tokens = tiny_model(architecture, **{**first, **changes}), tiny_tokens()
    torch.manual_seed(0)
    return {k: t.shape for k, t in physical_tensors(model.cfg).items()}, model(tokens)


@pytest.mark.parametrize("field", COMPUTING)
def test_every_field_that_changes_a_run_is_described(field):
    for name in BASES:
        before = base(name).describe()
        for value in values(field):
            cfg = changed(name, **{field: value})
            if cfg is not None and cfg.describe() != before:
                return
    pytest.fail(f"no architecture here says anything of {field}")


@settings(max_examples=60)
@given(st.sampled_from(sorted(BASES)), st.data())
def test_configs_that_compute_something_else_are_described_otherwise(name, data):
    fields = data.draw(st.lists(st.sampled_from(COMPUTING), min_size=1, max_size=2, unique=True))
    changes = {field: data.draw(st.sampled_from(values(field)), field) for field in fields}
    cfg = changed(name, **changes)
    if cfg is None or cfg.describe() != base(name).describe():
        return
    shapes, logits = computed(name, changes)
    expected_shapes, expected = computed(name, {})
    assert shapes == expected_shapes
    assert logits.dtype == expected.dtype and torch.equal(logits, expected)
