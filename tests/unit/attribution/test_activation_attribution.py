"""Attribution patching: derivatives of exact patching, completeness, refusals."""

from functools import partial

import pytest
import torch

from tests.closeness import assert_close as close
from tests.feedforward import plain_model
from tests.models import ARCHITECTURES, tiny_model, tiny_tokens
from tl_loops.attribution import attribution_patch
from tl_loops.errors import LoopedSemanticsError
from tl_loops.patching.activation import activation_patch

torch.set_num_threads(1)

CLEAN = tiny_tokens(pos=5)
CORRUPTED = CLEAN.clone()
CORRUPTED[:, 1], CORRUPTED[:, 3] = 7, 9

GRIDS = [
    ("resid_pre", ("block", "pos")),
    ("resid_mid", ("iteration", "layer", "pos")),
    ("attn_out", ("block",)),
    ("mlp_out", ("block", "pos")),
    ("z", ("block", "head")),
    ("q", ("block", "pos", "head")),
    ("v", ("block", "pos", "head")),
    ("pattern", ("block", "head", "pos")),
    ("pattern", ("block", "src_pos")),
    ("state_out", ("iteration", "pos")),
    ("injected", ("iteration", "pos")),
    ("embed", ("pos",)),
]


def metric(logits):
    """A logit difference, which is linear in the logits."""
    return (logits[:, -1, 3] - logits[:, -1, 5]).sum()


def curved(logits):
    """A metric that is not linear."""
    return logits[:, -1].log_softmax(-1)[:, 3].sum()


def linear(model):
    """Hooks that make a model linear in its embedding: fixed scales, patterns and gates."""
    read = {}

    def scale(x, hook):
        return torch.full_like(x, 1.3)

    def gate(x, hook):
        return torch.full_like(x, 0.8)

    def pattern(x, hook):
        uniform = torch.ones(x.shape[-2:], dtype=x.dtype).tril()
        return (uniform / uniform.sum(-1, keepdim=True)).expand_as(x).clone()

    def before_activation(x, hook):
        read[hook.name.split(".")[1]] = x

    def behind_activation(x, hook):
        return 0.5 * read[hook.name.split(".")[1]]

    return model.hooks(
        fwd_hooks=[
            (lambda name: name.endswith("hook_scale"), scale),
            (lambda name: name.endswith("attn.hook_gate"), gate),
            (lambda name: name.endswith("hook_pattern"), pattern),
            (lambda name: name.endswith("mlp.hook_pre"), before_activation),
            (lambda name: name.endswith("mlp.hook_post"), behind_activation),
        ]
    )


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(name, initializer_range=0.15) for name in ARCHITECTURES}


def clean_cache(model, tokens=CLEAN, **arguments):
    with torch.no_grad():
        return model.run_with_cache(tokens, **arguments)[1]


def patch(model, cache, measure, activation, axes, **options):
    """The change that exact patching makes."""
    with torch.no_grad():
        arguments = {k: v for k, v in options.items() if k in ("attention_mask", "initial_state")}
        base = measure(model(CORRUPTED, **arguments))
        patched = activation_patch(
            model, CORRUPTED, cache, measure, activation, axes, progress=False, **options
        )
    return (patched - base).to(torch.float64)


# --- against exact patching ---


