"""Tuned lens: identity at the start, learning, saving, refusals."""

import dataclasses

import pytest
import torch

from tests.closeness import assert_close as close
from tests.models import tiny_model, tiny_tokens
from tl_loops.errors import CheckpointError
from tl_loops.lens import TunedLens, logit_lens, read_lens, train_tuned_lens, tuned

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return tiny_model("retrofitted", initializer_range=0.15)


@pytest.fixture(scope="module")
def prompts():
    return [*tiny_tokens(batch=6, pos=8), *tiny_tokens(batch=4, pos=5, seed=5)]


def train(model, prompts, **options):
    options = {"n_steps": 3, "batch_size": 4, "progress": False, **options}
    return train_tuned_lens(model, prompts, **options)


@pytest.fixture(scope="module")
def lens(model, prompts):
    return train(model, prompts, n_steps=40, learning_rate=5e-3)


def test_an_untrained_lens_is_the_logit_lens(model, lens):
    untrained = dataclasses.replace(
        lens, weight=torch.zeros_like(lens.weight), bias=torch.zeros_like(lens.bias)
    )
    tokens = tiny_tokens()
    tuned = read_lens(model, tokens, untrained, keep_logits=True)
    close(tuned.logits, logit_lens(model, tokens, points="core", keep_logits=True).logits)
    assert tuned.lens == "tuned" and tuned.labels == [
        "r0.0",
        "r0.1",
        "r1.0",
        "r1.1",
        "r2.0",
        "r2.1",
    ]


def test_training_brings_every_point_nearer_to_the_output(model, lens):
    # Tokens that the training has not seen.
    tokens = tiny_tokens(batch=8, pos=8, seed=11)
    tuned = read_lens(model, tokens, lens).kl_to_final.mean((1, 2))
    plain = logit_lens(model, tokens, points="core").kl_to_final.mean((1, 2))
    assert (tuned < 0.9 * plain).all()
    assert (lens.losses[-5:].mean(0) < lens.losses[:5].mean(0)).all()


def test_the_first_loss_is_the_divergence_of_the_logit_lens(model, prompts):
    lens = train(model, [prompts[0]], n_steps=1, batch_size=1)
    plain = logit_lens(model, prompts[0], points="core").kl_to_final.mean((1, 2))
    close(lens.losses[0], plain)


def test_prompts_of_different_length_count_by_their_positions(model, prompts):
    two = [prompts[0], prompts[-1]]
    generator = torch.Generator()
    seed = next(
        s
        for s in range(100)
        if torch.randint(2, (2,), generator=generator.manual_seed(s)).tolist() == [0, 1]
    )
    lens = train(model, two, n_steps=1, batch_size=2, generator=generator.manual_seed(seed))
    sums = [logit_lens(model, p, points="core").kl_to_final.sum((1, 2)) for p in two]
    close(lens.losses[0], (sums[0] + sums[1]) / 13)


def test_at_the_last_block_there_is_nothing_to_learn(model, prompts):
    lens = train(model, prompts, points="coda.0.hook_resid_post")
    assert lens.losses[0].item() == pytest.approx(0, abs=1e-6)


def test_states_behind_a_norm_are_translated_as_they_are(prompts):
    model = tiny_model("ouro", initializer_range=0.15)
    lens = train(model, prompts, points="states")
    assert lens.losses[0, -1] < 1e-6 < lens.losses[0, 0]


def test_training_is_deterministic_and_depends_on_the_generator(model, prompts):
    def weight(seed):
        return train(model, prompts, generator=torch.Generator().manual_seed(seed)).weight

    assert torch.equal(weight(0), weight(0))
    assert not torch.equal(weight(0), weight(1))
    assert torch.equal(weight(0), train(model, prompts).weight)


def test_the_model_is_left_alone(prompts):
    model = tiny_model("retrofitted")
    before = {name: value.clone() for name, value in model.physical_state_dict().items()}
    train(model, prompts)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[n]) for n, value in model.physical_state_dict().items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_does_not_depend_on_the_gradient_mode(model, prompts, mode):
    with mode():
        inside = train(model, prompts)
    close(inside.weight, train(model, prompts).weight)
    assert not inside.weight.requires_grad and not inside.weight.is_inference()


