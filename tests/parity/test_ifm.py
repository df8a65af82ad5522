"""IFM LoopedLM of every kind against numbers of the released forward passes, transcribed.

The transcription ran on one CPU in float32, without the branches of training: parallel layers are
plain ones, and the CUDA kernel for the norm is its formula. All kinds have the same layers.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.test_fixtures import TOLERANCE, relative_error
from tl_loops import LoopedTransformer
from tl_loops.upstream import KeyValueCache

FIXTURE = Path(__file__).parent / "fixtures" / "ifm"
CONTENT = json.loads((FIXTURE / "kinds.json").read_text())
KINDS = CONTENT["kinds"]
OF_EVERY_KIND = ("layers.", "embed.", "output.")


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURE / "expected.safetensors")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind, tmp_path_factory):
    directory = tmp_path_factory.mktemp(kind)
    own = KINDS[kind]["own_tensors"]
    weights = {
        name: tensor
        for name, tensor in load_file(FIXTURE / "weights.safetensors").items()
        if name in own or name.startswith(OF_EVERY_KIND)
    }
    save_file(weights, directory / "model.safetensors")
    fields = {**CONTENT["common"], **KINDS[kind]["fields"]}
    (directory / "config.json").write_text(json.dumps({"model": fields}))
    with pytest.warns(UserWarning, match="tokenizer"):
        return LoopedTransformer.from_pretrained_no_processing(directory, device="cpu")


@pytest.fixture
def given(model, kind, expected):
    """The initial state, where it is a hash: its sine amplifies the rounding of a machine."""
    hashed = model.cfg.initial_state == "hashed_normal"
    return {"initial_state": expected[f"{kind}.first"]} if hashed else {}


def test_logits_and_every_state(model, kind, expected, given):
    tokens, logits = expected["tokens"], expected[f"{kind}.logits"]
    assert relative_error(model(tokens, **given), logits) < TOLERANCE
    cached, cache = model.run_with_cache(tokens, **given)
    assert relative_error(cached, logits) < TOLERANCE
    states = expected[f"{kind}.states"]
    assert len(states) == model.cfg.n_iterations
    for t, state in enumerate(states):
        assert relative_error(cache["state_out", t], state) < TOLERANCE, t
    if f"{kind}.e" in expected and model.cfg.injection is not None:
        assert relative_error(cache["hook_injection"], expected[f"{kind}.e"]) < TOLERANCE


def test_decoding_with_a_cache(model, kind, expected, given):
    tokens, steps = expected["tokens"], []
    past = KeyValueCache.init_cache(model.cfg, "cpu", 1)
    for span in (slice(0, 5), slice(5, 6), slice(6, 8)):
        first = {name: state[:, span] for name, state in given.items()}
        steps.append(model(tokens[:, span], past_kv_cache=past, **first))
    assert relative_error(torch.cat(steps, 1), expected[f"{kind}.logits"]) < TOLERANCE


def test_the_initial_state_is_the_hash(model, kind, expected):
    if model.cfg.initial_state != "hashed_normal":
        pytest.skip("the state is no hash")
    _, cache = model.run_with_cache(expected["tokens"])
    error = (cache["hook_initial_state"] - expected[f"{kind}.first"]).abs()
    std = model.cfg.initial_state_std
    # A sine that is off by one rounding moves an entry by some thousandths of a deviation.
    assert float(error.mean()) < 0.01 * std and float(error.median()) < 0.005 * std