@pytest.mark.parametrize("method", ["gradient", "integrated_inputs", "integrated_activation"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_linear_model_is_attributed_exactly(architecture, method):
    # Norms to length 1 leave little of an effect once their scales are held.
    spread = 0.3 if architecture == "sphere" else 0.15
    model = tiny_model(architecture, n_iterations=2, initializer_range=spread)
    if model.cfg.value_embeddings and method == "integrated_inputs":
        pytest.skip("refused, see below")
    with linear(model):
        cache = clean_cache(model)
        for activation, axes, where in (
            ("resid_pre", ("block", "pos"), {"pos": 3, "block": [0, 1, -1]}),
            ("z", ("iteration", "layer", "head"), {"layer": 0, "head": 1}),
            ("state_out", ("iteration",), {}),
        ):
            exact = patch(model, cache, metric, activation, axes, where=where)
            ours = attribution_patch(
                model,
                CORRUPTED,
                cache,
                metric,
                activation,
                axes,
                where=where,
                method=method,
                n_steps=1,
            )
            close(ours.double(), exact, atol=2e-5, rtol=1e-4)
            assert exact.abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attribution_is_the_derivative_of_patching(architecture):
    """For a clean run at distance eps patching changes the metric by eps times its derivative."""
    model = tiny_model(architecture, n_iterations=2, initializer_range=0.15, dtype=torch.float64)
    clean, corrupted = clean_cache(model), clean_cache(model, CORRUPTED)
    eps = 1e-6
    nearby = {
        name: value + eps * (clean[name] - value)
        for name, value in corrupted.items()
        if "attn_scores" not in name  # -inf where masked
    }
    for activation, axes in GRIDS:
        where = {"pos": [1, 4]} if "pos" in axes else {}
        exact = patch(model, nearby, curved, activation, axes, where=where) / eps
        first = attribution_patch(model, CORRUPTED, clean, curved, activation, axes, where=where)
        assert first.dtype == torch.float64 and first.abs().max() > 0
        scale = exact.abs().max()
        close(first / scale, exact / scale, atol=1e-3, rtol=0, msg=f"{activation} {axes}")


def test_a_small_change_of_the_prompt_correlates_with_patching(models):
    """Two tokens with similar embeddings: a near-linear case in float32."""
    model = tiny_model("huginn", initializer_range=0.15)
    with torch.no_grad():
        noise = torch.randn(32, generator=torch.Generator().manual_seed(5))
        model.embed.W_E[9] = model.embed.W_E[CLEAN[0, 3]] + 0.01 * noise
    corrupted = CLEAN[:1].clone()
    corrupted[0, 3] = 9
    cache = clean_cache(model, CLEAN[:1])
    with torch.no_grad():
        base = metric(model(corrupted))
        exact = activation_patch(model, corrupted, cache, metric, progress=False) - base
    ours = attribution_patch(model, corrupted, cache, metric)
    assert torch.corrcoef(torch.stack([ours.flatten(), exact.flatten()]))[0, 1] > 0.99


def test_prompts_of_a_batch_add_up(models):
    model = models["retrofitted"]
    whole = attribution_patch(model, CORRUPTED, clean_cache(model), metric)
    parts = [
        attribution_patch(
            model, CORRUPTED[row : row + 1], clean_cache(model, CLEAN[row : row + 1]), metric
        )
        for row in range(2)
    ]
    close(whole, parts[0] + parts[1], atol=1e-5, rtol=1e-4)


def test_one_clean_prompt_serves_all(models):
    model = models["huginn"]
    one = clean_cache(model, CLEAN[:1])
    same = clean_cache(model, CLEAN[:1].expand(2, -1))
    close(
        attribution_patch(model, CORRUPTED, one, metric),
        attribution_patch(model, CORRUPTED, same, metric),
    )


@pytest.mark.parametrize("activation", ["pattern", "attn_scores"])
def test_masks_are_honoured(models, activation):
    """Padding in front changes no number."""
    model = models["retrofitted"]
    pad = torch.zeros(2, 2, dtype=torch.long)
    mask = torch.cat([pad, torch.ones_like(CLEAN)], dim=1)
    clean, corrupted = torch.cat([pad, CLEAN], dim=1), torch.cat([pad, CORRUPTED], dim=1)
    axes = ("block", "pos")
    cache = clean_cache(model, clean, attention_mask=mask)
    padded = attribution_patch(
        model, corrupted, cache, metric, activation, axes, attention_mask=mask
    )
    plain = attribution_patch(model, CORRUPTED, clean_cache(model), metric, activation, axes)
    close(padded[:, 2:], plain, atol=2e-5, rtol=1e-3)
    assert padded[:, :2].abs().max() == 0


def test_exits_are_passed_on(models):
    model = models["ouro"]
    effect = attribution_patch(
        model, CORRUPTED, clean_cache(model), metric, "state_out", ("iteration",), exit_at=1
    )
    assert effect[:2].abs().min() > 0 and effect[2:].abs().max() == 0


# --- grids ---


def test_axes_that_are_not_named_are_summed_over(models):
    model = models["huginn"]
    cache = clean_cache(model)
    fine = attribution_patch(model, CORRUPTED, cache, metric, "z", ("block", "pos", "head"))
    assert fine.shape == (10, 5, 4)
    for axes, dims in ((("block",), (1, 2)), (("head",), (0, 1)), (("block", "head"), 1)):
        coarse = attribution_patch(model, CORRUPTED, cache, metric, "z", axes)
        close(coarse, fine.sum(dims), atol=1e-6, rtol=1e-5)
    by_iteration = attribution_patch(model, CORRUPTED, cache, metric, "z", ("iteration", "layer"))
    close(by_iteration, fine.sum((1, 2))[2:8].reshape(3, 2), atol=1e-6, rtol=1e-5)


def test_windows_sum_neighbours(models):
    model = models["huginn"]
    cache = clean_cache(model)
    single = attribution_patch(model, CORRUPTED, cache, metric, "mlp_out", ("block",))
    windows = attribution_patch(model, CORRUPTED, cache, metric, "mlp_out", ("block",), window=3)
    close(windows, single.unfold(0, 3, 1).sum(-1), atol=1e-6, rtol=1e-5)


def test_grouped_keys_have_their_own_heads(models):
    model = models["olmo_grouped"]
    effect = attribution_patch(model, CORRUPTED, clean_cache(model), metric, "k", ("block", "head"))
    assert effect.shape == (8, 2)


# --- integrated gradients ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_integrated_over_the_activation_a_hook_point_is_complete(architecture):
    """The fundamental theorem: all cells of a hook point sum to the patch of all of it."""
    model = tiny_model(architecture, n_iterations=2, initializer_range=0.05)
    cache = clean_cache(model)
    for activation in ("resid_mid", "pattern"):
        exact = patch(model, cache, curved, activation, ("block",), where={"block": 1})
        ours = attribution_patch(
            model,
            CORRUPTED,
            cache,
            curved,
            activation,
            ("block", "pos"),
            where={"block": 1},
            method="integrated_activation",
            n_steps=16,
        )
        size = float(curved(model(CORRUPTED)).abs().max())
        close(ours.sum(1).double(), exact, atol=1e-5, rtol=5e-3, size=size)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_integrated_over_the_inputs_the_embedding_is_complete(architecture):
    model = tiny_model(architecture, n_iterations=2, initializer_range=0.05)
    arguments = (model, CORRUPTED, clean_cache(model), curved, "embed", ("pos",))
    if model.cfg.value_embeddings:
        with pytest.raises(LoopedSemanticsError, match="also enter through value embeddings"):
            attribution_patch(*arguments, method="integrated_inputs")
        return
    ours = attribution_patch(*arguments, method="integrated_inputs", n_steps=32)
    with torch.no_grad():
        change = curved(model(CLEAN)) - curved(model(CORRUPTED))
    close(ours.sum(), change, atol=1e-5, rtol=2e-2)
    assert ours[[0, 2, 4]].abs().max() == 0


# --- modes and dtypes ---


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_numbers_do_not_depend_on_the_gradient_mode(models, mode):
    model = models["huginn"]
    expected = attribution_patch(model, CORRUPTED, clean_cache(model), metric)
    with mode():
        _, cache = model.run_with_cache(CLEAN)
        inside = attribution_patch(
            model,
            CORRUPTED.clone(),
            cache,
            metric,
            attention_mask=torch.ones_like(CLEAN),
        )
    close(inside, expected)
    assert not inside.requires_grad


def test_frozen_weights():
    model = tiny_model("olmo_grouped", initializer_range=0.15)
    for activation, axes in (("resid_pre", ("block", "pos")), ("pattern", ("block", "head"))):
        model.requires_grad_(True)
        free = attribution_patch(model, CORRUPTED, clean_cache(model), metric, activation, axes)
        model.requires_grad_(False)
        close(
            attribution_patch(model, CORRUPTED, clean_cache(model), metric, activation, axes), free
        )


def test_bfloat16():
    model = tiny_model("ouro", dtype=torch.bfloat16, initializer_range=0.15)
    effect = attribution_patch(model, CORRUPTED, clean_cache(model), metric)
    assert effect.dtype == torch.float32 and effect.isfinite().all()


def test_cache_and_model_are_left_alone(models):
    model = models["huginn"]
    cache = clean_cache(model)
    before = {name: value.clone() for name, value in cache.items()}
    for method in ("gradient", "integrated_inputs", "integrated_activation"):
        attribution_patch(model, CORRUPTED, cache, metric, method=method, n_steps=1)
    assert all(torch.equal(cache[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(point._forward_hooks for point in model.hook_dict.values())


# --- refusals, before any pass ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "resid_prae"}, ValueError, "did you mean"),
        ({"axes": ("block", "head")}, ValueError, "no axis 'head'"),
        ({"where": {"block": 99}}, IndexError, "no block 99"),
        ({"where": {"iteration": 3}, "axes": ("iteration",)}, IndexError, "no iteration 3"),
        ({"method": "integrated_inputs", "n_steps": 0}, ValueError, "at least 1"),
        ({"metric": lambda logits: logits[:, -1, 3]}, ValueError, "reduce over batch"),
        ({"metric": lambda logits: logits.sum().item()}, ValueError, r"leave out \.item"),
        ({"metric": lambda logits: logits.detach().sum()}, ValueError, "no gradient"),
        ({"metric": "logit difference"}, ValueError, "function of the logits"),
        ({"mask": None}, TypeError, "unknown argument 'mask'"),
    ],
)
def test_bad_arguments_are_refused_before_any_pass(models, options, error, message):
    model, passes = models["huginn"], []
    cache = clean_cache(model)
    arguments = {"metric": metric, **options}
    if not callable(arguments["metric"]):
        pytest.importorskip("beartype")  # refuses it where annotations are checked
        error, message = (TypeError, ValueError), "metric"
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: passes.append(1))]):
        with pytest.raises(error, match=message):
            attribution_patch(model, CORRUPTED, cache, **arguments)
    assert not passes


