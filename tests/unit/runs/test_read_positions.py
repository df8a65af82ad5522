"""Logits only where they are read: the numbers stay, and the unembedding sees nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.closeness import assert_close
from tests.feedforward import plain_model
from tests.models import tiny_model
from tl_loops.attribution import attribution_patch, edge_attribution
from tl_loops.lens import coda_lens
from tl_loops.patching import (
    Site,
    ablate,
    activation_patch,
    patch_exit_gate,
    path_patch,
    transplant_states,
)

torch.set_num_threads(1)


def tokens(seed: int) -> Tensor:
    return torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("ouro", n_iterations=2)


@pytest.fixture(scope="module")
def cache(model) -> Any:
    return model.run_with_cache(torch.cat([tokens(0)[:, :3], tokens(1)[:, 3:]], 1))[1]


@contextmanager
def unembedded(model: Any) -> Iterator[list[int]]:
    """How many positions of a row each unembedding is asked for."""
    seen: list[int] = []
    handle = model.unembed.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    try:
        yield seen
    finally:
        handle.remove()


def logit(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -1, 4]).mean()


TOOLS = {
    "activation_patch": lambda m, c, metric, **o: activation_patch(
        m, tokens(0), c, metric, axes=("block", "pos"), progress=False, **o
    ),
    "ablate": lambda m, c, metric, **o: ablate(
        m, tokens(0), metric, axes=("block",), progress=False, **o
    ),
    "transplant_states": lambda m, c, metric, **o: transplant_states(
        m, tokens(0), c, metric, progress=False, **o
    ),
    "path_patch": lambda m, c, metric, **o: path_patch(
        m, tokens(0), c, metric, [Site("attn_out", 0, 0)], [Site("resid_pre", 1, 1)],
        progress=False, **o,
    ),
    "attribution_patch": lambda m, c, metric, **o: attribution_patch(
        m, tokens(0), c, metric, axes=("block", "pos"), **o
    ),
    "edge_attribution": lambda m, c, metric, **o: edge_attribution(
        m, tokens(0), c, metric, progress=False, **o
    ).scores,
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_the_last_position_alone_gives_the_same_numbers(tool, model, cache):
    whole = TOOLS[tool](model, cache, logit)
    with unembedded(model) as seen:
        part = TOOLS[tool](model, cache, logit, logits_at="last")
    assert seen and set(seen) == {1}
    assert_close(part, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at", [[2, 5], 4, torch.tensor([[0, 6], [3, 3]]), [-1]])
def test_positions_before_the_first_edit_keep_the_logits_of_the_base_run(at, model, cache):
    index = torch.as_tensor(at)
    index = (index.reshape(1, -1) if index.ndim < 2 else index).expand(2, -1) % 7

    def at_all(logits: Tensor) -> Tensor:
        return logits[torch.arange(2)[:, None], index, 3].square().sum()

    whole = TOOLS["activation_patch"](model, cache, at_all, batch_size=3)
    part = TOOLS["activation_patch"](
        model, cache, lambda logits: logits[..., 3].square().sum(), logits_at=at, batch_size=3
    )
    assert_close(part, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exits", [dict(exit_at=0), dict(exit_threshold=0.6), {"weighted": True}])
def test_exits_are_read_where_they_are_asked_for(exits, model, cache):
    exits = {"weighted_exit": True} if "weighted" in exits else exits
    call = TOOLS["activation_patch"]
    whole = call(model, cache, logit, **exits)
    assert_close(call(model, cache, logit, logits_at="last", **exits), whole, rtol=1e-5, atol=1e-6)


def test_the_last_real_token_of_padded_prompts(model, cache):
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 5:] = False

    def last(logits: Tensor) -> Tensor:
        return logits[0, 4, 3] + logits[1, 6, 3]

    call = TOOLS["activation_patch"]
    whole = call(model, cache, last, attention_mask=mask)
    part = call(
        model, cache, lambda logits: logits[:, 0, 3].sum(), attention_mask=mask, logits_at="last"
    )
    assert_close(part, whole, rtol=1e-5, atol=1e-6)


def test_a_plain_model_too(cache):
    plain = plain_model(
        n_layers=3, d_model=32, d_head=8, n_heads=4, d_mlp=48, d_vocab=50, n_ctx=64,
        act_fn="gelu", seed=0, device="cpu",
    )  # fmt: skip
    clean = plain.run_with_cache(tokens(1))[1]
    call = TOOLS["activation_patch"]
    part = call(plain, clean, logit, logits_at="last")
    assert_close(part, call(plain, clean, logit), rtol=1e-5, atol=1e-6)


def test_gradients_flow_through_what_is_read(model, cache):
    def gradient(**options: Any) -> Tensor:
        with torch.enable_grad():
            W = model.unembed.W_U
            grid = TOOLS["activation_patch"](model, cache, logit, gradients=True, **options)
            return torch.autograd.grad(grid.sum(), W)[0]

    assert_close(gradient(logits_at="last"), gradient(), rtol=1e-4, atol=1e-6)


def test_a_metric_of_the_gates_asks_for_no_logits(model, cache):
    with unembedded(model) as seen:
        patch_exit_gate(
            model, tokens(0), cache, lambda gates: gates[-1].mean(), axes=("block",), progress=False
        )
    assert seen and set(seen) == {0}


def test_a_lens_asks_for_the_positions_that_it_reads(model):
    whole = coda_lens(model, tokens(0), keep_logits=True)
    with unembedded(model) as seen:
        part = coda_lens(model, tokens(0), positions=[1, 4], keep_logits=True)
    assert set(seen) == {2}
    assert_close(part.logits, whole.logits[:, :, [1, 4]], rtol=1e-5, atol=1e-5)
    assert_close(part.final_logits, whole.final_logits[:, [1, 4]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("at", "message"),
    [(7, "span 7 to 7"), ([], "empty"), (torch.tensor([[1], [2], [3]]), r"expected .*\[2, read")],
)
def test_positions_that_there_are_not(at, message, model, cache):
    with pytest.raises(ValueError, match=message):
        TOOLS["activation_patch"](model, cache, logit, logits_at=at)
