"""One iteration is a feedforward model: it computes what HookedTransformer computes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.differential.pairs import architectures, close, pair, prompts, sample, texts
from tl_loops.upstream import HAS_HOOKED_TRANSFORMER, KeyValueCache

if not HAS_HOOKED_TRANSFORMER:
    pytest.skip("compares with HookedTransformer, which 4.0 removed", allow_module_level=True)


@sample
@given(architectures(), prompts())
def test_logits_and_losses_of_tokens(fields, tokens):
    looped, plain = pair(fields)
    ours, theirs = looped(tokens, return_type="both"), plain(tokens, return_type="both")
    close(ours.logits, theirs.logits)
    close(ours.loss, theirs.loss)
    arguments = dict(return_type="loss", loss_per_token=True)
    close(looped(tokens, **arguments), plain(tokens, **arguments))


@sample
@given(architectures(), texts(), st.sampled_from(["left", "right"]), st.booleans())
def test_texts_padded_on_either_side(fields, rows, side, prepend_bos):
    looped, plain = pair(fields)
    arguments = dict(padding_side=side, prepend_bos=prepend_bos)
    tokens = plain.to_tokens(rows, **arguments)
    assert torch.equal(looped.to_tokens(rows, **arguments), tokens)
    real = tokens != plain.tokenizer.pad_token_id
    close(looped(rows, **arguments)[real], plain(rows, **arguments)[real])
    if tokens.shape[1] < 2:
        return
    arguments["return_type"] = "loss"
    close(
        looped(rows, loss_per_token=True, **arguments)[real[:, 1:] & real[:, :-1]],
        plain(rows, loss_per_token=True, **arguments)[real[:, 1:] & real[:, :-1]],
    )
    if side == "left" or bool(real.all()):
        # With right padding TransformerLens averages over the padding as well.
        close(looped(rows, **arguments), plain(rows, **arguments))


@sample
@given(architectures(), prompts(), st.data())
def test_masks_of_tokens(fields, tokens, data):
    looped, plain = pair(fields)
    mask = _padding(tokens, data)
    ours = looped(tokens, attention_mask=mask, return_type="both")
    theirs = plain(tokens, attention_mask=mask, return_type="both")
    real = mask.bool()
    close(ours.logits[real], theirs.logits[real])
    if bool((real[:, 1:] & real[:, :-1]).any()):
        close(ours.loss, theirs.loss)


def _padding(tokens, data):
    mask = torch.ones_like(tokens)
    for row in mask:
        count = data.draw(st.integers(0, len(row) - 1))
        if data.draw(st.booleans()):
            row[:count] = 0
        else:
            row[len(row) - count :] = 0
    return mask


@sample
@given(architectures(), prompts(), st.data())
def test_key_value_caches_fed_in_pieces(fields, tokens, data):
    looped, plain = pair(fields)
    ours, theirs = (KeyValueCache.init_cache(m.cfg, "cpu", len(tokens)) for m in (looped, plain))
    mask = _padding(tokens, data) if data.draw(st.booleans()) else torch.ones_like(tokens)
    place = 0
    while place < tokens.shape[1]:
        end = place + data.draw(st.integers(1, tokens.shape[1] - place))
        piece, its_mask = tokens[:, place:end], mask[:, place:end]
        arguments = {} if bool(its_mask.all()) else dict(attention_mask=its_mask)
        real = its_mask.bool()
        a = looped(piece, past_kv_cache=ours, **arguments)
        b = plain(piece, past_kv_cache=theirs, **arguments)
        close(a[real], b[real])
        assert torch.equal(ours.previous_attention_mask, theirs.previous_attention_mask)
        if data.draw(st.booleans()) and place == 0:
            ours.freeze()
            theirs.freeze()
        else:
            place = end
            ours.unfreeze()
            theirs.unfreeze()


@sample
@given(architectures(), texts(), texts(), st.sampled_from(["left", "right"]))
def test_texts_and_then_more_tokens_into_a_key_value_cache(fields, rows, more, side):
    looped, plain = pair(fields, side)
    more = (more * 3)[: len(rows)]
    ours, theirs = (KeyValueCache.init_cache(m.cfg, "cpu", len(rows)) for m in (looped, plain))
    for piece, prepend in ((rows, True), (more, False)):
        arguments = dict(prepend_bos=prepend)
        real = plain.to_tokens(piece, **arguments) != plain.tokenizer.pad_token_id
        a = looped(piece, past_kv_cache=ours, **arguments)
        b = plain(piece, past_kv_cache=theirs, **arguments)
        close(a[real], b[real])


@sample
@given(architectures(), prompts(), st.data())
def test_stops_and_starts(fields, tokens, data):
    looped, plain = pair(fields)
    depth = plain.cfg.n_layers
    stop = data.draw(st.integers(-depth, depth))
    ours, theirs = (m(tokens, stop_at_layer=stop) for m in (looped, plain))
    close(ours, theirs)
    start = data.draw(st.integers(-depth, depth - 1))
    resid = torch.randn(*tokens.shape, plain.cfg.d_model, dtype=torch.float64)
    for kind in ("logits", "loss"):
        arguments = dict(start_at_layer=start, tokens=tokens, return_type=kind)
        close(looped(resid, **arguments), plain(resid, **arguments))


@sample
@given(
    architectures(),
    texts(),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
    st.sampled_from([dict(do_sample=False), dict(temperature=0.0)]),
    st.sampled_from([0.0, 0.7]),
)
def test_greedy_generation(fields, rows, count, cache, stop, how, penalty):
    looped, plain = pair(fields)
    arguments = dict(max_new_tokens=count, use_past_kv_cache=cache, stop_at_eos=stop, **how)
    arguments |= dict(freq_penalty=penalty, verbose=False, return_type="tokens")
    if len(rows) == 1:
        rows = rows[0]
    assert torch.equal(looped.generate(rows, **arguments), plain.generate(rows, **arguments))
    tokens = plain.to_tokens(rows if isinstance(rows, str) else rows[0])
    assert torch.equal(looped.generate(tokens, **arguments), plain.generate(tokens, **arguments))
    if plain.cfg.positional_embedding_type != "standard":
        arguments["return_type"] = "embeds"
        ours, theirs = (m.generate(m.embed(tokens), **arguments) for m in (looped, plain))
        close(ours, theirs)


@pytest.mark.parametrize("kind", ["top_k", "top_p", "plain"])
@sample
@given(architectures(), texts(), st.integers(0, 5))
def test_sampled_generation_draws_the_same(kind, fields, rows, seed):
    looped, plain = pair(fields)
    how = {"top_k": dict(top_k=3), "top_p": dict(top_p=0.8), "plain": dict(temperature=0.6)}[kind]
    drawn = []
    for model in (looped, plain):
        torch.manual_seed(seed)
        arguments = dict(max_new_tokens=4, verbose=False, return_type="tokens")
        drawn.append(model.generate(rows[0], **arguments, **how))
    assert torch.equal(*drawn)
