"""The halting gate: logits, probing, patching and forced exits."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.closeness import assert_close
from tests.models import tiny_model, tiny_tokens
from tl_loops.errors import LoopedSemanticsError
from tl_loops.patching import (
    exit_gate_logits,
    force_exit,
    patch_exit_gate,
    probe_exit_gate,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("ouro", n_iterations=3)


def close(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_gate_logits_are_those_of_the_hook_points(model):
    tokens = tiny_tokens(2, 4)
    _, cache = model.run_with_cache(tokens)
    expected = torch.stack([cache[f"iter.{t}.hook_exit_gate"][..., 0] for t in range(3)])
    close(exit_gate_logits(model, tokens), expected)
    assert expected.std() > 1e-2


@torch.no_grad()
def test_the_probe_ends_at_the_gates_own_logit(model):
    tokens = tiny_tokens(2, 4)
    _, cache = model.run_with_cache(tokens)
    probe = probe_exit_gate(model, cache)
    assert probe.shape == (3, model.cfg.n_core, 2, 4)
    close(probe[:, -1], exit_gate_logits(model, tokens))
    before = probe_exit_gate(model, cache, "resid_pre")
    close(before[:, 1:], probe[:, :-1])
    _, flat = model.run_with_cache(tokens[:1], remove_batch_dim=True)
    close(probe_exit_gate(model, flat), probe[:, :, :1])


@torch.no_grad()
@pytest.mark.parametrize(
    ("activation", "axes"),
    [
        ("resid_post", ("block", "pos")),
        ("z", ("iteration", "layer")),
        ("state_out", ("iteration",)),
    ],
)
@pytest.mark.parametrize("batch_size", [4, None])
def test_patches_scored_by_the_gate(model, activation, axes, batch_size):
    clean, corrupted = tiny_tokens(2, 4), tiny_tokens(2, 4, seed=9)
    corrupted[:, :1] = clean[:, :1]
    _, cache = model.run_with_cache(clean)

    gate_names = [f"iter.{t}.hook_exit_gate" for t in range(3)]

    def metric(gates: Tensor) -> Tensor:
        return (gates[0, :, -1] - gates[1, :, 2] + gates[2, :, -1] + gates[2, :, 0]).mean()

    found = patch_exit_gate(
        model, corrupted, cache, metric, activation, axes, batch_size, progress=False
    )
    for index in itertools.product(*map(range, found.shape)):
        at = dict(zip(axes, index, strict=True))
        if "block" in at:
            name = f"blocks.{at['block']}.hook_{activation}"
        else:
            name = model.layout.hook_name(activation, **{k: at[k] for k in at if k != "pos"})

        pos = at.get("pos", slice(None))

        def hook(value: Tensor, hook: Any, pos: Any = pos) -> Tensor:
            value = value.clone()
            value[:, pos] = cache[hook.name][:, pos]
            return value

        with model.hooks(fwd_hooks=[(name, hook)]):
            _, run = model.run_with_cache(corrupted, names_filter=gate_names)
        gates = torch.stack([run[gate][..., 0] for gate in gate_names])
        close(found[index], metric(gates))
    assert found.std() > 1e-4


@torch.no_grad()
def test_forced_exits(model):
    tokens = tiny_tokens(2, 4)
    for t in range(3):
        hooks = force_exit(model, t)
        for arguments in (dict(exit_threshold=0.5), dict(weighted_exit=True)):
            found = model.run_with_hooks(tokens, fwd_hooks=hooks, **arguments)
            close(found, model(tokens, exit_at=t))
    part = model.run_with_hooks(
        tokens, fwd_hooks=force_exit(model, -3, positions=[1, 2]), exit_threshold=1.0
    )
    close(part[:, [1, 2]], model(tokens, exit_at=0)[:, [1, 2]])
    close(part[:, [0, 3]], model(tokens, exit_threshold=1.0)[:, [0, 3]])


@torch.no_grad()
def test_models_without_a_gate_are_refused(model):
    gateless = tiny_model("retrofitted", n_iterations=2)
    tokens = tiny_tokens(1, 3)
    _, cache = gateless.run_with_cache(tokens)
    for call in (
        lambda: exit_gate_logits(gateless, tokens),
        lambda: probe_exit_gate(gateless, cache),
        lambda: patch_exit_gate(gateless, tokens, cache, lambda x: x.mean()),
        lambda: force_exit(gateless, 0),
    ):
        with pytest.raises(LoopedSemanticsError, match="no exit gate"):
            call()
    with pytest.raises(IndexError, match="no iteration 3"):
        force_exit(model, 3)
    _, gated = model.run_with_cache(tokens)
    with pytest.raises(ValueError, match="activation must be"):
        probe_exit_gate(model, gated, "z")
    with pytest.raises(ValueError, match=r"halting logits.*\[3, 1, 3\].*scalar"):
        patch_exit_gate(model, tokens, gated, lambda gates: gates[0])
