"""Forced-exit curves against the model's own readout, one iteration at a time."""

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.closeness import assert_close
from tests.feedforward import plain_model
from tests.models import ARCHITECTURES, tiny_model
from tests.unit.upstream.test_inputs import BOS
from tests.unit.upstream.test_inputs import looped as with_tokenizer
from tl_loops.lens.exit_curve import exit_curve
from tl_loops.metrics.answers import answer_flips, oracle_headroom, overthinking
from tl_loops.metrics.readout import kl_divergence

LENGTHS = (7, 4, 7)


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (n,), generator=generator) for n in lengths]


@cache
def looped(architecture: str):
    return tiny_model(architecture)


def curve(model, *args, **kwargs):
    return exit_curve(model, *args, progress=False, **kwargs)


def own_logits(model, tokens: Tensor) -> Tensor:
    """Logits of models that have t + 1 iterations: [iteration, pos, d_vocab]."""
    with torch.no_grad():
        n = model.cfg.n_iterations
        return torch.cat([model(tokens[None], n_iterations=t + 1) for t in range(n)])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_curves_are_those_of_models_with_fewer_iterations(architecture):
    model, given = looped(architecture), prompts()
    got = curve(model, given, batch_size=2)
    expected: dict[str, list[Tensor]] = {}
    for tokens in given:
        logits, targets = own_logits(model, tokens)[:, :-1], tokens[1:]
        predicted = logits.argmax(-1)
        losses = -logits.log_softmax(-1).gather(-1, targets.expand(len(logits), -1)[..., None])
        right = predicted == targets
        values = {
            "loss": losses.mean((1, 2)),
            "accuracy": right.float().mean(-1),
            "kl_to_last": kl_divergence(logits[-1:].expand_as(logits), logits).mean(-1),
            "overthinking": overthinking(right),
            "oracle_headroom": oracle_headroom(right),
            "flips": answer_flips(predicted).float().mean(),
        }
        for name, value in values.items():
            expected.setdefault(name, []).append(value)
    for name, per_prompt in expected.items():
        value = torch.stack(per_prompt).double().mean(0)
        assert_close(
            torch.as_tensor(getattr(got, name), dtype=torch.float64), value, rtol=1e-4, atol=1e-5
        )
    assert (got.n_prompts, got.n_targets) == (3, 6 + 3 + 6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_point_is_the_models_own_loss(architecture):
    model, tokens = looped(architecture), prompts((8,))[0]
    with torch.no_grad():
        own = model(tokens[None], return_type="loss")
    got = curve(model, [tokens])
    assert got.loss[-1].item() == pytest.approx(own.item(), abs=1e-5)
    assert got.kl_to_last[-1] == 0 and got.overthinking[-1] == 0
    assert math.isnan(got.flip_rate[0]) and got.moments["flip_rate"].undefined[0] == 0


def test_exits_of_a_gated_model_are_its_trained_ones():
    model, tokens = looped("ouro"), prompts((8,))[0]
    with torch.no_grad():
        own = [model(tokens[None], exit_at=t, return_type="loss").item() for t in range(4)]
    assert curve(model, [tokens]).loss.tolist() == pytest.approx(own, abs=1e-5)


def test_answers_are_read_behind_their_prompts():
    model, given = looped("huginn"), prompts((6, 6))
    answers = [torch.tensor([7, 9]), torch.tensor([3, 1])]
    got = curve(model, given, answers)
    losses = []
    for prompt, answer in zip(given, answers, strict=True):
        logits = own_logits(model, torch.cat([prompt, answer[:1]]))[:, -2:]
        losses.append(-logits.log_softmax(-1)[:, [0, 1], answer].mean(-1))
    assert_close(got.loss.float(), torch.stack(losses).mean(0), rtol=1e-4, atol=1e-5)
    assert got.n_targets == 4


def test_an_answer_is_right_when_all_of_its_tokens_are():
    model, prompt = looped("retrofitted"), prompts((6,))[0]
    said = own_logits(model, prompt)[-1, -1].argmax()
    then = own_logits(model, torch.cat([prompt, said[None]]))[-1, -1].argmax()
    right, half = torch.stack([said, then]), torch.stack([said, (then + 1) % 50])
    assert curve(model, [prompt], [right]).accuracy[-1] == 1
    assert curve(model, [prompt], [half]).accuracy[-1] == 0
    assert curve(model, [prompt], [int(said)]).accuracy[-1] == 1
    both = curve(model, [prompt, prompt], [right, half])
    assert both.accuracy[-1] == 0.5 and both.std("accuracy")[-1] == pytest.approx(0.5**0.5)


def test_answers_given_as_text_are_tokenised_without_bos():
    model = with_tokenizer()
    got = curve(model, ["a b c"], ["d e"])
    prompt, answer = torch.tensor([BOS, 3, 4, 5]), torch.tensor([6, 7])
    assert torch.equal(got.loss, curve(model, [prompt], [answer]).loss)


def test_padding_of_the_vocabulary_is_never_an_answer():
    model = tiny_model("retrofitted", padded_vocab=40)
    with torch.no_grad():
        model.unembed.b_U[40:] = 100.0  # the padding would win everywhere
    tokens = prompts((8,))[0] % 40
    with torch.no_grad():
        said = model(tokens[None])[0, -1, :40].argmax()
    got = curve(model, [tokens], [int(said)])
    assert got.accuracy[-1] == 1
    assert got.loss[-1] > 50  # the loss is the model's own, over all columns
    logits = own_logits(model, tokens)[:, -1]
    kl = kl_divergence(logits[-1:].expand_as(logits), logits, 40).double()
    assert_close(got.kl_to_last, kl, rtol=1e-4, atol=1e-5)


def test_the_last_token_of_an_answer_needs_no_position():
    model = looped("layer_norm")  # has 64 learned positions
    assert curve(model, prompts((64,)), [3]).n_targets == 1


def test_neither_batches_nor_iterations_asked_for_change_the_model():
    model = looped("huginn")
    a, b = (curve(model, prompts(), n_iterations=5, batch_size=n) for n in (1, 8))
    assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-6)
    assert a.loss.shape == (5,) and model.cfg.n_iterations == 3
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_one_iteration_has_no_step():
    got = curve(looped("ouro"), prompts(), n_iterations=1)
    assert got.flips == 0 and got.kl_to_last.tolist() == [0] and got.oracle_headroom == 0


