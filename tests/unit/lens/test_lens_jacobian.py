"""Jacobian lens: closed forms, the definition, averages, saving, refusals."""

import pytest
import torch

from tests.closeness import assert_close as close
from tests.models import ARCHITECTURES, tiny_model, tiny_tokens
from tl_loops.lens import (
    JacobianLens,
    fit_jacobian_lens,
    logit_lens,
    read_lens,
    transport_similarity,
)

torch.set_num_threads(1)
D = 32


def fit(model, prompts, **options):
    return fit_jacobian_lens(model, prompts, **{"progress": False, **options})


def without_branches(architecture, **changes):
    """A model whose blocks add nothing: pre-norm blocks with zero output weights."""
    model = tiny_model(architecture, initializer_range=0.15, **changes)
    with torch.no_grad():
        for name, parameter in model.physical_named_parameters():
            if name.endswith(("W_O", "W_out", "b_O", "b_out")):
                parameter.zero_()
    return model


@pytest.fixture(scope="module")
def prompts():
    return list(tiny_tokens(batch=2, pos=5))


# --- closed forms ---


def test_blocks_that_add_nothing_give_the_logit_lens(prompts):
    model = without_branches("layer_norm")
    lens = fit(model, prompts, points="blocks")
    close(lens.jacobians, torch.eye(D).expand(7, D, D))
    tokens = tiny_tokens()
    ours = read_lens(model, tokens, lens, keep_logits=True)
    close(ours.logits, logit_lens(model, tokens, keep_logits=True).logits)
    assert ours.lens == "jacobian"


@pytest.mark.parametrize("architecture", ["retrofitted", "weightless"])
def test_a_linear_loop_transports_by_powers_of_its_map(architecture, prompts):
    model = without_branches(architecture)
    M = model.injection.W_state.detach().T
    lens = fit(model, prompts, points="core")
    for point, J in zip(lens.points, lens.jacobians, strict=True):
        t = int(point.split(".")[1])
        close(J, torch.linalg.matrix_power(M, 2 - t), atol=1e-6, rtol=1e-5)


def test_a_transported_state_is_read_where_the_linear_loop_would_take_it(prompts):
    model = without_branches("retrofitted")
    lens = fit(model, prompts, points="states")
    tokens = tiny_tokens()
    result = read_lens(model, tokens, lens, keep_logits=True)
    _, cache = model.run_with_cache(tokens)
    for t in range(3):
        moved = cache[f"iter.{t}.hook_state_out"]
        for _ in range(2 - t):
            moved = moved @ model.injection.W_state
        close(result.logits[t], model.unembed(model.ln_final(moved)), atol=1e-4, rtol=1e-4)


def test_the_injection_enters_at_every_iteration(prompts):
    model = without_branches("retrofitted")
    M, N = model.injection.W_state.detach().T, model.injection.W_injection.detach().T
    lens = fit(model, prompts, points=["hook_injection", "hook_initial_state", "hook_embed"])
    expected = sum(torch.linalg.matrix_power(M, j) @ N for j in range(3))
    close(lens.jacobians[0], expected, atol=1e-6, rtol=1e-5)
    close(lens.jacobians[1], torch.linalg.matrix_power(M, 3), atol=1e-6, rtol=1e-5)
    close(lens.jacobians[2], expected, atol=1e-6, rtol=1e-5)


def test_a_contraction_forgets_early_iterations(prompts):
    model = without_branches("olmo_grouped", n_iterations=6)
    with torch.no_grad():  # exp(-softplus(dt) exp(A)) = 1/2 in every dimension
        model.injection.dt_bias.zero_()
        model.injection.A_log.zero_()
    lens = fit(model, prompts, points="states")
    for t, J in enumerate(lens.jacobians):
        close(J, torch.eye(D) * 0.5 ** (5 - t), atol=1e-6, rtol=1e-5)
    close(transport_similarity(lens.jacobians), torch.ones(6, 6))


