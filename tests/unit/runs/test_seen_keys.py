"""Patterns of another run that look at what this one does not see."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.closeness import assert_close
from tests.models import tiny_model, tiny_tokens
from tl_loops.attribution import attribution_patch
from tl_loops.patching import Site, ablate, activation_patch, path_patch, transplant_sites

TOKENS, OTHERS = tiny_tokens(1, 5), tiny_tokens(1, 5, seed=9)
PADDED = torch.tensor([[0, 0, 1, 1, 1]])


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -1, 5]).mean()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("olmo_grouped", n_iterations=2)


@pytest.fixture(scope="module")
def whole(model) -> Any:
    with torch.no_grad():
        return model.run_with_cache(TOKENS)[1]


PUT_IN = {
    "activation_patch": lambda model, cache, name, **given: activation_patch(
        model, OTHERS, cache, metric, name, ("block",), progress=False, **given
    ),
    "ablate": lambda model, cache, name, **given: ablate(
        model, OTHERS, metric, name, ("block",), "paired", cache, progress=False, **given
    ),
    "path_patch": lambda model, cache, name, **given: path_patch(
        model, OTHERS, cache, metric, [Site(name, block=1)], ["logits"], progress=False, **given
    ),
    "transplant_sites": lambda model, cache, name, **given: transplant_sites(
        model, OTHERS, cache, metric, [Site(name, block=1)], progress=False, **given
    ),
    "attribution_patch": lambda model, cache, name, **given: attribution_patch(
        model, OTHERS, cache, metric, name, ("block",), **given
    ),
}


@pytest.mark.parametrize("name", ["pattern", "attn_scores"])
@pytest.mark.parametrize("tool", PUT_IN)
def test_padding_is_not_looked_at(model, whole, tool, name):
    with pytest.raises(
        ValueError, match=r"on position 0, which position \d of the target run does"
    ):
        PUT_IN[tool](model, whole, name, attention_mask=PADDED)
    # What it sees less is another matter: the padded run's pattern goes into the whole prompt.
    with torch.no_grad():
        _, padded = model.run_with_cache(TOKENS, attention_mask=PADDED)
    found = PUT_IN[tool](model, padded, "pattern")
    assert bool(found.isfinite().all())


@torch.no_grad()
@pytest.mark.parametrize("tool", ["activation_patch", "ablate"])
def test_places_that_see_as_much_take_the_pattern(model, whole, tool):
    """Rows of padding count where they are put in alone."""
    chosen = {"where": {"pos": [3, 4], "src_pos": [2, 3, 4]}, "attention_mask": PADDED}
    found = PUT_IN[tool](model, whole, "pattern", **chosen)

    def put(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, :, 3:, 2:] = whole[hook.name][:, :, 3:, 2:]
        return x

    for block in range(model.cfg.n_layers):
        hooks = [(f"blocks.{block}.attn.hook_pattern", put)]
        logits = model.run_with_hooks(OTHERS, fwd_hooks=hooks, attention_mask=PADDED)
        assert_close(found[block], metric(logits), atol=1e-5, rtol=1e-5)


def test_scores_of_zero_are_on_later_tokens(model):
    with pytest.raises(ValueError, match="causality"):
        ablate(model, OTHERS, metric, "attn_scores", progress=False)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["latest", "first", "shared:0.5", "window:2", "ring:2"])
def test_cells_are_whole_runs_where_iterations_share_keys(kind):
    """A cell neither restarts nor goes on from cached keys then."""
    model = tiny_model("ouro", n_iterations=3)
    model.cfg.kv_sharing = kind
    _, cache = model.run_with_cache(TOKENS)
    run = model.run_with_hooks
    for name, rest in (("pattern", "attn.hook_pattern"), ("resid_pre", "hook_resid_pre")):
        given = (model, OTHERS, cache, metric)
        patched = activation_patch(*given, name, ("block",), progress=False)
        sites = [Site(name, block=b) for b in range(model.cfg.n_layers)]
        moved = transplant_sites(*given, sites, progress=False)
        removed = ablate(
            model, OTHERS, metric, name, ("block",), "paired", cache, progress=False
        )  # fmt: skip
        for block in range(model.cfg.n_layers):
            hooks = [(f"blocks.{block}.{rest}", lambda x, hook: cache[hook.name])]
            expected = metric(run(OTHERS, fwd_hooks=hooks))
            for found in (patched[block], moved[block, block], removed[block]):
                assert_close(found, expected, atol=1e-5, rtol=1e-5)
        sent = path_patch(*given, sites[1:2], ["logits"], freeze=(), progress=False)
        assert_close(sent[0, 0], patched[1], atol=1e-5, rtol=1e-5)