def test_the_table_is_tidy():
    table = curve(looped("ouro"), prompts()).to_frame()
    assert list(table.columns) == ["curve", "iteration", "mean", "std", "count", "undefined"]
    assert len(table) == 4 * 4 + 3  # no flip at the first iteration
    assert not table["mean"].isna().any() and (table["count"] == 3).all()


def test_the_progress_bar_counts_prompts(capsys):
    exit_curve(looped("ouro"), prompts())
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "answers", "message"),
    [
        (prompts((1,)), None, "prompt 0 has 1 token"),
        (prompts(), [1, 2], "3 prompts but 2 answers"),
        (prompts((3,)), ["text"], "no tokenizer"),
        (prompts((3,)), [torch.tensor([0.5])], "answer 0"),
        (prompts((3,)), [50], "ids below 50"),
        (prompts((3,)), [torch.tensor([], dtype=torch.int64)], "answer 0"),
        (prompts((64,)), [torch.tensor([1, 2])], "n_ctx=64"),
    ],
)
def test_bad_input_is_refused(given, answers, message):
    with pytest.raises(ValueError, match=message):
        curve(looped("retrofitted"), given, answers)


def test_a_feedforward_model_has_no_exits():
    model = plain_model(
        n_layers=1, d_model=8, d_head=4, n_heads=2, d_mlp=8, d_vocab=50, n_ctx=16, act_fn="gelu",
        device="cpu",
    )  # fmt: skip
    with pytest.raises(TypeError, match="no loop layout"):
        curve(model, prompts((4,)))
