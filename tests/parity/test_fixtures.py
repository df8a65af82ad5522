"""Every family against the numbers that its reference implementation produced."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tl_loops import LoopedTransformer
from tl_loops.upstream import KeyValueCache

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = (
    "huginn",
    "ouro",
    "retrofitted_llama_default",
    "retrofitted_llama_llama3",
    "retrofitted_olmo_default",
    "parcae",
    "nanochat_recursive",
)
TOLERANCE = 1e-5


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach() - expected).abs().max() / expected.abs().max())


@pytest.fixture(params=FAMILIES, scope="module")
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def expected(family: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / family / "expected.safetensors")


@pytest.fixture(scope="module")
def model(family: str) -> LoopedTransformer:
    with pytest.warns(UserWarning, match="tokenizer"):
        return LoopedTransformer.from_pretrained_no_processing(FIXTURES / family, device="cpu")


def test_logits(model, expected):
    logits = model(expected["tokens"], initial_state=expected.get("initial_state"))
    assert relative_error(logits, expected["logits"]) < TOLERANCE


def test_logits_with_every_hook_point_cached(model, expected):
    logits, _ = model.run_with_cache(
        expected["tokens"], initial_state=expected.get("initial_state")
    )
    assert relative_error(logits, expected["logits"]) < TOLERANCE


def test_default_processing_keeps_the_logits(family, expected):
    with pytest.warns(UserWarning, match="center_unembed"):
        folded = LoopedTransformer.from_pretrained(FIXTURES / family, device="cpu")
    logits = folded(expected["tokens"], initial_state=expected.get("initial_state"))
    assert relative_error(logits, expected["logits"]) < TOLERANCE


def test_other_numbers_of_iterations(model, expected):
    names = [name for name in expected if name.startswith("logits_n_iterations_")]
    if not names:
        pytest.skip("the fixture has one number of iterations")
    for name in names:
        n_iterations = int(name.rsplit("_", 1)[-1])
        logits = model(
            expected["tokens"],
            initial_state=expected.get("initial_state"),
            n_iterations=n_iterations,
        )
        assert relative_error(logits, expected[name]) < TOLERANCE, name


def test_every_state_and_layer(model, expected):
    _, cache = model.run_with_cache(expected["tokens"], initial_state=expected.get("initial_state"))
    layout, n_core = model.layout, model.cfg.n_core
    if "prelude_out" in expected:
        assert relative_error(cache["hook_injection"], expected["prelude_out"]) < TOLERANCE
    for t in range(layout.n_iterations):
        state = cache[f"iter.{t}.hook_state_out"]
        assert relative_error(state, expected["iteration_out"][t]) < TOLERANCE
        if "injected" in expected:
            injected = cache[f"iter.{t}.hook_injected"]
            assert relative_error(injected, expected["injected"][t]) < TOLERANCE
        if "exit_gate_logits" in expected:
            gate = cache[f"iter.{t}.hook_exit_gate"]
            assert relative_error(gate, expected["exit_gate_logits"][t]) < TOLERANCE
        for layer in range(n_core):
            resid = cache[f"iter.{t}.{layer}.hook_resid_post"]
            reference = expected["core_layer_out"][t * n_core + layer]
            assert relative_error(resid, reference) < TOLERANCE
            if "pattern" in expected:
                pattern = cache["pattern", layout.index(iteration=t, layer=layer)]
                assert relative_error(pattern, expected["pattern"][t * n_core + layer]) < TOLERANCE


def test_exit_modes(model, expected):
    if "logits_weighted_exit" not in expected:
        pytest.skip("the family has no exit gate")
    tokens = expected["tokens"]
    weighted = model(tokens, weighted_exit=True)
    assert relative_error(weighted, expected["logits_weighted_exit"]) < TOLERANCE
    for name, reference in expected.items():
        if name.startswith("logits_exit_at_"):
            logits = model(tokens, exit_at=int(name.rsplit("_", 1)[-1]))
            assert relative_error(logits, reference) < TOLERANCE, name
        if name.startswith("logits_exit_threshold_"):
            logits = model(tokens, exit_threshold=float(name.rsplit("_", 1)[-1]))
            assert relative_error(logits, reference) < TOLERANCE, name


def test_cached_decoding_equals_the_full_forward_pass(model, expected):
    tokens, state = expected["tokens"], expected.get("initial_state")
    past = KeyValueCache.init_cache(model.cfg, "cpu", tokens.shape[0])
    steps = []
    for span in [slice(0, 4), *(slice(p, p + 1) for p in range(4, tokens.shape[1]))]:
        start = None if state is None else state[:, span]
        steps.append(model(tokens[:, span], past_kv_cache=past, initial_state=start))
    assert relative_error(torch.cat(steps, dim=1), expected["logits"]) < TOLERANCE


def test_left_padding_changes_nothing(model, expected):
    tokens, state = expected["tokens"], expected.get("initial_state")
    n_pad = 3
    padded = torch.cat([torch.full_like(tokens[:, :n_pad], 7), tokens], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :n_pad] = 0
    if state is not None:
        state = torch.cat([torch.randn_like(state[:, :n_pad]), state], dim=1)
    logits = model(padded, attention_mask=mask, initial_state=state)
    assert relative_error(logits[:, n_pad:], expected["logits"]) < TOLERANCE
    cached, _ = model.run_with_cache(padded, attention_mask=mask, initial_state=state)
    assert relative_error(cached[:, n_pad:], expected["logits"]) < TOLERANCE
