"""Ablation: values put in, and massive activations at the block that makes them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.closeness import assert_close
from tests.models import padded_tokens, tiny_model, tiny_tokens
from tl_loops.patching import (
    MassiveSite,
    ablate,
    ablate_massive,
    activation_patch,
    find_massive_sites,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("olmo_grouped", n_iterations=2)


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -2, 5]).mean()


def run_with(model: Any, tokens: Tensor, name: str, change: Any) -> Tensor:
    def hook(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        change(value)
        return value

    return metric(model.run_with_hooks(tokens, fwd_hooks=[(name, hook)]))


def close(found: Any, expected: Any) -> None:
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_zero_ablation_of_heads(model):
    tokens = tiny_tokens(2, 4)
    found = ablate(model, tokens, metric, "z", ("block", "head"), progress=False)
    for block in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            name = f"blocks.{block}.attn.hook_z"
            close(
                found[block, head],
                run_with(model, tokens, name, lambda z, h=head: z[:, :, h].zero_()),
            )


@torch.no_grad()
@pytest.mark.parametrize("activation", ["resid_mid", "v", "pattern", "mlp_out", "state_out"])
def test_zero_ablation_of_everything_else(model, activation):
    tokens = tiny_tokens(2, 4)
    found = ablate(model, tokens, metric, activation, ("iteration",), progress=False)
    for t in range(model.cfg.n_iterations):

        def zero(value: Tensor, hook: Any) -> Tensor:
            return torch.zeros_like(value)

        layers = [None] if activation == "state_out" else range(model.cfg.n_core)
        names = [model.layout.hook_name(activation, iteration=t, layer=i) for i in layers]
        expected = metric(model.run_with_hooks(tokens, fwd_hooks=[(n, zero) for n in names]))
        close(found[t], expected)


@torch.no_grad()
def test_mean_ablation(model):
    tokens, others = tiny_tokens(2, 4), tiny_tokens(5, 4, seed=8)
    _, reference = model.run_with_cache(others)
    found = ablate(
        model, tokens, metric, "attn_out", ("block", "pos"), "mean", reference, progress=False
    )
    over_positions = ablate(
        model,
        tokens,
        metric,
        "attn_out",
        ("block",),
        "mean",
        reference,
        mean_over="batch_pos",
        progress=False,
    )
    for block in range(model.cfg.n_layers):
        name = f"blocks.{block}.hook_attn_out"
        mean = reference[name].mean(0)
        for pos in range(4):
            expected = run_with(
                model, tokens, name, lambda x, p=pos, m=mean: x[:, p].copy_(m[p].expand_as(x[:, p]))
            )
            close(found[block, pos], expected)
        everywhere = mean.mean(0)
        close(
            over_positions[block],
            run_with(model, tokens, name, lambda x, m=everywhere: x.copy_(m.expand_as(x))),
        )


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_averages_of_reference_prompts_leave_padding_out(model, side):
    tokens, (others, mask) = tiny_tokens(2, 5), padded_tokens((5, 3, 2), side)
    _, reference = model.run_with_cache(others, attention_mask=mask)
    name, real = "blocks.1.hook_attn_out", mask.bool()

    def of(mean_over):
        where = {"block": 1}
        axes = ("pos",) if mean_over == "batch" else ("block",)
        return ablate(
            model, tokens, metric, "attn_out", axes, "mean", reference,
            mean_over=mean_over, where=where, progress=False,
        )  # fmt: skip

    found = of("batch")
    for pos in range(5):
        mean = reference[name][real[:, pos], pos].mean(0)
        expected = run_with(
            model, tokens, name, lambda x, p=pos, m=mean: x[:, p].copy_(m.expand_as(x[:, p]))
        )
        close(found[pos], expected)
    everywhere = reference[name][real].mean(0)
    expected = run_with(model, tokens, name, lambda x: x.copy_(everywhere.expand_as(x)))
    close(of("batch_pos").squeeze(), expected)
    assert not torch.allclose(reference[name].mean((0, 1)), everywhere, atol=1e-4)


@torch.no_grad()
def test_mean_over_positions_takes_other_lengths(model):
    tokens, others = tiny_tokens(2, 4), tiny_tokens(3, 9, seed=8)
    _, reference = model.run_with_cache(others)
    found = ablate(
        model,
        tokens,
        metric,
        "z",
        ("head",),
        "mean",
        reference,
        mean_over="batch_pos",
        progress=False,
        where={"block": 1},
    )
    mean = reference["blocks.1.attn.hook_z"].mean((0, 1))
    name = "blocks.1.attn.hook_z"
    for head in range(4):
        expected = run_with(
            model, tokens, name, lambda z, h=head: z[:, :, h].copy_(mean[h].expand_as(z[:, :, h]))
        )
        close(found[head], expected)
    with pytest.raises(ValueError, match="positions"):
        ablate(model, tokens, metric, "z", ("head",), "mean", reference, progress=False)


@torch.no_grad()
def test_resampling_draws_one_reference_prompt_for_each_prompt(model):
    tokens, others = tiny_tokens(3, 4), tiny_tokens(6, 4, seed=8)
    _, reference = model.run_with_cache(others)
    arguments: Any = dict(axes=("block",), progress=False)
    found, again, other = (
        ablate(
            model,
            tokens,
            metric,
            "mlp_out",
            method="resample",
            reference=reference,
            seed=seed,
            **arguments,
        )
        for seed in (5, 5, 6)
    )
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
    drawn = torch.randint(6, (3,), generator=torch.Generator().manual_seed(5))
    cache = {name: value[drawn] for name, value in reference.items()}
    close(found, activation_patch(model, tokens, cache, metric, "mlp_out", **arguments))


@torch.no_grad()
def test_bad_ablations_are_refused(model):
    tokens = tiny_tokens(2, 4)
    _, reference = model.run_with_cache(tokens)
    with pytest.raises(ValueError, match="method must be"):
        ablate(model, tokens, metric, method="noise", progress=False)
    with pytest.raises(ValueError, match="needs reference"):
        ablate(model, tokens, metric, method="mean", progress=False)
    with pytest.raises(ValueError, match="needs none"):
        ablate(model, tokens, metric, reference=reference, progress=False)
    with pytest.raises(ValueError, match="no meaning for patterns"):
        ablate(
            model,
            tokens,
            metric,
            "pattern",
            ("head",),
            "mean",
            reference,
            mean_over="batch_pos",
            progress=False,
        )


@pytest.fixture(scope="module")
def massive() -> Any:
    """A model whose core layer 0 writes one dimension of the stream far too strongly."""
    model = tiny_model("retrofitted", n_iterations=2)
    with torch.no_grad():
        model.blocks[1].mlp.W_out[:, 11] *= 400
    return model


@torch.no_grad()
def test_massive_activations_are_found_where_they_appear(massive):
    tokens = tiny_tokens(2, 4)
    _, cache = massive.run_with_cache(tokens)
    sites = find_massive_sites(massive, tokens, magnitude=60, ratio=50)
    assert sites
    first = min(site.block for site in sites)
    assert first == 1
    assert {site.dim for site in sites if site.block == 1} == {11}
    for site in sites:
        out = cache[f"blocks.{site.block}.hook_resid_post"]
        assert site.value == pytest.approx(out[site.row, site.pos, site.dim].item(), rel=1e-4)
        assert site.label == massive.layout.label(site.block)
        before = cache[f"blocks.{site.block}.hook_resid_pre"][site.row]
        value = before[site.pos, site.dim].abs()
        assert value <= 60 or value < 50 * before.abs().median()


@torch.no_grad()
@pytest.mark.parametrize("method", ["zero", "mean", "mlp_pos", "mlp"])
def test_massive_activations_are_taken_away(massive, method):
    tokens = tiny_tokens(2, 4)
    sites = find_massive_sites(massive, tokens, magnitude=60, ratio=50)[:3]
    _, cache = massive.run_with_cache(tokens)

    def change(site: MassiveSite, value: Tensor) -> None:
        if method == "zero":
            value[site.row, site.pos, site.dim] = 0
        elif method == "mean":
            name = f"blocks.{site.block}.hook_resid_post"
            value[site.row, site.pos, site.dim] = cache[name][:, site.pos, site.dim].mean()
        elif method == "mlp_pos":
            value[site.row, site.pos] = 0
        else:
            value[site.row] = 0

    found = ablate_massive(massive, tokens, metric, sites, method, progress=False)
    point = "hook_mlp_out" if method.startswith("mlp") else "hook_resid_post"
    for score, site in zip(found, sites, strict=True):
        name = f"blocks.{site.block}.{point}"
        close(score, run_with(massive, tokens, name, lambda x, s=site: change(s, x)))
    assert found.shape == (len(sites),)
    assert (found - metric(massive(tokens))).abs().max() > 1e-3
    same_block = [site for site in sites if site.block == sites[0].block]
    together = ablate_massive(
        massive, tokens, metric, same_block, method, together=True, progress=False
    )

    def change_all(value: Tensor) -> None:
        for site in same_block:
            change(site, value)

    close(together[0], run_with(massive, tokens, f"blocks.{sites[0].block}.{point}", change_all))


@torch.no_grad()
def test_bad_sites_are_refused(massive):
    tokens = tiny_tokens(2, 4)
    site = MassiveSite(1, "r0.0", 0, 2, 11, 300.0)
    with pytest.raises(ValueError, match="no sites"):
        ablate_massive(massive, tokens, metric, [])
    with pytest.raises(ValueError, match="method"):
        ablate_massive(massive, tokens, metric, [site], "median")
    with pytest.raises(ValueError, match="not in prompts"):
        ablate_massive(massive, tokens[:, :2], metric, [site])
    embedded = MassiveSite(-1, "embed", 0, 2, 11, 300.0)
    with pytest.raises(ValueError, match="embedding"):
        ablate_massive(massive, tokens, metric, [embedded], "mlp")
    close(
        ablate_massive(massive, tokens, metric, [embedded], progress=False)[0],
        run_with(
            massive, tokens, "blocks.0.hook_resid_pre", lambda x: x[0, 2].__setitem__(11, 0.0)
        ),
    )
