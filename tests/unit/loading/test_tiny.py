"""The model that ships with the package does what its card says."""

from pathlib import Path

import pytest
import torch

import tl_loops
from tl_loops import LoopedTransformer, tasks

DIRECTORY = Path(tl_loops.__file__).parent / "tiny"
PROMPTS = tasks.sample_prompts(10)


@pytest.fixture(scope="module")
def model() -> LoopedTransformer:
    torch.set_num_threads(1)
    return LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny", device="cpu")


def answers(model: LoopedTransformer, n_iterations: int) -> list[str]:
    tokens = model.to_tokens([prompt.text for prompt in PROMPTS])
    with torch.no_grad():
        best = model(tokens, n_iterations=n_iterations)[:, -1].argmax(-1)
    return [model.to_single_str_token(index) for index in best.tolist()]


def test_one_iteration_is_one_hop(model):
    for t in range(1, 7):
        given = answers(model, t)
        assert tasks.score(PROMPTS, given, n_iterations=t) >= 0.95, t
        beyond = [(p, a) for p, a in zip(PROMPTS, given, strict=True) if p.n_hops > t]
        if beyond:
            assert tasks.score([p for p, _ in beyond], [a for _, a in beyond]) <= 0.05, t


@pytest.mark.parametrize("n_iterations", [8, 12, 16])
def test_the_answer_is_held(model, n_iterations: int):
    assert model.cfg.n_iterations == 8
    assert tasks.score(PROMPTS, answers(model, n_iterations)) >= 0.95


def test_another_initial_state_gives_the_same_answers(model):
    state = 0.02 * torch.randn(1, 64, model.cfg.d_model, generator=torch.Generator().manual_seed(9))
    tokens = model.to_tokens([prompt.text for prompt in PROMPTS])
    with torch.no_grad():
        initial = state[:, : tokens.shape[1]].expand(len(PROMPTS), -1, -1)
        best = model(tokens, initial_state=initial)[:, -1].argmax(-1)
    assert tasks.score(PROMPTS, [model.to_single_str_token(i) for i in best.tolist()]) >= 0.95


def test_the_facts_decide(model):
    """A corrupted prompt gets its own answer: the model reads the facts, not the group."""
    corrupted = [tasks.corrupt(prompt) for prompt in PROMPTS]
    tokens = model.to_tokens([prompt.text for prompt in corrupted])
    with torch.no_grad():
        best = model(tokens)[:, -1].argmax(-1)
    assert tasks.score(corrupted, [model.to_single_str_token(i) for i in best.tolist()]) >= 0.95


def test_it_is_small_and_has_its_card():
    assert (DIRECTORY / "model.safetensors").stat().st_size <= 3_000_000
    card = (DIRECTORY / "README.md").read_text("utf-8")
    assert "(1, 2⊗8, 1)_I" in card and "MIT" in card


def test_tokens_are_the_words_with_bos_in_front_once(model):
    prompt = PROMPTS[-1]
    assert model.to_str_tokens(prompt.text) == ["<bos>", *prompt.words]
    assert model.to_tokens(prompt.text, prepend_bos=False).shape[1] == len(prompt.words)
    vocabulary = model.tokenizer.get_vocab()
    assert sorted(vocabulary, key=vocabulary.__getitem__) == tasks.vocabulary()
    assert model.cfg.d_vocab == len(vocabulary)
    tokenizer = model.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<pad>", "<unk>")


def test_transformers_reads_the_tokenizer():
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    for loader in (AutoTokenizer, PreTrainedTokenizerFast):
        tokenizer = loader.from_pretrained(str(DIRECTORY), local_files_only=True)
        ids = tokenizer("Ann likes Bob. Quy").input_ids
        words = ["<bos>", "Ann", "likes", "Bob", ".", "<unk>"]
        assert tokenizer.convert_ids_to_tokens(ids) == words


def test_generation_answers_and_stops(model):
    right = 0
    for prompt in PROMPTS[::6]:
        text = model.generate(prompt.text, max_new_tokens=5, do_sample=False, verbose=False)
        right += text[len(prompt.text) :].replace("<eos>", "").strip() == prompt.answer
    assert right >= 9
