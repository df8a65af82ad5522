"""Checkpoints as released files spell them, against what the original implementations computed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tl_loops import LoopedTransformer
from tl_loops.upstream import KeyValueCache

FIXTURES = Path(__file__).parent / "fixtures" / "wild"
NAMES = sorted(directory.name for directory in FIXTURES.iterdir())
TOLERANCE = 1e-5


def assert_near(actual: Tensor, expected: Tensor, valid: Tensor | None, what: str) -> None:
    if valid is not None:
        actual, expected = actual[valid.bool()], expected[valid.bool()]
    assert actual.shape == expected.shape, what
    error = float((actual.detach() - expected).abs().max() / expected.abs().max())
    assert error < TOLERANCE, f"{what}: {error:.2e}"


@pytest.fixture(params=NAMES, scope="module")
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> LoopedTransformer:
    with pytest.warns(UserWarning) as warned:
        model = LoopedTransformer.from_pretrained_no_processing(FIXTURES / name, device="cpu")
    texts = [str(warning.message) for warning in warned]
    rotation = [text for text in texts if "'freqs_cis' is of base 10000" in text]
    assert bool(rotation) == (name == "huginn_freqs_other_base")
    return model


@pytest.fixture(scope="module")
def calls(name: str) -> list[dict]:
    """What was called, with the tensors in their places."""
    tensors = load_file(FIXTURES / name / "reference.safetensors")

    def filled(part):
        if isinstance(part, dict):
            if part.keys() == {"tensor"}:
                return tensors[part["tensor"]]
            return {key: filled(value) for key, value in part.items()}
        return [filled(value) for value in part] if isinstance(part, list) else part

    return filled(json.loads((FIXTURES / name / "reference.json").read_text()))


def of_kind(calls: list[dict], kind: str) -> list[dict]:
    found = [call for call in calls if call["what"] == kind]
    if not found:
        pytest.skip(f"the original was not asked for {kind}")
    return found


def test_logits_are_those_of_the_original(model, calls):
    for call in of_kind(calls, "logits"):
        logits = model(call["tokens"], **call["kw"])
        assert_near(logits, call["logits"], call.get("valid"), str(call["kw"]))
        cached, _ = model.run_with_cache(call["tokens"], **call["kw"])
        assert_near(cached, call["logits"], call.get("valid"), f"cached, {call['kw']}")


def test_values_of_every_iteration_are_those_of_the_original(model, calls):
    for call in of_kind(calls, "states"):
        _, cache = model.run_with_cache(call["tokens"])
        hook = call.get("hook", "iter.{t}.hook_state_out")
        for t, expected in enumerate(call["states"]):
            actual = cache[hook.format(t=t)]
            if "training head" in call.get("note", ""):
                # Training reads the head on how much an iteration would change.
                change = cache["resid_post", model.layout.index(iteration=t, layer=-1)]
                actual = model.halt_head(change - cache["state_in", t])
            assert_near(actual, expected, None, f"{hook} {t}")


def test_halting_logits_are_those_of_the_originals_generation(model, calls):
    for call in of_kind(calls, "infer_halt"):
        _, cache = model.run_with_cache(call["tokens"])
        for t, expected in enumerate(call["states"]):
            assert_near(cache[f"iter.{t}.hook_halt_logit"], expected, None, f"iteration {t}")


def iterations_until(halt_logits, threshold):
    """How many iterations run until the last token's confidence is above a threshold, per row."""
    above = torch.stack([logit[:, -1, 0] for logit in halt_logits]).sigmoid() > threshold
    return torch.where(above.any(0), above.int().argmax(0) + 1, len(above))


def test_iterations_until_the_original_stops_are_those_of_the_hook_point(model, calls):
    for call in of_kind(calls, "infer_halt"):
        _, cache = model.run_with_cache(call["tokens"])
        ours = [cache[f"iter.{t}.hook_halt_logit"] for t in range(model.cfg.n_iterations)]
        in_training = []
        for t in range(model.cfg.n_iterations):
            new = cache["resid_post", model.layout.index(iteration=t, layer=-1)]
            in_training.append(model.halt_head(new - cache["state_in", t]))
        confidences = torch.stack(call["states"])[..., -1, 0].sigmoid().flatten().sort().values
        counts = set()
        # Between two confidences of the original, where rounding decides nothing.
        for threshold in (confidences[1:] + confidences[:-1]) / 2:
            n = iterations_until(call["states"], threshold)
            assert torch.equal(iterations_until(ours, threshold), n)
            counts.add((*n.tolist(), *iterations_until(in_training, threshold).tolist()))
        n_rows = len(call["tokens"])
        assert any(count[:n_rows] != count[n_rows:] for count in counts)  # training reads otherwise
        assert len({count[:n_rows] for count in counts}) > 1


def test_exit_gates_are_those_of_the_original(model, calls):
    for call in of_kind(calls, "gates"):
        _, cache = model.run_with_cache(call["tokens"])
        for t, expected in enumerate(call["gates"]):
            assert_near(cache[f"iter.{t}.hook_exit_gate"], expected, None, f"iteration {t}")


def test_attention_patterns_are_those_of_the_original(model, calls):
    for call in of_kind(calls, "patterns"):
        _, cache = model.run_with_cache(call["tokens"])
        for (iteration, layer), expected in call["patterns"]:
            block = model.layout.index(iteration=iteration, layer=layer)
            assert_near(cache["pattern", block], expected, None, f"{iteration}, {layer}")


def test_cached_decoding_is_that_of_the_original(model, calls):
    for call in of_kind(calls, "cached"):
        tokens, split = call["tokens"], call["split"]
        past = KeyValueCache.init_cache(model.cfg, "cpu", tokens.shape[0])
        pieces = [tokens[:, :split], *tokens[:, split:].split(1, dim=1)]
        logits = torch.cat([model(piece, past_kv_cache=past) for piece in pieces], dim=1)
        assert_near(logits, call["logits"], None, "decoded")


def test_default_processing_keeps_the_logits_of_released_files(name, calls):
    with pytest.warns(UserWarning):
        folded = LoopedTransformer.from_pretrained(FIXTURES / name, device="cpu")
    call = of_kind(calls, "logits")[0]
    logits = folded(call["tokens"], **call["kw"])
    assert_near(logits, call["logits"], call.get("valid"), "processed")
