"""A loop that the caller states, over the layers of a feedforward checkpoint."""

import json

import huggingface_hub
import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import tl_loops
from tl_loops import CheckpointError, ConfigError, HookedTransformer, LoopedTransformer
from tl_loops import UnknownModelError as Unknown

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9]])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=6,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(directory, **arguments):
    return LoopedTransformer.from_pretrained_no_processing(directory, **arguments)


def test_a_range_of_layers_of_any_integer_type(directory):
    looped = load(directory, loop=(np.int64(1), torch.tensor(4), 2))
    assert looped.cfg.notation == "(1, 3⊗2, 2)"
    assert_close(looped(TOKENS, n_iterations=1), load(directory)(TOKENS))


def test_fields_of_the_loop(directory):
    fields = dict(n_prelude=1, n_core=4, n_coda=1, n_iterations=3)
    plain = load(directory, loop=fields)
    normed = load(directory, loop={**fields, "norm_between_iterations": True})
    injected = load(directory, loop={**fields, "injection": "add", "initial_state": "zeros"})
    assert plain.cfg.notation == "(1, 4⊗3, 1)" and injected.cfg.notation == "(1, 4⊗3, 1)_I"
    _, cache = normed.run_with_cache(TOKENS)
    after = cache["resid_post", plain.layout.index(iteration=0, layer=3)]
    assert_close(cache["state_out", 0], normed.ln_final(after))
    _, cache = injected.run_with_cache(TOKENS)
    assert_close(cache["injected", 1], cache["state_in", 1] + cache["hook_injection"])


def test_the_number_of_iterations_may_be_given_beside_it(directory):
    assert load(directory, loop=(2, 4, 3), n_iterations=5).cfg.n_iterations == 5


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ((2, 9, 2), r"loop=\(2, 9, 2\) must lie within the 6 layers"),
        ((3, 3, 2), "0 <= start < stop <= 6"),
        ((1, 3), "loop must be .start, stop, n_iterations."),
        ((1.5, 3, 2), "loop must be .start, stop, n_iterations. with integers"),
        ((1, 3, 0), "n_iterations must be at least 1, got 0"),
        (dict(n_prelude=2, n_core=2, n_iterations=2), "has 6 layers: they must add up"),
        (dict(n_core=6, iterations=2), "loop has no field 'iterations': did you mean n_iterations"),
        (dict(n_core=6, d_model=8), "loop has no field 'd_model'"),
        (
            dict(n_core=6, injection="concat"),
            r"weights that .* does not have: injection\.W",
        ),
        (dict(n_core=6, exit_gate=True), "does not have: exit_gate"),
    ],
)
def test_a_loop_that_does_not_fit_raises(directory, loop, message):
    with pytest.raises((ConfigError, CheckpointError), match=message):
        load(directory, loop=loop)


def test_a_looped_checkpoint_has_its_own_loop():
    with pytest.raises(ConfigError, match=r"whose loop its config\.json says: leave loop= out"):
        load("tl-loops-tiny", loop=(0, 1, 2))


def test_blocks_of_a_known_family_under_another_name(directory, tmp_path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "config.json"
    renamed = {"model_type": "loopllama", "architectures": ["LoopLlamaForCausalLM"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **renamed}))
    with pytest.raises(CheckpointError, match=r"loop=\{'family': 'llama'"):
        load(tmp_path, loop=(1, 3, 2))
    stated = dict(family="llama", n_prelude=1, n_core=2, n_coda=3, n_iterations=2)
    assert_close(load(tmp_path, loop=stated)(TOKENS), load(directory, loop=(1, 3, 2))(TOKENS))
    with pytest.raises(CheckpointError, match="there is no family 'lama' of feedforward models"):
        load(tmp_path, loop={**stated, "family": "lama"})


def test_saved_with_its_loop(directory, tmp_path):
    looped = load(directory, loop=(1, 4, 2))
    looped.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.cfg.notation == looped.cfg.notation
    assert torch.equal(again(TOKENS), looped(TOKENS))


def test_a_repository_of_the_hub(directory, monkeypatch):
    asked = []

    def fetch(repository, **arguments):
        asked.append(repository)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert load("somebody/a-llama", loop=(1, 4, 2)).cfg.model_name == "a-llama"
    assert asked == ["somebody/a-llama"]
    with pytest.raises(Unknown, match="neither a directory nor a known looped model"):
        load("a-llama")


def test_a_repository_that_cannot_be_had_is_unknown():
    with pytest.raises(Unknown, match="As a repository of the hub: somebody/a-llama could not"):
        load("somebody/a-llama", local_files_only=True)


def test_a_feedforward_checkpoint_is_a_baseline(directory):
    generator = torch.Generator().manual_seed(0)
    prompts = list(torch.randint(0, 20, (3, 7), generator=generator))
    looped = tl_loops.measure(
        load(directory, loop=(0, 6, 2)), prompts, metrics=("mixing_score_log",), progress=False
    )
    baseline = tl_loops.measure(
        load(directory), prompts, metrics=("mixing_score_log",), progress=False
    )
    alignment = looped.align_stages(baseline, "mixing_score_log")
    # The first iteration is the feedforward model itself.
    assert_close(alignment.pearson[0], torch.ones_like(alignment.pearson[0]))


def test_transformer_lens_keeps_its_own_names(directory):
    with pytest.raises(Exception) as error:
        HookedTransformer.from_pretrained(str(directory), local_files_only=True)
    assert "loop" not in type(error.value).__name__.lower()
