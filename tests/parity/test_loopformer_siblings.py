"""TMLT and Base-Loop against numbers of the released forward passes, transcribed, on one CPU."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.parity.test_fixtures import TOLERANCE, relative_error
from tl_loops import LoopedTransformer

FIXTURE = Path(__file__).parent / "fixtures" / "loopformer_siblings"
CONTENT = json.loads((FIXTURE / "kinds.json").read_text())


@pytest.mark.parametrize("model_type", ["tmlt", "tmlt_ee", "base_loop", "base_loop_ee"])
def test_logits_and_every_state(model_type, tmp_path):
    kind = model_type.removesuffix("_ee")
    stored = load_file(FIXTURE / "weights.safetensors")
    weights = {name: stored[name] for name in CONTENT["kinds"][kind]}
    save_file(weights, tmp_path / "model.safetensors")
    config = {**CONTENT["common"], "model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="tokenizer"):
        model = LoopedTransformer.from_pretrained_no_processing(tmp_path, device="cpu")
    expected = load_file(FIXTURE / "expected.safetensors")
    tokens = expected["tokens"]
    for n_iterations in (8, 3):
        logits = expected[f"{kind}.logits_{n_iterations}"]
        assert relative_error(model(tokens, n_iterations=n_iterations), logits) < TOLERANCE
        cached, cache = model.run_with_cache(tokens, n_iterations=n_iterations)
        assert relative_error(cached, logits) < TOLERANCE
        states = expected[f"{kind}.states_{n_iterations}"]
        assert len(states) == n_iterations
        for t, state in enumerate(states):
            assert relative_error(cache["state_out", t], state) < TOLERANCE, t
