"""Logit, coda and exit lens: identities with the model's own forward pass."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.closeness import assert_close as close
from tests.models import ARCHITECTURES, SIZES, tiny_model, tiny_tokens
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.names import spec_of
from tl_loops.lens import CodaLens, LogitLens, coda_lens, exit_lens, logit_lens, read_lens
from tl_loops.lens.points import select_points
from tl_loops.metrics.readout import (
    kl_divergence,
    output_entropy,
    token_probability,
    token_rank,
)
from tl_loops.model.hooks import HookNameError

torch.set_num_threads(1)

WITHOUT_CODA = ("ouro", "weightless")
WITH_CODA = tuple(name for name in ARCHITECTURES if name not in WITHOUT_CODA)
LENSES = (logit_lens, coda_lens)


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(name, initializer_range=0.15) for name in ARCHITECTURES}


@pytest.fixture(params=ARCHITECTURES)
def model(request, models):
    return models[request.param]


@pytest.fixture
def tokens():
    return tiny_tokens()


# --- identities with forward passes ---


def test_coda_lens_of_the_last_state_is_the_logits(model, tokens):
    result = coda_lens(model, tokens, keep_logits=True)
    close(result.logits[-1], model(tokens))
    close(result.final_logits, model(tokens))


def test_coda_lens_of_a_state_is_the_run_that_ends_there(model, tokens):
    result = coda_lens(model, tokens, keep_logits=True)
    for t in range(model.cfg.n_iterations):
        close(result.logits[t], model(tokens, n_iterations=t + 1))


def test_coda_lens_at_and_behind_the_last_core_block_is_the_logits(model, tokens):
    result = coda_lens(model, tokens, points="blocks", keep_logits=True)
    for logits in result.logits[model.layout.coda_start - 1 :]:
        close(logits, model(tokens))


@pytest.mark.parametrize("architecture", WITH_CODA)
def test_coda_lens_before_each_coda_block_is_the_logits(models, tokens, architecture):
    model = models[architecture]
    points = [f"coda.{layer}.hook_resid_pre" for layer in range(model.cfg.n_coda)]
    for logits in coda_lens(model, tokens, points=points, keep_logits=True).logits:
        close(logits, model(tokens))


def test_coda_lens_inside_an_iteration_is_the_run_that_ends_there(model, tokens):
    """Everything that follows the loop, reached by replacing the output of the last core block."""
    points = ["iter.0.0.hook_resid_post", "iter.1.1.hook_resid_mid", "iter.1.hook_state_in"]
    result = coda_lens(model, tokens, points=points, keep_logits=True)
    _, cache = model.run_with_cache(tokens)
    last = model.cfg.n_iterations - 1
    ends = {
        points[0]: f"iter.{last}.{model.cfg.n_core - 1}.hook_resid_post",
        points[1]: f"iter.{last}.{model.cfg.n_core - 1}.hook_resid_post",
        points[2]: f"iter.{last}.hook_state_out",
    }
    for name, logits in zip(points, result.logits, strict=True):
        residual = cache[name]
        replaced = model.run_with_hooks(
            tokens, fwd_hooks=[(ends[name], lambda x, hook, residual=residual: residual)]
        )
        close(logits, replaced)


@pytest.mark.parametrize("own", [False, True])
def test_coda_lens_with_a_norm_between_iterations_and_a_coda(tokens, own):
    changes = dict(own_norm_between_iterations=own, initializer_range=0.15)
    model = tiny_model("ouro", n_coda=1, **changes)
    result = coda_lens(model, tokens, points="core", keep_logits=True)
    _, cache = model.run_with_cache(tokens)
    end = "iter.3.2.hook_resid_post"
    for point, logits in zip(result.points, result.logits, strict=True):
        residual = cache[point.name]
        hook = (end, lambda x, hook, residual=residual: residual)
        close(logits, model.run_with_hooks(tokens, fwd_hooks=[hook]))


def test_logit_lens_at_the_last_block_is_the_logits(model, tokens):
    close(logit_lens(model, tokens, keep_logits=True).logits[-1], model(tokens))


def test_logit_lens_is_final_norm_and_unembedding(model, tokens):
    result = logit_lens(model, tokens, keep_logits=True)
    _, cache = model.run_with_cache(tokens)
    for index, logits in enumerate(result.logits):
        close(logits, model.unembed(model.ln_final(cache["resid_post", index])))


def test_soft_cap_is_applied(tokens):
    model = tiny_model("huginn", output_logits_soft_cap=0.05)
    for lens in LENSES:
        logits = lens(model, tokens, keep_logits=True).logits
        close(logits[-1], model(tokens))
        assert logits.abs().max() <= 0.05


@pytest.mark.parametrize("architecture", WITHOUT_CODA)
def test_exit_lens_is_forward_with_exit_at(models, tokens, architecture):
    model = models[architecture]
    result = exit_lens(model, tokens, keep_logits=True)
    assert len(result.points) == model.cfg.n_iterations
    for t, logits in enumerate(result.logits):
        close(logits, model(tokens, exit_at=t))
    close(logit_lens(model, tokens, points="states", keep_logits=True).logits, result.logits)


def test_states_behind_the_norm_between_iterations_are_not_normed_twice(models, tokens):
    """The state enters the next iteration as it leaves this one: four names, one readout."""
    points = [
        "iter.0.hook_state_out",
        "iter.1.hook_state_in",
        "iter.1.hook_injected",
        "iter.1.0.hook_resid_pre",
    ]
    result = logit_lens(models["ouro"], tokens, points=points, keep_logits=True)
    for logits in result.logits:
        close(logits, models["ouro"](tokens, exit_at=0))


@pytest.mark.parametrize("architecture", WITH_CODA)
def test_exit_lens_is_refused_behind_which_a_coda_follows(models, tokens, architecture):
    with pytest.raises(LoopedSemanticsError, match="coda_lens"):
        exit_lens(models[architecture], tokens)


# --- what is read, and where ---


def test_points_are_as_deep_as_the_order_in_which_they_fire(model, tokens):
    specs = {name: spec_of(name) for name in model.hook_dict}
    names = [name for name, spec in specs.items() if spec is not None and spec.residual]
    assert len(names) > 3 * model.cfg.n_layers
    points = {point.name: point for point in select_points(model, names)}
    fired = []
    model.run_with_hooks(
        tokens, fwd_hooks=[(name, lambda x, hook: fired.append(hook.name)) for name in names]
    )
    depths = [points[name].depth for name in fired]
    assert len(set(depths)) == len(depths) == len(names)
    assert depths == sorted(depths)


def test_aliases_name_the_same_points(models, tokens):
    model = models["huginn"]
    by_name = logit_lens(model, tokens, points=["blocks.5.hook_resid_post"])
    by_alias = logit_lens(model, tokens, points="iter.1.1.hook_resid_post")
    assert by_name.points == by_alias.points
    assert by_name.points[0].alias == "iter.1.1.hook_resid_post"
    assert by_name.labels == ["r1.1"]


@settings(deadline=None, max_examples=15)
@given(positions=st.lists(st.integers(-9, 8), min_size=1, max_size=4), lens=st.sampled_from(LENSES))
def test_reading_positions_is_slicing(models, positions, lens):
    model, tokens = models["huginn"], tiny_tokens()
    everywhere = lens(model, tokens, keep_logits=True)
    some = lens(model, tokens, positions=positions, keep_logits=True)
    close(some.logits, everywhere.logits[:, :, positions])
    close(some.kl_to_final, everywhere.kl_to_final[:, :, positions], atol=1e-5, rtol=1e-4)
    assert some.positions.tolist() == [[p % 9 for p in positions]] * 2


def test_every_prompt_at_its_own_positions(model, tokens):
    everywhere = coda_lens(model, tokens, keep_logits=True).logits
    some = coda_lens(model, tokens, positions=torch.tensor([[1, 4], [8, -9]]), keep_logits=True)
    close(some.logits[:, 0], everywhere[:, 0, [1, 4]])
    close(some.logits[:, 1], everywhere[:, 1, [8, 0]])


@pytest.mark.parametrize("lens", LENSES)
def test_left_padding_does_not_matter(model, lens):
    tokens = tiny_tokens(batch=1, pos=6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], dim=1)
    both = torch.cat([padded, tiny_tokens(batch=1, pos=9)])
    mask = torch.ones_like(both)
    mask[0, :3] = 0
    alone = lens(model, tokens, keep_logits=True)
    result = lens(model, both, attention_mask=mask, keep_logits=True)
    close(result.logits[:, 0, 3:], alone.logits[:, 0], atol=2e-5, rtol=1e-4)
    assert result.real[0].tolist() == [False] * 3 + [True] * 6
    assert result.real[1].all()


def test_last_is_the_last_real_token(models):
    tokens = tiny_tokens(pos=6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    result = coda_lens(models["retrofitted"], tokens, positions="last", attention_mask=mask)
    assert result.positions.tolist() == [[3], [5]]
    assert logit_lens(models["retrofitted"], tokens, positions="last").positions.tolist() == [
        [5],
        [5],
    ]


def test_other_numbers_of_iterations(model, tokens):
    before = model.cfg.n_iterations
    result = coda_lens(model, tokens, n_iterations=5, keep_logits=True)
    assert len(result.points) == 5 and model.cfg.n_iterations == before
    close(result.logits[-1], model(tokens, n_iterations=5))


def test_initial_state_is_passed_on(models, tokens):
    model = models["huginn"]
    state = torch.randn(2, 9, SIZES["d_model"], generator=torch.Generator().manual_seed(0))
    result = coda_lens(model, tokens, initial_state=state, keep_logits=True)
    close(result.logits[-1], model(tokens, initial_state=state))
    assert not torch.allclose(result.logits[-1], model(tokens))


@pytest.mark.parametrize("lens", LENSES)
def test_batch_size_does_not_matter(models, lens):
    tokens = tiny_tokens(batch=5, pos=6)
    track = {"a": torch.arange(5), "b": 7}
    whole = lens(models["olmo_grouped"], tokens, track=track, keep_logits=True)
    parts = lens(models["olmo_grouped"], tokens, track=track, keep_logits=True, batch_size=2)
    close(parts.logits, whole.logits)
    close(parts.final_logits, whole.final_logits)
    close(parts.tracked["a"].probability, whole.tracked["a"].probability)
    assert torch.equal(parts.tracked["a"].rank, whole.tracked["a"].rank)
    assert torch.equal(parts.top_tokens, whole.top_tokens)
    assert torch.equal(parts.final_predictions, whole.final_predictions)


# --- statistics ---


def test_statistics_are_those_of_the_logits(model, tokens):
    track = {"one": 7, "each": torch.tensor([3, 4])}
    result = logit_lens(model, tokens, track=track, top_k=3, keep_logits=True)
    logits, final = result.logits, result.final_logits
    close(result.entropy, output_entropy(logits))
    close(result.kl_to_final, kl_divergence(final.expand_as(logits), logits))
    assert torch.equal(result.predictions, logits.argmax(-1))
    assert torch.equal(result.final_predictions, model(tokens).argmax(-1))
    close(result.top_probabilities, logits.softmax(-1).topk(3).values)
    close(result.top_tokens, logits.topk(3).indices)
    assert torch.equal(result.tracked["one"].rank, token_rank(logits, 7))
    close(result.tracked["each"].probability[:, 1], token_probability(logits[:, 1], 4))
    last = result.points[-1]
    assert result.kl_to_final[-1].abs().max() < 1e-6 and last.label == result.labels[-1]


def test_divergence_from_the_previous_iteration(models, tokens):
    model = models["huginn"]
    result = logit_lens(model, tokens, keep_logits=True)
    by_iteration = result.by_iteration(result.logits)
    steps = result.by_iteration(result.kl_from_previous)
    close(steps[1:], kl_divergence(by_iteration[:-1], by_iteration[1:]))
    assert steps[0].isnan().all()
    outside = [i for i, point in enumerate(result.points) if point.iteration is None]
    assert len(outside) == 4 and result.kl_from_previous[outside].isnan().all()


def test_an_iteration_that_is_not_read_is_no_previous_one(models, tokens):
    points = [f"iter.{t}.hook_state_out" for t in (0, 2)]
    result = coda_lens(models["huginn"], tokens, points=points)
    assert result.kl_from_previous.isnan().all()


def test_points_come_in_the_order_in_which_they_are_named(models, tokens):
    model = models["huginn"]
    points = ["iter.2.hook_state_out", "iter.0.hook_state_out", "iter.1.hook_state_out"]
    mixed = coda_lens(model, tokens, points=points, keep_logits=True)
    ordered = coda_lens(model, tokens, keep_logits=True)
    close(mixed.logits, ordered.logits[[2, 0, 1]])
    close(mixed.by_iteration(mixed.logits), ordered.logits)
    close(mixed.kl_from_previous, ordered.kl_from_previous[[2, 0, 1]], equal_nan=True)


def test_spellings_share_the_best_rank_and_the_whole_probability(models, tokens):
    track = {"first": 3, "second": 4, "both": torch.tensor([[3, 4], [4, -1]])}
    tracked = coda_lens(models["ouro"], tokens, track=track).tracked
    first, second, both = tracked["first"], tracked["second"], tracked["both"]
    close(both.probability[:, 0], first.probability[:, 0] + second.probability[:, 0])
    close(both.probability[:, 1], second.probability[:, 1])
    assert torch.equal(both.rank[:, 0], torch.minimum(first.rank[:, 0], second.rank[:, 0]))
    assert torch.equal(both.rank[:, 1], second.rank[:, 1])
    as_lists = coda_lens(models["ouro"], tokens, track={"both": [[3, 4], 4]}).tracked["both"]
    assert torch.equal(as_lists.rank, both.rank)


def test_padding_of_the_vocabulary_is_left_out(tokens):
    model = tiny_model("huginn", padded_vocab=40, initializer_range=0.15)
    result = logit_lens(model, tokens, top_k=40, track={"a": 3}, keep_logits=True)
    assert int(result.top_tokens.max()) < 40
    close(result.top_probabilities.sum(-1), torch.ones_like(result.entropy))
    close(result.tracked["a"].probability, result.logits[..., :40].softmax(-1)[..., 3])
    close(result.entropy, output_entropy(result.logits, 40))


def test_what_is_not_asked_for_is_not_kept(models, tokens):
    result = coda_lens(models["huginn"], tokens)
    assert result.logits is None and result.final_logits is None and result.tracked == {}


# --- modes, dtypes, hooks ---


def test_gradients_flow_where_logits_are_kept(model, tokens):
    result = coda_lens(model, tokens, keep_logits=True)
    weight = model.blocks[0].mlp.W_in
    (gradient,) = torch.autograd.grad(result.logits[0].square().mean(), weight)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    assert not coda_lens(model, tokens).entropy.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_numbers_do_not_depend_on_the_gradient_mode(model, tokens, mode):
    with_gradients = coda_lens(model, tokens, keep_logits=True)
    with mode():
        without = coda_lens(model, tokens, keep_logits=True)
    close(without.logits, with_gradients.logits.detach())


def test_bfloat16(model, tokens):
    low = tiny_model("huginn", dtype=torch.bfloat16, initializer_range=0.15)
    result = coda_lens(low, tokens, track={"a": 3}, keep_logits=True)
    assert result.logits.dtype == torch.bfloat16
    close(result.logits[-1], low(tokens))
    for statistic in (result.entropy, result.kl_to_final, result.tracked["a"].probability):
        assert statistic.dtype == torch.float32 and statistic.isfinite().all()


def test_hooks_on_the_model_act_on_run_and_readout(models, tokens):
    model = models["huginn"]
    with model.hooks(fwd_hooks=[("coda.0.hook_mlp_out", lambda x, hook: torch.zeros_like(x))]):
        result = coda_lens(model, tokens, keep_logits=True)
        close(result.logits[-1], model(tokens))
        close(result.logits[0], model(tokens, n_iterations=1))
    assert not torch.allclose(result.logits[-1], model(tokens))


def test_edits_in_place_do_not_reach_what_was_read_before(model, tokens):
    def edit(x, hook):
        x += 100.0

    name = "iter.1.0.hook_resid_pre"
    for lens, points in ((logit_lens, "core"), (coda_lens, "states")):
        clean = lens(model, tokens, points=points, keep_logits=True).logits[0]
        with model.hooks(fwd_hooks=[(name, edit)]):
            edited = lens(model, tokens, points=points, keep_logits=True).logits[0]
        close(edited, clean)


def test_no_hook_stays_behind(model, tokens):
    coda_lens(model, tokens)
    assert not any(point._forward_hooks for point in model.hook_dict.values())


# --- refusals, before any pass ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"points": []}, ValueError, "points is empty"),
        ({"points": ["coda.0.hook_mlp_out"]}, ValueError, "not on the residual stream"),
        ({"points": ["iter.9.hook_state_out"]}, HookNameError, "there are 3"),
        ({"points": ["iter.0.hook_state_owt"]}, HookNameError, "did you mean"),
        ({"points": ["coda.0.hook_resid_mid"]}, ValueError, "inside a block"),
        ({"points": ["blocks.2.hook_resid_pre", "iter.0.0.hook_resid_pre"]}, ValueError, "twice"),
        ({"positions": 9}, ValueError, "9 positions"),
        ({"positions": [-10]}, ValueError, "-10 to -10"),
        ({"positions": []}, ValueError, "positions is empty"),
        ({"positions": torch.zeros(3, 1, dtype=torch.long)}, ValueError, r"\[2, read\]"),
        ({"positions": torch.zeros(2)}, ValueError, "integers"),
        ({"attention_mask": torch.ones(2, 8)}, ValueError, r"\[2, 9\]"),
        ({"attention_mask": torch.zeros(2, 9)}, ValueError, "without a real token"),
        ({"initial_state": torch.zeros(2, 9, 3)}, ValueError, r"\(2, 9, 32\)"),
        ({"top_k": 51}, ValueError, "vocabulary of 50"),
        ({"batch_size": 0}, ValueError, "at least 1"),
        ({"track": {"a": 50}}, ValueError, "expected 0 to 49"),
        ({"track": {"a": [1]}}, ValueError, "there are 2 prompts"),
        ({"track": {"a": [[1], []]}}, ValueError, "no token for prompt 1"),
        ({"track": {"a": torch.tensor([[-1], [1]])}}, ValueError, "no token for prompt 0"),
        ({"track": {"a": [[1, 1], [1]]}}, ValueError, "twice for prompt 0"),
        ({"track": {"a": torch.zeros(2)}}, ValueError, "must be ids"),
        ({"track": {"a": " cat"}}, ValueError, "no tokenizer"),
        ({"n_iterations": 0}, ValueError, "at least 1"),
    ],
)
def test_bad_options_are_refused_before_any_pass(models, tokens, options, error, message):
    model, passes = models["huginn"], []
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: passes.append(1))]):
        with pytest.raises(error, match=message):
            coda_lens(model, tokens, **options)
    assert not passes


@pytest.mark.parametrize(
    ("input", "message"),
    [
        ("some text", "no tokenizer"),
        (torch.zeros(2, 9), "integer tokens"),
        (torch.zeros(1, 2, 9, dtype=torch.long), "integer tokens"),
        (torch.zeros(2, 0, dtype=torch.long), "no tokens"),
    ],
)
def test_bad_input_is_refused(models, input, message):
    with pytest.raises(ValueError, match=message):
        logit_lens(models["huginn"], input)


def test_exit_lens_reads_exits_only(models, tokens):
    with pytest.raises(ValueError, match="use logit_lens"):
        exit_lens(models["ouro"], tokens, points="core")


def test_models_without_a_layout_are_refused(tokens):
    with pytest.raises(TypeError, match="no loop layout"):
        read_lens(torch.nn.Linear(2, 2), tokens, LogitLens())


def test_one_prompt_needs_no_batch_axis(models):
    model, tokens = models["huginn"], tiny_tokens(batch=1)
    flat = read_lens(model, tokens[0], CodaLens(), keep_logits=True)
    close(flat.logits, read_lens(model, tokens, CodaLens(), keep_logits=True).logits)
