"""Autoencoders in the place of an activation: closed forms, and what SAELens's formulas say."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.closeness import assert_close
from tests.feedforward import plain_model
from tests.models import tiny_model, tiny_tokens
from tl_loops import loop_hooks
from tl_loops.patching import splice, splice_hooks

torch.set_num_threads(1)


class Identity:
    def encode(self, x):
        return x

    def decode(self, features):
        return features


class Zero(Identity):
    def decode(self, features):
        return torch.zeros_like(features)


class Linear(nn.Module):
    """A random bottleneck, in a dtype of its own."""

    def __init__(self, width: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        draw = torch.randn(width, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
        self.weight = nn.Parameter(torch.linalg.qr(draw).Q)

    def encode(self, x):
        return x @ self.weight

    def decode(self, features):
        return features @ self.weight.T


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("huginn", n_iterations=3)


PROMPTS = [*tiny_tokens(2, 6), *tiny_tokens(1, 4, seed=5)]
EVERY = ["iter.0.1.hook_resid_post", "iter.1.hook_state_out", "iter.2.0.hook_mlp_out"]


def spliced(model, autoencoder, names=EVERY, **options):
    return splice(model, PROMPTS, autoencoder, names, progress=False, **options)


@pytest.mark.parametrize("name", ["huginn", "olmo_grouped", "layer_norm"])
def test_a_perfect_autoencoder_recovers_all_and_zeros_recover_nothing(name):
    model = tiny_model(name, n_iterations=3)
    for rest in ("resid_post", "q", "state_out"):
        names = loop_hooks.every_iteration(model, rest, *([0] if rest != "state_out" else []))
        perfect, zero = spliced(model, Identity(), names), spliced(model, Zero(), names)
        assert torch.equal(perfect.recovered_loss, torch.ones(3).double())
        assert torch.equal(perfect.explained_variance, torch.ones(3).double())
        assert torch.equal(zero.recovered_loss, torch.zeros(3).double())
        assert perfect.n_tokens == 13 and (perfect.spliced_loss == perfect.loss).all()
        assert torch.equal(zero.spliced_loss, perfect.zero_loss)


@torch.no_grad()
@pytest.mark.parametrize("first_pos", [0, 2])
@pytest.mark.parametrize("loss_on", ["all", "last"])
def test_numbers_are_those_of_whole_runs(model, first_pos, loss_on):
    code = Linear(model.cfg.d_model)
    found = spliced(model, code, first_pos=first_pos, loss_on=loss_on, batch_size=1)

    def mean_loss(hooks):
        losses = []
        for row in PROMPTS:
            logits = model.run_with_hooks(row[None], fwd_hooks=hooks)[0, :-1]
            each = F.cross_entropy(logits.double(), row[1:], reduction="none")
            losses.append(each[-1:] if loss_on == "last" else each)
        return torch.cat(losses).mean()

    assert_close(torch.tensor(found.loss), mean_loss([]).float(), rtol=1e-6, atol=0)
    for k, name in enumerate(EVERY):
        caches = [model.run_with_cache(row[None], names_filter=[name])[1] for row in PROMPTS]
        x = torch.cat([cache[name][0, first_pos:] for cache in caches]).double()
        left = x - code.decode(code.encode(x.float())).double()
        expected = 1 - left.square().sum() / (x - x.mean(0)).square().sum()
        assert_close(found.explained_variance[k], expected, rtol=1e-5, atol=1e-7)
        hooks = splice_hooks(code, name, first_pos)
        assert_close(found.spliced_loss[k], mean_loss(hooks), rtol=1e-6, atol=0)
    recovered = (found.zero_loss - found.spliced_loss) / (found.zero_loss - found.loss)
    assert torch.equal(found.recovered_loss, recovered) and found.to_frame().shape == (3, 6)
    assert found.names == tuple(model.hook_name(name) for name in EVERY)
    assert found.labels == ("r0.1", "iter.1.hook_state_out", "r2.0")


def test_batches_do_not_matter(model):
    one, all_together = (spliced(model, Linear(model.cfg.d_model), batch_size=n) for n in (1, 8))
    assert_close(one.recovered_loss, all_together.recovered_loss, rtol=1e-4, atol=1e-6)
    assert_close(one.explained_variance, all_together.explained_variance, rtol=1e-5, atol=1e-7)


def test_the_model_stays_as_it_was_and_keeps_no_graph(model):
    tokens = tiny_tokens()
    before = model(tokens)
    found = spliced(model, Linear(model.cfg.d_model))
    assert not found.spliced_loss.requires_grad
    assert torch.equal(model(tokens), before)


def test_gradients_reach_the_autoencoder(model):
    code = Linear(model.cfg.d_model)
    logits = model.run_with_hooks(tiny_tokens(), fwd_hooks=splice_hooks(code, EVERY))
    logits.square().mean().backward()
    assert code.weight.grad.norm() > 0


def test_it_runs_in_its_own_dtype(model):
    code = Linear(model.cfg.d_model, torch.float64)
    assert spliced(model, code).spliced_loss.isfinite().all()
    logits = model.run_with_hooks(tiny_tokens(), fwd_hooks=splice_hooks(code, EVERY[:1]))
    assert logits.dtype == torch.float32


def test_a_model_without_a_loop():
    model = plain_model(
        n_layers=2, d_model=12, d_head=6, n_heads=2, n_ctx=16, d_vocab=50, seed=0, act_fn="gelu"
    )
    found = spliced(model, Identity(), "blocks.0.hook_resid_post")
    assert found.recovered_loss.tolist() == [1.0]
    assert found.labels == found.names == ("blocks.0.hook_resid_post",)


def test_what_does_not_vary_has_no_explained_variance(model):
    same = [PROMPTS[0][:1].repeat(2)]
    found = splice(model, same, Identity(), "hook_embed", progress=False)
    assert found.explained_variance.isnan().all()


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (nn.Linear(3, 3), {}, "no method 'encode'"),
        (Identity(), {"names": []}, "names is empty"),
        (Identity(), {"names": "iter.9.0.hook_resid_post"}, "iter.9.0"),
        (Identity(), {"names": "iter.1.0.hook_resid_pst"}, "did you mean"),
        (Identity(), {"names": "iter.1.0.attn.hook_pattern"}, "axis 1 is pos"),
        (Identity(), {"names": "blocks.0.hook_mlp_in"}, "does not fire"),
        (Identity(), {"first_pos": -1}, "counts positions from 0"),
        (Identity(), {"first_pos": 5}, "at least 6"),
        (Identity(), {"batch_size": 0}, "batch_size"),
        (Identity(), {"loss_on": "first"}, "loss_on"),
    ],
)
def test_what_cannot_be_spliced(model, given, options, message):
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        spliced(model, given, **{"names": EVERY, **options})


def test_a_reconstruction_of_another_shape(model):
    class Wide(Identity):
        def decode(self, features):
            return torch.cat([features, features], -1)

    with pytest.raises(ValueError, match=r"decode\(encode\(x\)\)"):
        spliced(model, Wide())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
