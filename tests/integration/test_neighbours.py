"""The page on other tools: its code runs where the tool is, and finds what the tools here find."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tl_loops import loop_hooks, patching

PAGE = (Path(__file__).parents[2] / "docs" / "neighbours.md").read_text("utf-8")
BLOCK = re.compile(r"^```(python|py)\n(.*?)^```$", re.S | re.M)


def blocks(kind: str, heading: str) -> list[str]:
    """The code of one section."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = [text for language, text in BLOCK.findall(section) if language == kind]
    assert found
    return found


def run(heading: str, namespace: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run what only runs with the tool, from files, since nnsight reads its traces there."""
    for number, text in enumerate(blocks("py", heading)):
        file = folder / f"block_{number}.py"
        file.write_text(text, "utf-8")
        exec(compile(text, str(file), "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "example"}
    (text,) = blocks("python", "Splice an autoencoder in")
    exec(compile(text, "neighbours.md", "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def trained(page, tmp_path_factory):
    pytest.importorskip("sae_lens", reason="pip install sae-lens, with TransformerLens 3.9")
    heading = "Sparse autoencoders with SAELens"
    return run(heading, dict(page), tmp_path_factory.mktemp("saelens"))


@pytest.fixture(scope="module")
def found(page, tmp_path_factory):
    module = "transformer_lens.tools.analysis.interchange"
    pytest.importorskip(module, reason="needs TransformerLens 4.3")
    heading = "Subspaces and sparse probes of TransformerLens 4.3"
    return run(heading, dict(page), tmp_path_factory.mktemp("das"))


@pytest.fixture(scope="module")
def traced(page, tmp_path_factory):
    pytest.importorskip("nnsight", reason="pip install nnsight")
    return run("Traces with nnsight", dict(page), tmp_path_factory.mktemp("nnsight"))


class TestSAELens:
    def test_it_explains_the_iteration_that_it_was_trained_at(self, trained):
        result = trained["spliced"]
        assert trained["sae"].cfg.metadata.hook_name == "blocks.6.hook_resid_post"
        assert result.explained_variance[2] > 0.9
        assert result.explained_variance.argmax() == 2
        assert result.recovered_loss[2] > 0.8 and (result.recovered_loss <= 1).all()

    def test_its_activations_are_those_of_that_iteration(self, trained):
        store, model = trained["runner"].activations_store, trained["model"]
        tokens = store.get_batch_tokens(2)
        _, cache = model.run_with_cache(tokens, names_filter="iter.2.1.hook_resid_post")
        assert torch.equal(store.get_activations(tokens), cache["resid_post", 2, 1])

    def test_its_own_numbers_are_the_same(self, trained):
        from sae_lens.evals import get_recons_loss
        from sae_lens.training.activation_scaler import ActivationScaler

        model, sae = trained["model"], trained["sae"]
        tokens = trained["test"][:4]
        theirs = get_recons_loss(
            sae, model, ActivationScaler(), tokens, compute_kl=False, compute_ce_loss=True
        )
        ours = patching.splice(model, list(tokens), sae, trained["name"], progress=False)
        pairs = {
            "ce_loss_without_sae": ours.loss,
            "ce_loss_with_sae": ours.spliced_loss[0],
            "ce_loss_with_ablation": ours.zero_loss[0],
        }
        for name, expected in pairs.items():
            assert float(theirs[name].mean()) == pytest.approx(float(expected), rel=1e-5)

    def test_a_name_that_it_misreads_raises(self, trained):
        store = trained["runner"].activations_store
        tokens = store.get_batch_tokens(2)
        for name in ("iter.2.1.hook_resid_post", "iter.2.hook_state_out", "coda.0.hook_resid_post"):
            store.hook_name = name
            with pytest.raises(ValueError, match="takes the first number of a hook name"):
                store.get_activations(tokens)
        store.hook_name = "hook_injection"
        assert store.get_activations(tokens).shape == (*tokens.shape, 64)


class TestTransformerLens4:
    def test_subspaces_are_found_where_patching_moves_the_answer(self, found):
        from transformer_lens.tools.analysis.interchange import (
            SubspaceInterchange,
            collect_activations,
            run_with_intervention,
        )

        model, answers = found["model"], found["answers"]
        base, source, target = found["pairs"](24, "held_out")
        last = torch.full((len(base),), base.shape[1] - 1)
        share = {}
        for t, learned in found["subspaces"].items():
            name = loop_hooks.at(model, "state_out", iteration=t)
            states = collect_activations(model, name, source, answers, positions=last)

            def moved(basis, name=name, states=states):
                step = SubspaceInterchange(basis)
                with torch.no_grad():
                    return run_with_intervention(
                        model, name, step, base, states, answers, positions=last
                    )

            _, cache = model.run_with_cache(source, names_filter=name)
            whole = patching.activation_patch(
                model,
                base,
                cache,
                lambda logits: (logits[:, -1].argmax(-1) == target).float().mean(),
                "state_out",
                ("iteration",),
                where={"iteration": [t], "pos": -1},
                progress=False,
            )
            theirs = (moved(torch.eye(64)).argmax(-1) == target).float().mean()
            assert theirs == whole[0]
            learned_share = (moved(learned.subspace.basis).argmax(-1) == target).float().mean()
            share[t] = float(whole[0]), float(learned_share)
        assert share[0] == (0.0, 0.0)
        assert share[2][0] == 1.0 and share[2][1] >= 0.7, share

    def test_sparse_probes_read_the_second_hop_when_it_is_taken(self, found):
        """Later 16 dimensions no longer do, where all 64 still do."""
        sparse = torch.tensor([probe.metrics.average_precision for probe in found["sparse"]])
        dense = found["dense"].accuracy[:, 0]
        assert dense[1:].min() > 0.95 and sparse[1] > 0.9
        assert dense[0] < dense[1:].min() and sparse[[0, 2]].max() < 0.6


class TestNNsight:
    @torch.no_grad()
    def test_what_it_reads_is_what_a_cache_holds(self, traced):
        model, tokens, every = (traced[name] for name in ("model", "tokens", "every"))
        _, cache = model.run_with_cache(tokens, names_filter=every)
        assert len(traced["states"]) == 8
        for state, name in zip(traced["states"], every, strict=True):
            assert torch.equal(state, cache[name])
        name = "iter.3.hook_state_out"
        _, cache = model.run_with_cache(tokens, names_filter=name, n_iterations=4)
        assert torch.equal(traced["state"], cache[name])
        _, cache = model.run_with_cache(tokens, names_filter="iter.2.1.attn.hook_pattern")
        assert torch.equal(traced["pattern"], cache["pattern", 2, 1])

    @torch.no_grad()
    def test_what_it_patches_is_what_a_hook_patches(self, traced):
        model, tokens = traced["model"], traced["tokens"]
        hook = ("iter.2.1.hook_resid_post", lambda x, hook: torch.zeros_like(x))
        assert torch.equal(traced["logits"], model.run_with_hooks(tokens, fwd_hooks=[hook]))
        assert not torch.equal(traced["logits"], model(tokens))


@torch.no_grad()
def test_a_cache_on_a_model_whose_forward_pass_a_tool_has_wrapped(page):
    """As nnsight does, with a function of its own on the model."""
    model, tokens = page["model"], page["test"][:2]
    _, expected = model.run_with_cache(tokens, names_filter="iter.2.hook_state_out")
    nn.Module.__setattr__(
        model, "forward", lambda *args, **kwargs: type(model).forward(model, *args, **kwargs)
    )
    try:
        _, cache = model.run_with_cache(tokens, names_filter="iter.2.hook_state_out")
    finally:
        del model.forward
    assert torch.equal(cache["iter.2.hook_state_out"], expected["iter.2.hook_state_out"])
    assert torch.equal(cache.tokens, tokens)
