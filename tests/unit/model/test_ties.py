"""Ways around the ties: what gives iterations weights of their own is tied again, or refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.models import tiny_model, tiny_tokens
from tl_loops import LoopedSemanticsError


def n_objects(model):
    return len({id(p) for p in model.parameters()})


@pytest.mark.parametrize("name", ["huginn", "ouro", "hrm_text"])
def test_assigned_weights_are_tied_again(name, tmp_path):
    model, source, tokens = tiny_model(name), tiny_model(name, seed=5), tiny_tokens()
    n = n_objects(model)
    model.load_state_dict(source.state_dict(), assign=True)
    assert n_objects(model) == n
    with torch.no_grad():
        assert torch.equal(model(tokens), source(tokens))
        first = model.blocks[model.layout.core_start].attn.W_Q
        last = model.blocks[model.layout.coda_start - model.cfg.n_core].attn.W_Q
        if model.cfg.stacks is None:
            assert first is last
    model.save_pretrained(tmp_path / "m")


def test_a_state_dict_whose_iterations_differ_is_refused_and_nothing_is_loaded():
    model, tokens = tiny_model("huginn"), tiny_tokens()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = model(tokens)
    name = f"blocks.{model.layout.index(iteration=2, layer=0)}.attn.W_Q"
    state[name] = state[name] + 1
    state["embed.W_E"] = state["embed.W_E"] + 1
    for strict in (True, False):
        for assign in (True, False):
            with pytest.raises(RuntimeError, match="ties them"):
                model.load_state_dict(state, strict=strict, assign=assign)
    with torch.no_grad():
        assert torch.equal(model(tokens), expected)


def test_a_state_dict_that_does_not_fit_loads_nothing():
    model, tokens = tiny_model("huginn"), tiny_tokens()
    with torch.no_grad():
        expected = model(tokens)
    state = {k: v + 1 for k, v in model.state_dict().items()}
    state["unembed.W_U"] = state["unembed.W_U"][:, :-1]
    with pytest.raises(RuntimeError, match=r"size mismatch for unembed\.W_U"):
        model.load_state_dict(state, strict=False)
    with torch.no_grad():
        assert torch.equal(model(tokens), expected)


def test_conversions_that_make_new_parameters_keep_the_ties():
    model = tiny_model("huginn")
    n = n_objects(model)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
    assert n_objects(model) == n


def test_copies_and_pickles_keep_the_ties():
    model, tokens = tiny_model("ouro"), tiny_tokens()
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert n_objects(twin) == n_objects(model)
            assert torch.equal(twin(tokens), model(tokens))


def test_a_weight_of_its_own_is_not_saved(tmp_path):
    model = tiny_model("huginn")
    block = model.layout.index(iteration=2, layer=1)
    model.blocks[block].attn.W_Q = nn.Parameter(model.blocks[block].attn.W_Q.detach() + 1)
    with pytest.raises(LoopedSemanticsError, match=rf"blocks\.{block}\.attn\.W_Q"):
        model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()