def test_frozen_weights(prompts):
    model = tiny_model("retrofitted", initializer_range=0.15)
    free = train(model, prompts)
    close(train(model.requires_grad_(False), prompts).weight, free.weight)


def test_bfloat16(prompts):
    lens = train(tiny_model("huginn", dtype=torch.bfloat16), prompts)
    assert lens.weight.dtype == torch.float32 and lens.weight.isfinite().all()


def test_saving_and_loading(tmp_path, model, lens):
    lens.save(tmp_path / "lens.safetensors")
    loaded = TunedLens.load(tmp_path / "lens.safetensors")
    assert loaded.points == lens.points and loaded.sizes == lens.sizes
    for name in ("weight", "bias", "losses"):
        assert torch.equal(getattr(loaded, name), getattr(lens, name))
    tokens = tiny_tokens()
    ours = read_lens(model, tokens, lens).entropy
    assert torch.equal(read_lens(model, tokens, loaded).entropy, ours)
    assert [path.name for path in tmp_path.iterdir()] == ["lens.safetensors"]


def test_a_lens_reads_longer_loops_at_the_iterations_that_it_knows(model, lens):
    tokens = tiny_tokens()
    result = read_lens(model, tokens, lens, n_iterations=5)
    assert [point.alias for point in result.points] == list(lens.points)
    with pytest.raises(ValueError, match=r"no translator for iter\.3\.0"):
        read_lens(model, tokens, lens, n_iterations=5, points="core")


def test_damaged_and_foreign_files_are_refused(tmp_path, lens):
    path = tmp_path / "lens.safetensors"
    with pytest.raises(FileNotFoundError, match="no file"):
        TunedLens.load(path)
    lens.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        TunedLens.load(path)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, path, {"kind": "jacobian_lens", "metadata": "{}"})
    with pytest.raises(ValueError, match="expected 'tuned_lens'"):
        TunedLens.load(path)
    save_file({"weight": torch.zeros(1)}, path, {"kind": "tuned_lens", "metadata": "{}"})
    with pytest.raises(ValueError, match="bias, losses"):
        TunedLens.load(path)


def test_another_model_is_refused(lens):
    with pytest.raises(ValueError, match="n_prelude=1"):
        read_lens(tiny_model("ouro"), tiny_tokens(), lens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": 0}, "n_steps must be positive"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"points": []}, "points is empty"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [torch.zeros(0, dtype=torch.long)]}, "prompt 0"),
    ],
)
def test_bad_options_are_refused(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        train(model, **{"prompts": prompts, **options})


def test_a_loss_that_is_not_finite_is_refused(prompts):
    model = tiny_model("retrofitted")
    with torch.no_grad():
        model.unembed.W_U.fill_(-1e37)
        model.unembed.W_U[:, 3] = 1e37
    with pytest.raises(FloatingPointError, match="not finite"):
        train(model, prompts)


def test_a_killed_training_goes_on_to_the_same_bits(model, prompts, tmp_path, monkeypatch):
    path = tmp_path / "lens.ckpt"
    options = dict(n_steps=5, learning_rate=5e-3, checkpoint_every=2)
    whole = train(model, prompts, **options)
    accumulate, steps = tuned._accumulate, 0

    def killed(*given):
        nonlocal steps
        steps += 1
        if steps == 4:  # one step after the file was written last
            raise KeyboardInterrupt
        return accumulate(*given)

    with monkeypatch.context() as patch:
        patch.setattr(tuned, "_accumulate", killed)
        with pytest.raises(KeyboardInterrupt):
            train(model, prompts, checkpoint=path, **options)
    resumed = train(model, prompts, checkpoint=path, **options)
    for name in ("weight", "bias", "losses"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name
    monkeypatch.setattr(tuned, "_accumulate", killed)
    steps = 3
    again = train(model, prompts, checkpoint=path, **options)  # without a step
    assert torch.equal(again.weight, whole.weight)
    for changed, message in (
        (dict(learning_rate=1e-3), "learning_rate is 0.005 there and 0.001"),
        (dict(prompts=prompts[::-1]), "prompts is"),
        (dict(generator=torch.Generator().manual_seed(1)), "generator is"),
    ):
        with pytest.raises(CheckpointError, match=f"another run: {message}"):
            train(**{"model": model, "prompts": prompts, "checkpoint": path, **options, **changed})
