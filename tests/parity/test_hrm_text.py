"""HRM-Text against its fixture, and against Hugging Face transformers on random small models."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tl_loops import LoopedTransformer
from tl_loops.upstream import KeyValueCache

FIXTURE = Path(__file__).parent / "fixtures" / "hrm_text"
TOLERANCE = 1e-5


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach() - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(FIXTURE / "expected.safetensors")


@pytest.fixture(scope="module")
def model() -> LoopedTransformer:
    with pytest.warns(UserWarning, match="tokenizer"):
        return LoopedTransformer.from_pretrained_no_processing(FIXTURE, device="cpu")


def cases(expected):
    """Arguments of the forward pass with the logits that they give."""
    yield {}, expected["logits"]
    yield {"prefix_mask": expected["token_type_ids"]}, expected["logits_prefix"]


def test_logits_with_and_without_a_prefix_hooks_and_folding(model, expected):
    with pytest.warns(UserWarning, match="center_unembed"):
        folded = LoopedTransformer.from_pretrained(FIXTURE, device="cpu")
    for arguments, logits in cases(expected):
        tokens = expected["tokens"]
        assert relative_error(model(tokens, **arguments), logits) < TOLERANCE
        cached, _ = model.run_with_cache(tokens, **arguments)
        assert relative_error(cached, logits) < TOLERANCE
        assert relative_error(folded(tokens, **arguments), logits) < TOLERANCE
    assert not torch.allclose(expected["logits"], expected["logits_prefix"], atol=1e-2)


def test_the_state_of_every_call_and_every_layer(model, expected):
    _, cache = model.run_with_cache(expected["tokens"])
    layout = model.layout
    assert "".join(layout.stacks) == "LLLHLLLH"
    assert expected["stack_out"].shape[0] == layout.n_iterations
    for t in range(layout.n_iterations):
        state = cache[f"iter.{t}.hook_state_out"]
        assert relative_error(state, expected["stack_out"][t]) < TOLERANCE
    assert expected["layer_out"].shape[0] == layout.n_layers
    for index in range(layout.n_layers):
        resid = cache["resid_post", index]
        assert relative_error(resid, expected["layer_out"][index]) < TOLERANCE


def test_cached_decoding_behind_a_prefix_of_one_call(model, expected):
    tokens, n_prefix = expected["tokens"], int(expected["token_type_ids"][0].sum())
    for arguments, logits in cases(expected):
        past = KeyValueCache.init_cache(model.cfg, "cpu", tokens.shape[0])
        prefix = {key: value[:, :n_prefix] for key, value in arguments.items()}
        steps = [model(tokens[:, :n_prefix], past_kv_cache=past, **prefix)]
        for pos in range(n_prefix, tokens.shape[1]):
            steps.append(model(tokens[:, pos : pos + 1], past_kv_cache=past))
        assert relative_error(torch.cat(steps, dim=1), logits) < TOLERANCE


def test_left_padding_changes_nothing(model, expected):
    tokens, n_pad = expected["tokens"], 3
    padded = torch.cat([torch.full_like(tokens[:, :n_pad], 7), tokens], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :n_pad] = 0
    for arguments, logits in cases(expected):
        # Marking padding as prefix must not let anything see it.
        prefix = {
            key: torch.nn.functional.pad(value, (n_pad, 0), value=1)
            for key, value in arguments.items()
        }
        again = model(padded, attention_mask=mask, **prefix)
        assert relative_error(again[:, n_pad:], logits) < TOLERANCE


def test_gradients_flow_through_every_call(model, expected):
    """The reference cuts them in all but the last calls of the fast stack."""
    states = []

    def keep(state, hook):
        state.retain_grad()
        states.append(state)

    names = [f"iter.{t}.hook_state_out" for t in range(8)]
    with model.hooks([(name, keep) for name in names]):
        loss = model(expected["tokens"], return_type="loss")
    loss.backward()
    assert all(state.grad.abs().sum() > 0 for state in states)
    assert all(p.grad.abs().sum() > 0 for _, p in model.physical_named_parameters())
    model.zero_grad()


CONFIGS = [
    dict(H_cycles=2, L_cycles=3, num_hidden_layers=2),
    dict(H_cycles=1, L_cycles=1, num_hidden_layers=1, embedding_scale=3.0),
    dict(H_cycles=3, L_cycles=2, num_hidden_layers=1, rms_norm_eps=1e-4),
    dict(H_cycles=2, L_cycles=1, num_hidden_layers=3, tie_word_embeddings=True),
]


@pytest.mark.parametrize("changes", CONFIGS)
def test_transformers_own_implementation_on_random_models(changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "HrmTextForCausalLM"):
        pytest.skip("this version of transformers has no HRM-Text")
    sizes = dict(hidden_size=32, num_attention_heads=4, head_dim=8, intermediate_size=40)
    config = transformers.HrmTextConfig(
        vocab_size=50, max_position_embeddings=32, **{**sizes, **changes}
    )
    torch.manual_seed(0)
    theirs = transformers.HrmTextForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.3)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="tokenizer"):
        ours = LoopedTransformer.from_pretrained_no_processing(tmp_path, device="cpu")
    assert ours.cfg.n_iterations == config.H_cycles * (config.L_cycles + 1)
    tokens = torch.randint(0, 50, (2, 11))
    prefix = torch.zeros_like(tokens)
    prefix[0, :6] = 1
    prefix[1, :2] = 1
    with torch.no_grad():
        assert relative_error(ours(tokens), theirs(tokens).logits) < 1e-4
        their_logits = theirs(tokens, token_type_ids=prefix).logits
        assert relative_error(ours(tokens, prefix_mask=prefix), their_logits) < 1e-4
        mask = torch.ones_like(tokens)
        mask[0, :3] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        masked = theirs(tokens, attention_mask=mask, position_ids=positions).logits
        assert relative_error(ours(tokens, attention_mask=mask)[0, 3:], masked[0, 3:]) < 1e-4
