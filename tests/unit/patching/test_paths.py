"""Path patching: three runs by hand, and what must hold on any path."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import tiny_model, tiny_tokens
from tl_loops.patching import Site, activation_patch, path_patch

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {n: tiny_model(n, n_iterations=2) for n in ("retrofitted", "ouro", "huginn")}


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -2, 5]).mean()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def by_hand(
    model: Any,
    corrupted: Tensor,
    clean: Any,
    base: Any,
    sender: tuple[str, Any],
    receiver: tuple[str, Any],
    frozen: list[str],
) -> Tensor:
    """The definition: a run with the sender patched and outputs frozen, then the receiver's."""
    caught: dict[str, Tensor] = {}

    def send(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[sender[1]] = clean[sender[0]][sender[1]]
        return value

    def catch(value: Tensor, hook: Any) -> None:
        caught["value"] = value.clone()

    def freeze(value: Tensor, hook: Any) -> Tensor:
        return base[hook.name].clone()

    def receive(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[receiver[1]] = caught["value"][receiver[1]]
        return value

    hooks = [(sender[0], send), (receiver[0], catch), *[(name, freeze) for name in frozen]]
    model.run_with_hooks(corrupted, fwd_hooks=hooks)
    return metric(model.run_with_hooks(corrupted, fwd_hooks=[(receiver[0], receive)]))


def outputs(model: Any, without: tuple[str, ...] = (), names: tuple[str, ...] = ("attn", "mlp")):
    every = [f"blocks.{i}.hook_{n}_out" for i in range(model.cfg.n_layers) for n in names]
    return [name for name in every if name not in without]


ALL = (slice(None), slice(None))


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["retrofitted", "ouro", "huginn"])
@pytest.mark.parametrize("batch_size", [1, None])
def test_pairs_of_heads_and_layers(models, architecture, batch_size):
    model = models[architecture]
    layout = model.layout
    clean_tokens, corrupted = tiny_tokens(2, 4), tiny_tokens(2, 4, seed=9)
    _, clean = model.run_with_cache(clean_tokens)
    _, base = model.run_with_cache(corrupted)
    senders = [
        Site("z", iteration=0, layer=1, head=2),
        Site("mlp_out", iteration=0, layer=0),
        Site("attn_out", iteration=1, layer=0, pos=2),
        Site("state_out", iteration=0, pos=[1, 2]),
    ]
    receivers = [
        Site("resid_pre", iteration=1, layer=1),
        Site("q", iteration=1, layer=1, head=0),
        Site("injected", iteration=1),
        Site("attn_out", iteration=1, layer=1),
    ]
    found = path_patch(
        model, corrupted, clean, metric, senders, receivers, batch_size=batch_size, progress=False
    )

    def name(site: Site) -> str:
        return layout.hook_name(site.activation, iteration=site.iteration, layer=site.layer)

    sending = [
        (
            name(senders[0]),
            (*ALL, 2),
            (f"blocks.{layout.index(iteration=0, layer=1)}.hook_attn_out",),
        ),
        (name(senders[1]), ALL, (name(senders[1]),)),
        (name(senders[2]), (slice(None), 2), (name(senders[2]),)),
        (name(senders[3]), (slice(None), [1, 2]), ()),
    ]
    receiving = [(name(r), (*ALL, 0) if r.head is not None else ALL) for r in receivers]
    for i, (point, index, own) in enumerate(sending):
        frozen = outputs(model, own)
        for j, receiver in enumerate(receiving):
            expected = by_hand(model, corrupted, clean, base, (point, index), receiver, frozen)
            close(found[i, j], expected)
    assert (found - metric(model(corrupted))).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_senders_and_receivers_at_positions(models, batch_size):
    model = models["huginn"]
    clean_tokens, corrupted = tiny_tokens(1, 8), tiny_tokens(1, 8, seed=9)
    _, clean = model.run_with_cache(clean_tokens)
    _, base = model.run_with_cache(corrupted)
    senders = [Site("mlp_out", block=2, pos=3), Site("mlp_out", block=2, pos=0)]
    receivers = [Site("resid_pre", block=4), Site("v", block=4, pos=2), Site("v", block=4)]
    found = path_patch(
        model, corrupted, clean, metric, senders, receivers, batch_size=batch_size, progress=False
    )
    frozen = outputs(model, ("blocks.2.hook_mlp_out",))
    receiving = [
        ("blocks.4.hook_resid_pre", ALL),
        ("blocks.4.attn.hook_v", (slice(None), 2)),
        ("blocks.4.attn.hook_v", ALL),
    ]
    for i, pos in enumerate((3, 0)):
        sender = ("blocks.2.hook_mlp_out", (slice(None), pos))
        for j, receiver in enumerate(receiving):
            close(found[i, j], by_hand(model, corrupted, clean, base, sender, receiver, frozen))


@torch.no_grad()
def test_mlps_may_pass_effects_on(models):
    model = models["retrofitted"]
    clean_tokens, corrupted = tiny_tokens(2, 4), tiny_tokens(2, 4, seed=9)
    _, clean = model.run_with_cache(clean_tokens)
    _, base = model.run_with_cache(corrupted)
    sender, receiver = Site("z", block=1, head=0), Site("k", block=4, head=1)
    found = path_patch(
        model, corrupted, clean, metric, [sender], [receiver], freeze=("attn_out",), progress=False
    )
    frozen = outputs(model, ("blocks.1.hook_attn_out",), ("attn",))
    expected = by_hand(
        model,
        corrupted,
        clean,
        base,
        ("blocks.1.attn.hook_z", (*ALL, 0)),
        ("blocks.4.attn.hook_k", (*ALL, 1)),
        frozen,
    )
    close(found[0, 0], expected)


@torch.no_grad()
def test_nothing_reaches_back(models):
    model = models["huginn"]
    clean_tokens, corrupted = tiny_tokens(2, 4), tiny_tokens(2, 4, seed=9)
    _, clean = model.run_with_cache(clean_tokens)
    found = path_patch(
        model,
        corrupted,
        clean,
        metric,
        [Site("attn_out", iteration=1, layer=0)],
        [Site("resid_pre", iteration=0, layer=1)],
        progress=False,
    )
    close(found[0, 0], metric(model(corrupted)))


@torch.no_grad()
def test_a_sender_that_is_its_own_receiver_is_activation_patching(models):
    model = models["ouro"]
    clean_tokens, corrupted = tiny_tokens(2, 4), tiny_tokens(2, 4, seed=9)
    _, clean = model.run_with_cache(clean_tokens)
    sites = [Site("resid_post", iteration=t, layer=i) for t in range(2) for i in range(3)]
    found = path_patch(model, corrupted, clean, metric, sites, sites, progress=False).diagonal()
    expected = activation_patch(
        model, corrupted, clean, metric, "resid_post", ("iteration", "layer"), progress=False
    )
    close(found, expected.flatten())


@torch.no_grad()
def test_all_paths_out_of_a_sender_are_its_whole_effect(models):
    """With nothing frozen, the path into the last stream is the effect of the sender."""
    model = models["retrofitted"]
    clean_tokens, corrupted = tiny_tokens(2, 4), tiny_tokens(2, 4, seed=9)
    _, clean = model.run_with_cache(clean_tokens)
    found = path_patch(
        model,
        corrupted,
        clean,
        metric,
        [[Site("z", block=2, head=h) for h in (0, 3)]],
        [Site("resid_post", block=model.cfg.n_layers - 1)],
        freeze=(),
        progress=False,
    )
    expected = activation_patch(
        model, corrupted, clean, metric, "z", (), progress=False, where={"block": 2, "head": [0, 3]}
    )
    close(found[0, 0], expected)


@torch.no_grad()
def test_receivers_in_a_group_are_patched_together(models):
    model = models["retrofitted"]
    clean_tokens, corrupted = tiny_tokens(2, 4), tiny_tokens(2, 4, seed=9)
    _, clean = model.run_with_cache(clean_tokens)
    parts = ("q", "k", "v")
    group = [Site(part, block=4) for part in parts]
    found = path_patch(
        model,
        corrupted,
        clean,
        metric,
        [Site("attn_out", block=2)],
        [group, Site("attn_out", block=4)],
        progress=False,
    )
    # Queries, keys and values are all that attention reads.
    close(found[0, 0], found[0, 1])


def test_gradients_pass_both_runs(models):
    model = models["retrofitted"]
    clean_tokens, corrupted = tiny_tokens(1, 3), tiny_tokens(1, 3, seed=9)
    with torch.no_grad():
        _, clean = model.run_with_cache(clean_tokens)
    name = "blocks.1.hook_attn_out"
    given = {name: clean[name].clone().requires_grad_()}
    sender, receiver = Site("attn_out", block=1), Site("resid_pre", block=4)
    path_patch(
        model, corrupted, given, metric, [sender], [receiver], progress=False, gradients=True
    ).sum().backward()
    gradient = given[name].grad
    assert gradient is not None
    step = 1e-2 * torch.randn(given[name].shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ends = [
            path_patch(
                model,
                corrupted,
                {name: clean[name] + sign * step},
                metric,
                [sender],
                [receiver],
                progress=False,
            )
            for sign in (1, -1)
        ]
    torch.testing.assert_close(
        (gradient * step).sum(), (ends[0] - ends[1]).sum() / 2, atol=1e-4, rtol=1e-2
    )
    model.zero_grad()


@torch.no_grad()
def test_bad_paths_are_refused(models):
    model = models["retrofitted"]
    tokens = tiny_tokens(2, 4)
    _, clean = model.run_with_cache(tokens)
    site = Site("resid_pre", block=1)
    with pytest.raises(ValueError, match="at least one"):
        path_patch(model, tokens, clean, metric, [], [site])
    with pytest.raises(ValueError, match="freeze"):
        path_patch(model, tokens, clean, metric, [site], [site], freeze=("pattern",))
    with pytest.raises(IndexError, match="no iteration 2"):
        path_patch(model, tokens, clean, metric, [Site("z", iteration=2)], [site])
    with pytest.raises(ValueError, match="no axis 'head'"):
        path_patch(model, tokens, clean, metric, [Site("resid_pre", block=1, head=1)], [site])
    with pytest.raises(ValueError, match="scalar"):
        path_patch(model, tokens, clean, lambda x: x, [site], [site])
