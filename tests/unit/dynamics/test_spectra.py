"""Spectra of keys and values over iterations are those of the matrices themselves."""

import pytest
import torch

from tests.models import tiny_model, tiny_tokens
from tl_loops.dynamics import key_value_spectra
from tl_loops.errors import ArgumentError

PROMPTS = [tiny_tokens(1, n, seed=n)[0] for n in (9, 5, 9, 7)]


def matrices(model, layer, name, head):
    """[iteration, token, d_head] of one layer and head, from caches."""
    layout = model.layout
    blocks = [i for i in range(layout.n_layers) if layout.physical_name(i) == layer]
    rows = []
    with torch.no_grad():
        for tokens in PROMPTS:
            _, cache = model.run_with_cache(tokens[None])
            rows.append(
                torch.stack([cache[f"blocks.{i}.attn.hook_{name}"][0, :, head] for i in blocks])
            )
    return torch.cat(rows, dim=1).double()


@pytest.mark.parametrize("keys", ["k", "rot_k"])
@pytest.mark.parametrize("stacked", ["iterations", "tokens"])
@pytest.mark.parametrize("name", ["retrofitted", "olmo_grouped", "hrm_text"])
def test_they_are_the_singular_values(name, stacked, keys):
    model = tiny_model(name)
    found = key_value_spectra(model, PROMPTS, stacked=stacked, keys=keys, batch_size=2)
    n_heads = model.cfg.n_key_value_heads or model.cfg.n_heads
    for what, hook in (("k", keys), ("v", "v")):
        for layer in found.n_calls:
            values = found.singular_values[what][layer]
            assert values.shape[0] == n_heads
            M = matrices(model, layer, hook, n_heads - 1)
            assert found.n_calls[layer] == len(M)
            M = M.transpose(0, 1).flatten(1) if stacked == "iterations" else M.flatten(0, 1)
            expected = torch.linalg.svdvals(M)
            torch.testing.assert_close(
                values[-1].double(), expected, rtol=1e-6, atol=1e-6 * float(expected[0])
            )
    assert set(found.n_calls) == {n for n in model.layout.physical_names() if n.startswith("core")}


def test_iterations_that_repeat_need_no_more_directions_than_one():
    """A hook gives every iteration the same keys: side by side their rank is that of one."""
    model = tiny_model("ouro")
    kept = {}

    def same(k, hook):
        layer = (int(hook.name.split(".")[1])) % 3
        return kept.setdefault((layer, k.shape), k)

    def once(k, hook):
        kept.clear()

    first = "blocks.0.hook_resid_pre"
    with model.hooks([(first, once), (lambda n: n.endswith("hook_k"), same)]):
        found = key_value_spectra(model, PROMPTS)
    d_head, T = model.cfg.d_head, model.cfg.n_iterations
    for layer, ranks in found.rank_for_share("k", 1 - 1e-9).items():
        assert (ranks <= d_head).all() and found.singular_values["k"][layer].shape[1] > d_head
        # The same matrix T times side by side: the values of one, times the root of T.
        one = torch.linalg.svdvals(matrices_of_first(model, layer))
        torch.testing.assert_close(
            found.singular_values["k"][layer][0, :d_head].float(),
            (T**0.5 * one).float(),
            rtol=1e-4,
            atol=1e-4,
        )
    assert all((ranks > d_head).any() for ranks in found.rank_for_share("v", 1 - 1e-9).values())


def matrices_of_first(model, layer):
    return matrices(model, layer, "k", 0)[0]


def test_the_table():
    found = key_value_spectra(tiny_model("retrofitted"), PROMPTS, n_iterations=5)
    frame = found.to_frame(0.9)
    assert len(frame) == 2 * 2 * 4 and set(frame["iterations"]) == {5}
    assert (frame["effective_rank"] <= frame["most"]).all() and (frame["rank_0.9"] >= 1).all()
    assert (frame["most"] == min(5 * 8, found.n_tokens)).all()
    assert repr(found) == "KeyValueSpectra(2 layers stacked over iterations, 30 tokens)"


def test_bad_input():
    model = tiny_model("retrofitted")
    with pytest.raises(ValueError, match="prompts is empty"):
        key_value_spectra(model, [])
    with pytest.raises(ValueError, match="batch_size"):
        key_value_spectra(model, PROMPTS, batch_size=0)
    with pytest.raises(ArgumentError, match="no loop layout"):
        key_value_spectra(torch.nn.Linear(1, 1), PROMPTS)
