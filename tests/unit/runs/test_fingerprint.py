"""Weights are hashed when a checkpoint or a file needs it, and once while they are unchanged."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

from tests.models import tiny_model
from tests.unit.measurements.test_measure import prompts, quiet
from tl_loops.measurements.profile import LoopProfile
from tl_loops.runs import fingerprint
from tl_loops.runs.fingerprint import model_fingerprint


@pytest.fixture
def hashed(monkeypatch):
    """The models whose weights have been hashed, in order."""
    models, hash_weights = [], fingerprint._hashed

    def counted(architecture, model):
        models.append(id(model))
        return hash_weights(architecture, model)

    monkeypatch.setattr(fingerprint, "_hashed", counted)
    return models


def test_weights_are_hashed_once_and_only_when_something_needs_it(tmp_path, hashed):
    model, other = tiny_model("ouro"), tiny_model("huginn")
    profile = quiet(model, prompts(), "residual_norm")
    again = quiet(model, prompts(), "residual_norm")
    repr(profile), profile.to_frame(), profile.mean("residual_norm")
    assert hashed == []
    profile.save(tmp_path / "a.json")
    again.save(tmp_path / "b.json")
    profile.merge(again)
    for _ in range(2):
        quiet(model, prompts(), "residual_norm", checkpoint=tmp_path / "run.ckpt")
    assert hashed == [id(model)]
    assert LoopProfile.load(tmp_path / "a.json").provenance == again.provenance
    with model.iterations(2):
        assert model_fingerprint(model) == profile.provenance.weights
    assert hashed == [id(model)]
    assert model_fingerprint(other) != profile.provenance.weights
    assert hashed == [id(model), id(other)]


CHANGES = {
    "in place": lambda model: model.embed.W_E[3].mul_(2),
    "one number": lambda model: model.embed.W_E[7, 5].add_(1),
    "data": lambda model: model.embed.W_E.data[3].mul_(2),
    "another tensor": lambda model: setattr(
        model.embed, "W_E", torch.nn.Parameter(model.embed.W_E * 2)
    ),
    "data replaced": lambda model: setattr(model.embed.W_E, "data", model.embed.W_E * 2),
    "rows swapped": lambda model: model.embed.W_E.data.copy_(model.embed.W_E.flip(0)),
    "loaded": lambda model: model.load_state_dict(tiny_model("ouro", seed=5).state_dict()),
    "config": lambda model: setattr(model.cfg, "eps", 0.1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_gives_another_identity(tmp_path, hashed, change):
    model = tiny_model("ouro")
    before = model_fingerprint(model)
    profile = quiet(model, prompts((5,)), "residual_norm")
    with torch.no_grad():
        CHANGES[change](model)
    after = model_fingerprint(model)
    assert after != before and len(hashed) == 2
    assert model_fingerprint(model) == after and len(hashed) == 2
    # What was measured before the change, and is asked only now, is not known for sure.
    assert profile.provenance.weights is None
    with pytest.warns(UserWarning, match="does not say which weights"):
        profile.save(tmp_path / "p.csv")
    assert LoopProfile.load(tmp_path / "p.csv").provenance == profile.provenance
    with pytest.raises(ValueError, match="nothing tells whether these profiles"):
        profile.merge(LoopProfile.load(tmp_path / "p.csv"))
    with pytest.raises(ValueError, match="weights is None and"):
        profile.merge(quiet(model, prompts((5,)), "residual_norm"))


def test_weights_of_any_strides_have_the_same_identity():
    model, same = tiny_model("ouro"), tiny_model("ouro")
    for parameter in same.parameters():
        wide = torch.zeros(*parameter.shape, 2)
        wide[..., 0] = parameter.detach()
        parameter.data = wide[..., 0]
    assert model_fingerprint(model) == model_fingerprint(same)


def test_a_small_model_lives_until_its_weights_are_asked_for():
    model = tiny_model("ouro")
    expected, dead = model_fingerprint(tiny_model("ouro")), weakref.ref(model)
    profile = quiet(model, prompts((5,)), "residual_norm")
    del model
    gc.collect()
    assert dead() is not None and profile.provenance.weights == expected
    gc.collect()
    assert dead() is None


def test_a_large_model_is_not_kept_alive(monkeypatch):
    monkeypatch.setattr(fingerprint, "_KEPT_ALIVE", 0)
    model = tiny_model("ouro")
    dead = weakref.ref(model)
    profile = quiet(model, prompts((5,)), "residual_norm")
    del model
    gc.collect()
    assert dead() is None and profile.provenance.weights is None


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_of_a_profile_know_the_weights(how):
    model = tiny_model("ouro")
    copied = how(quiet(model, prompts((5,)), "residual_norm").provenance)
    with torch.no_grad():
        model.embed.W_E.mul_(2)
    assert copied.weights == model_fingerprint(tiny_model("ouro"))


def test_weights_of_inference_mode_are_hashed_at_once(hashed):
    with torch.inference_mode():
        model = tiny_model("ouro")
    expected = model_fingerprint(tiny_model("ouro"))
    profile = quiet(model, prompts((5,)), "residual_norm")
    assert profile.provenance.weights == expected
    with torch.inference_mode():
        model.embed.W_E[3].mul_(2)
    assert model_fingerprint(model) != expected