# --- the definition ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_jacobian_is_what_differentiating_each_entry_gives(architecture):
    """Sum over target positions of d h_target[s'] / d h[s], averaged over s, one by one."""
    model = tiny_model(architecture, initializer_range=0.15)
    tokens = tiny_tokens(batch=1, pos=3)
    point = "iter.1.0.hook_resid_post"
    last = model.cfg.n_layers - 1

    def to_target(residual):
        kept = {}
        model.run_with_hooks(
            tokens,
            fwd_hooks=[
                (point, lambda x, hook: residual),
                (f"blocks.{last}.hook_resid_post", lambda x, hook: kept.update(h=x)),
            ],
        )
        return kept["h"]

    _, cache = model.run_with_cache(tokens)
    full = torch.autograd.functional.jacobian(to_target, cache[point].detach())[0, :, :, 0]
    expected = full.sum(0).mean(1)  # [target, out, source, in]
    lens = fit(model, [tokens[0]], points=point)
    close(lens.jacobians[0], expected, atol=1e-5, rtol=1e-4)
    assert full[0, :, 1:].abs().max() < 1e-6  # nothing flows to earlier positions


@pytest.fixture(scope="module")
def model():
    return tiny_model("huginn", initializer_range=0.15)


@pytest.mark.parametrize("vjp_batch_size", [1, 7, 100])
def test_batching_does_not_matter(model, prompts, vjp_batch_size):
    close(
        fit(model, prompts, points="states", vjp_batch_size=vjp_batch_size).jacobians,
        fit(model, prompts, points="states").jacobians,
        atol=1e-6,
        rtol=1e-5,
    )


def test_prompts_are_averaged_each_at_its_own_length(model, prompts):
    three = [*prompts, tiny_tokens(batch=1, pos=8, seed=9)[0]]
    lens = fit(model, three)
    alone = torch.stack([fit(model, [prompt]).jacobians for prompt in three])
    close(lens.jacobians, alone.mean(0), atol=1e-6, rtol=1e-5)
    assert lens.n_prompts == 3


def test_skipped_positions_are_no_sources(model, prompts):
    """With all but the last position skipped, only the last target is left."""
    lens = fit(model, [prompts[0]], points="iter.2.1.hook_resid_post", skip_positions=4)
    _, cache = model.run_with_cache(prompts[0][None])
    point = lens.points[0]

    def to_target(residual):
        whole = torch.cat([cache[point][:, :4], residual[None, None]], dim=1)
        kept = {}
        model.run_with_hooks(
            prompts[0][None],
            fwd_hooks=[
                (point, lambda x, hook: whole),
                ("coda.1.hook_resid_post", lambda x, hook: kept.update(h=x)),
            ],
        )
        return kept["h"][0, -1]

    expected = torch.autograd.functional.jacobian(to_target, cache[point][0, -1].detach())
    close(lens.jacobians[0], expected, atol=1e-5, rtol=1e-4)


def test_frozen_weights_and_gradient_modes(prompts):
    model = tiny_model("olmo_grouped", initializer_range=0.15)
    free = fit(model, prompts, points="blocks").jacobians
    model.requires_grad_(False)
    close(fit(model, prompts, points="blocks").jacobians, free)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            close(fit(model, prompts, points="blocks").jacobians, free)


def test_what_the_target_does_not_depend_on_has_no_jacobian(prompts):
    """Without injection a random state hides the embedding from the loop."""
    model = tiny_model("ouro", initial_state="normal", injection=None)
    lens = fit(model, prompts, points=["hook_embed", "iter.0.hook_state_out"])
    assert lens.jacobians[0].abs().max() == 0 and lens.jacobians[1].abs().max() > 0


def test_the_model_is_left_alone(model, prompts):
    fit(model, prompts)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(point._forward_hooks for point in model.hook_dict.values())


