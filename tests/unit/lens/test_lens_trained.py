"""Lenses and attribution on the embedded model: text, padding, and what a trained loop does."""

import pytest
import torch

from tests.closeness import assert_close as close
from tl_loops import tasks
from tl_loops.attribution import attribution_patch
from tl_loops.lens import coda_lens, logit_lens, track_entities, train_tuned_lens
from tl_loops.model.looped import LoopedTransformer
from tl_loops.patching import activation_patch

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny")


@pytest.fixture(scope="module")
def pair():
    return tasks.sample_pair()


def test_each_iteration_reads_out_the_next_hop(model, pair):
    prompt = pair[0]
    predictions = coda_lens(model, prompt.text, positions="last").predictions
    words = [word.strip() for word in model.to_str_tokens(predictions.flatten())]
    n_hops = len(prompt.hops)
    assert words[:n_hops] == list(prompt.hops) and set(words[n_hops:]) == {prompt.answer}


def test_intermediate_answers_come_one_after_the_other(model, pair):
    prompt = pair[0]
    tracks = track_entities(model, prompt.text, {hop: hop for hop in prompt.hops})
    assert tracks.first_point().flatten().tolist() == list(range(len(prompt.hops)))
    answer, before = prompt.hops[-1], prompt.hops[-2]
    assert tracks.leads_from(answer, before).tolist() == [len(prompt.hops) - 1]
    assert tracks.accuracy()[-1, -1] == 1 and tracks.probability[-1, -1] > 0.9


def test_words_are_tracked_for_each_prompt(model, pair):
    texts = [prompt.text for prompt in pair]
    answers = [prompt.answer for prompt in pair]
    result = coda_lens(model, texts, positions="last", track={"answer": answers})
    ids = [[model.to_single_token(answer)] for answer in answers]
    assert result.tracked["answer"].tokens.tolist() == ids
    assert result.tracked["answer"].rank[-1].flatten().tolist() == [1, 1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lens", [logit_lens, coda_lens])
def test_texts_of_different_length_are_read_as_if_alone(model, pair, side, lens):
    texts = [pair[0].text, pair[0].text.split(" . ", 3)[-1]]
    before = model.tokenizer.padding_side
    try:
        model.tokenizer.padding_side = side
        both = lens(model, texts, positions="last", keep_logits=True)
    finally:
        model.tokenizer.padding_side = before
    for row, text in enumerate(texts):
        alone = lens(model, text, positions="last", keep_logits=True)
        close(both.logits[:, row], alone.logits[:, 0], atol=1e-4, rtol=1e-4)
    assert both.real.all() and both.tokens.shape[0] == 2


def test_text_that_is_not_one_token_is_refused(model, pair):
    with pytest.raises(ValueError, match="which is 2 tokens"):
        coda_lens(model, pair[0].text, track={"answer": "Dan Leo"})


def test_a_tuned_lens_learns_from_text(model, pair):
    prompts = [pair[0].text, pair[1].text]
    lens = train_tuned_lens(model, prompts, points="states", n_steps=15, progress=False)
    assert (lens.losses[-1] < lens.losses[0]).all()


@pytest.mark.parametrize(
    ("options", "least"),
    [({"method": "gradient"}, 0.6), ({"method": "integrated_inputs", "n_steps": 50}, 0.75)],
)
def test_attribution_finds_what_patching_finds(model, pair, options, least):
    """Between two answers that the loop holds the way is steep: few steps would miss it."""
    clean, corrupted = (model.to_tokens(prompt.text) for prompt in pair)
    right, wrong = (model.to_single_token(prompt.answer) for prompt in pair)

    def metric(logits):
        return logits[0, -1, right] - logits[0, -1, wrong]

    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        base = metric(model(corrupted))
    for activation, axes in (("state_out", ("iteration", "pos")), ("mlp_out", ("block", "pos"))):
        with torch.no_grad():
            exact = activation_patch(
                model, corrupted, cache, metric, activation, axes, progress=False
            )
        ours = attribution_patch(model, corrupted, cache, metric, activation, axes, **options)
        both = torch.stack([ours.flatten(), (exact - base).flatten()])
        assert torch.corrcoef(both)[0, 1] > least
