"""What an analysis reads of its prompts."""

import pytest
import torch

from tests.unit.upstream.test_inputs import EOS, TEXTS, looped
from tl_loops.attribution import attribution_patch
from tl_loops.patching import ablate, activation_patch
from tl_loops.runs.inputs import lens_inputs, real_positions
from tl_loops.steering import difference_directions


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_token_is_read_though_it_has_the_id_of_padding(side):
    inputs = lens_inputs(looped(side), "a b <eos>", "last")
    assert inputs.attention_mask is None
    assert inputs.tokens[0, inputs.positions[0]].tolist() == [EOS]


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_texts_last_real_token_is_read(side):
    inputs = lens_inputs(looped(side), TEXTS, "last")
    read = inputs.tokens.gather(1, inputs.positions)
    assert torch.equal(read, torch.full((2, 1), 4))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_patched_runs_of_text_mask_its_padding_and_nothing_else(side):
    """The padding token is also the end of a text; the second text holds a real one."""
    model = looped(side)
    _, clean = model.run_with_cache(TEXTS, padding_side=side)
    expected = model(TEXTS, padding_side=side)
    seen = []

    def metric(logits):
        seen.append(logits)
        return logits.mean()

    activation_patch(model, TEXTS, clean, metric, "resid_pre", ("block",), progress=False)
    for logits in seen[1:]:  # The first call is on random numbers.
        torch.testing.assert_close(logits, expected)
    effects = attribution_patch(model, TEXTS, clean, lambda logits: logits.mean(), axes=("block",))
    assert effects.abs().max() < 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_count_along_real_tokens(side):
    _, cache = looped(side).run_with_cache(TEXTS, names_filter="hook_embed")
    batch, n_pos, _ = cache["hook_embed"].shape
    first = 5 if side == "left" else 0
    assert real_positions(cache, batch, n_pos).sum(1).tolist() == [3, 8]
    assert real_positions(cache, batch, n_pos, -1).int().argmax(1).tolist() == [first + 2, 7]
    assert real_positions(cache, batch, n_pos, 0).int().argmax(1).tolist() == [first, 0]
    with pytest.raises(IndexError, match="there is no pos 3"):
        real_positions(cache, batch, n_pos, 3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pos", [-1, None])
@torch.no_grad()
def test_differences_of_padded_texts_are_those_of_the_texts_alone(side, pos):
    model = looped(side)
    _, positive = model.run_with_cache(TEXTS)
    _, negative = model.run_with_cache("e f")
    found = difference_directions(model, positive, negative, pos=pos)
    alone, read = [], slice(None) if pos is None else slice(-1, None)
    for text in [*TEXTS, "e f"]:
        _, cache = model.run_with_cache(text)
        alone.append(cache.stack_activation("resid_post", by_iteration=True)[..., 0, read, :])
    mean = torch.cat(alone[:-1], -2).mean(-2)
    expected = mean - alone[-1].mean(-2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mean_over", ["batch", "batch_pos"])
@torch.no_grad()
def test_ablation_takes_the_mean_over_real_tokens(side, mean_over):
    model, name = looped(side), "blocks.1.hook_attn_out"
    _, reference = model.run_with_cache(TEXTS)
    assert reference.mask is not None
    tokens = model.to_tokens(TEXTS[1])
    whole, real = reference[name], reference.mask[..., None]
    axes = (0,) if mean_over == "batch" else (0, 1)
    mean = (whole * real).sum(axes, keepdim=True) / real.sum(axes, keepdim=True)
    found = ablate(
        model,
        tokens,
        lambda logits: logits.square().mean(),
        "attn_out",
        ("block",),
        "mean",
        reference,
        mean_over=mean_over,
        where={"block": 1},
        progress=False,
    )
    hooks = [(name, lambda x, hook: mean.expand_as(x).clone())]
    expected = model.run_with_hooks(tokens, fwd_hooks=hooks).square().mean()
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=0)