def test_caches_that_do_not_fit_are_refused(models):
    model = models["huginn"]
    with pytest.raises(ValueError, match="6 positions"):
        attribution_patch(model, CORRUPTED, clean_cache(model, tiny_tokens(pos=6)), metric)
    with model.iterations(4):
        longer = clean_cache(model)
    with pytest.raises(ValueError, match="layout"):
        attribution_patch(model, CORRUPTED, longer, metric)
    with torch.no_grad():
        _, partial = model.run_with_cache(CLEAN, names_filter="blocks.0.hook_resid_pre")
    with pytest.raises(ValueError, match=r"lacks 'blocks\.1\.hook_resid_pre'"):
        attribution_patch(model, CORRUPTED, partial, metric)
    with torch.no_grad():
        _, partial = model.run_with_cache(CLEAN, names_filter=lambda n: n.endswith("resid_pre"))
    with pytest.raises(ValueError, match="lacks 'hook_embed'"):
        attribution_patch(model, CORRUPTED, partial, metric, method="integrated_inputs")


@pytest.mark.parametrize("activation", ["resid_pre", "resid_post", "attn_out", "mlp_out", "z"])
def test_a_feedforward_model_on_both_lines(activation):
    """Also on a bridge, whose hook points have names of their own."""
    model = plain_model(
        n_layers=2, d_model=16, d_head=4, n_heads=4, n_ctx=16, d_vocab=50, d_mlp=32,
        act_fn="gelu", normalization_type="LN", seed=0,
    )  # fmt: skip
    with torch.no_grad():
        _, cache = model.run_with_cache(CLEAN)
    found = attribution_patch(model, CORRUPTED, cache, metric, activation, ("block", "pos"))
    kept = {}

    def keep(x, hook, block):
        kept[block] = x if x.requires_grad else x.detach().requires_grad_()
        return kept[block]

    rest = "attn.hook_z" if activation == "z" else f"hook_{activation}"
    names = [f"blocks.{i}.{rest}" for i in range(2)]
    hooks = [(name, partial(keep, block=i)) for i, name in enumerate(names)]
    gradients = torch.autograd.grad(
        metric(model.run_with_hooks(CORRUPTED, fwd_hooks=hooks)), [kept[0], kept[1]]
    )
    for i, name in enumerate(names):
        effect = gradients[i] * (cache[name] - kept[i])
        close(found[i], effect.flatten(2).sum((0, 2)), atol=1e-5, rtol=1e-4)
    assert found.abs().max() > 1e-3
