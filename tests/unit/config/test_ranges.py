"""Unchecked fields: every number field out of its range is refused by name."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.models import SIZES, tiny_config, tiny_tokens
from tl_loops import ConfigError, LoopedTransformer, LoopedTransformerConfig
from tl_loops.config.ranges import MOST_BLOCKS, range_of

RANGES = {
    field.name: allowed
    for field in dataclasses.fields(LoopedTransformerConfig)
    if (allowed := range_of(field)) is not None
}
BOUNDED = {
    name: allowed
    for name, allowed in RANGES.items()
    if not (allowed.at_least is None and allowed.above is None and allowed.at_most is None)
}
NOT_NUMBERS = st.sampled_from(["1", "", [1], (1,), {}, 1j, True, False, b"1", object()])
NOT_FINITE = st.sampled_from([float("nan"), float("inf"), -float("inf"), 10**400, -(10**400)])
# Fields that are refused for another reason first, whatever they hold.
OFF = {"num_experts", "experts_per_token", "clip_qkv", "rotary_base_local", "n_devices"}


def build(**changes) -> LoopedTransformerConfig:
    return LoopedTransformerConfig(**{**SIZES, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        dict(rotary_dim=10),
        dict(rotary_dim=0),
        dict(rotary_base=0),
        dict(rotary_base=-1.0),
        dict(rotary_scaling_factor=0.0),
        dict(attn_scale=float("nan")),
        dict(attn_scale=0.0),
        dict(attn_scale=-2.0),
        dict(eps=-1),
        dict(eps=float("inf")),
        dict(n_ctx=0),
        dict(padded_vocab=99),
        dict(padded_vocab=0),
        dict(n_core=0),
        dict(n_prelude=-1),
        dict(d_model=0),
        dict(d_vocab=0),
        dict(d_head=0),
        dict(n_heads=-3),
        dict(initial_state_std=-0.1),
        dict(exit_threshold=1.5, exit_gate=True),
        dict(output_logits_soft_cap=-3.0),
        dict(d_model=10**18),
        dict(embed_scale=10**400),
        dict(seed=10**30),
        dict(d_model="48"),
        dict(n_iterations=2.0),
        dict(n_iterations=True),
        dict(embed_scale="1"),
    ],
)
def test_a_field_out_of_its_range_is_refused_by_name(changes):
    (name,) = (name for name in changes if name != "exit_gate")
    with pytest.raises(ConfigError, match=name):
        build(**changes)


@pytest.mark.parametrize("changes", [dict(n_iterations=10**9), dict(n_prelude=10**6)])
def test_unrolled_blocks_are_bounded(changes):
    with pytest.raises(ConfigError, match=f"at most {MOST_BLOCKS:,} are supported"):
        build(**changes)
    model = LoopedTransformer(tiny_config("ouro"))
    tokens = tiny_tokens()
    before = model(tokens)
    with pytest.raises(ConfigError, match="unrolled blocks"):
        model(tokens, n_iterations=10**9)
    assert model.cfg.n_iterations == 4 and torch.equal(model(tokens), before)


def test_frequency_bounds_the_wrong_way_round_are_refused():
    with pytest.raises(ConfigError, match=r"NTK_by_parts_high_freq_factor=1\.0 must be above"):
        build(use_NTK_by_parts_rope=True, NTK_by_parts_high_freq_factor=1.0)


@given(st.sampled_from(sorted(set(RANGES) - OFF)), NOT_NUMBERS | NOT_FINITE)
def test_what_is_no_number_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        build(**{name: value})


@given(st.sampled_from(sorted(BOUNDED)), st.data())
def test_a_number_out_of_its_bounds_is_refused_by_name(name, data):
    allowed = BOUNDED[name]
    low = allowed.at_least if allowed.at_least is not None else allowed.above
    drawn = []
    if low is not None:
        if allowed.kind is int:
            drawn.append(st.integers(-(2**70), low - 1))
        else:
            drawn.append(st.floats(max_value=low, exclude_max=allowed.above is None))
    if allowed.at_most is not None:
        drawn.append(st.integers(allowed.at_most + 1, 2**70))
    value = data.draw(st.one_of(drawn))
    if value == allowed.unset or (value == low and allowed.above is None):
        return
    with pytest.raises(ConfigError, match=name):
        build(**{"exit_gate": True, name: value})


@given(st.sampled_from(sorted(set(RANGES) - OFF)), st.integers() | st.floats())
def test_any_number_gives_a_config_or_a_config_error(name, value):
    try:
        cfg = build(**{name: value})
    except ConfigError:
        return
    assert LoopedTransformerConfig.from_dict(cfg.to_dict()).to_dict() == cfg.to_dict()


def test_numbers_of_numpy_become_pythons():
    cfg = build(n_iterations=np.int64(3), embed_scale=np.float32(2.0), eps=np.float64(1e-6))
    assert type(cfg.n_iterations) is int and cfg.n_iterations == 3
    assert type(cfg.embed_scale) is float and type(cfg.eps) is float