def test_bfloat16(prompts):
    model = tiny_model("huginn", dtype=torch.bfloat16, initializer_range=0.15)
    lens = fit(model, prompts, points="states")
    assert lens.jacobians.dtype == torch.float32
    result = read_lens(model, tiny_tokens(), lens, keep_logits=True)
    assert result.logits.dtype == torch.bfloat16 and result.entropy.isfinite().all()


# --- targets and readouts ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_its_target_a_point_is_read_as_it_is(architecture, prompts):
    model = tiny_model(architecture, initializer_range=0.15)
    end = f"iter.{model.cfg.n_iterations - 1}.hook_state_out"
    lens = fit(model, prompts[:1], points=end, target=end, readout="coda")
    tokens = tiny_tokens()
    close(read_lens(model, tokens, lens, keep_logits=True).logits[0], model(tokens))


def test_loop_ends_are_the_ends_of_each_points_own_iteration(prompts):
    model = tiny_model("ouro", initializer_range=0.15)
    lens = fit(model, prompts, target="loop_ends")
    assert lens.targets[:4] == (*["iter.0.hook_state_out"] * 3, "iter.1.hook_state_out")
    for t in range(4):
        points = [point for point in lens.points if point.startswith(f"iter.{t}.")]
        alone = fit(model, prompts, points=points, target=f"iter.{t}.hook_state_out")
        close(alone.jacobians, lens.jacobians[3 * t : 3 * t + 3])


def test_without_a_norm_the_end_of_an_iteration_is_its_last_block(prompts):
    lens = fit(tiny_model("retrofitted"), prompts, target="loop_ends")
    for point, J in zip(lens.points, lens.jacobians, strict=True):
        if ".1.hook" in point:
            close(J, torch.eye(D))


def test_the_penultimate_residual_enters_the_last_block(model, prompts):
    lens = fit(model, prompts, target="penultimate")
    assert set(lens.targets) == {"coda.1.hook_resid_pre"}


def test_other_numbers_of_iterations(model, prompts):
    lens = fit(model, prompts, points="states", n_iterations=5)
    assert len(lens.points) == 5 and model.cfg.n_iterations == 3
    with model.iterations(5):
        close(fit(model, prompts, points="states").jacobians, lens.jacobians)


# --- saving, refusals ---


def test_saving_and_loading(tmp_path, model, prompts):
    lens = fit(model, prompts, points="states", target="penultimate", readout="coda")
    lens.save(tmp_path / "lens.safetensors")
    loaded = JacobianLens.load(tmp_path / "lens.safetensors")
    assert torch.equal(loaded.jacobians, lens.jacobians)
    for name in ("points", "targets", "n_prompts", "readout", "sizes"):
        assert getattr(loaded, name) == getattr(lens, name)
    tokens = tiny_tokens()
    ours = read_lens(model, tokens, lens).entropy
    assert torch.equal(read_lens(model, tokens, loaded).entropy, ours)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "iter.0.hook_state_out", "points": "states"}, "does not lie after"),
        ({"target": "loop_ends", "points": "blocks"}, "is in no iteration"),
        ({"skip_positions": 5}, "prompt 0"),
        ({"skip_positions": -1}, "at least 0"),
        ({"vjp_batch_size": 0}, "at least 1"),
        ({"target": "coda.0.hook_resid_mid", "readout": "coda"}, "inside a block"),
        ({"target": "final block"}, "no hook point"),
        ({"prompts": []}, "prompts is empty"),
    ],
)
def test_bad_options_are_refused_before_any_pass(model, prompts, options, message):
    passes = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: passes.append(1))]):
        with pytest.raises(ValueError, match=message):
            fit(model, **{"prompts": prompts, **options})
    assert not passes


def test_other_points_and_models_are_refused(model, prompts):
    lens = fit(model, prompts, points="states")
    with pytest.raises(ValueError, match=r"no Jacobian for iter\.0\.0"):
        read_lens(model, tiny_tokens(), lens, points="core")
    with pytest.raises(ValueError, match="n_prelude=2"):
        read_lens(tiny_model("ouro"), tiny_tokens(), lens)
