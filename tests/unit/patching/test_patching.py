"""Activation patching: every number is that of one hooked forward pass a cell."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformer_lens.patching as upstream_patching
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.feedforward import plain_model
from tests.models import ARCHITECTURES, tiny_model, tiny_tokens
from tl_loops import LoopedSemanticsError
from tl_loops.patching import activation_patch, axis_labels
from tl_loops.upstream import is_bridge

torch.set_num_threads(1)

HEADS = ("q", "k", "v", "z")
BETWEEN = ("state_in", "injected", "state_out")
RUN = ("injection", "initial_state")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    # Few iterations: the definition of a grid runs one full forward pass a cell.
    return {
        name: tiny_model(name, n_iterations=3 if name == "retrofitted" else 2)
        for name in ARCHITECTURES
    }


@pytest.fixture(scope="module")
def plain() -> Any:
    return plain_model(
        n_layers=3,
        d_model=32,
        n_ctx=16,
        d_head=8,
        n_heads=4,
        d_mlp=48,
        d_vocab=50,
        act_fn="gelu",
        positional_embedding_type="rotary",
        rotary_dim=8,
        n_key_value_heads=2,
        init_weights=True,
        initializer_range=0.3,
        seed=0,
        device="cpu",
    )


def prompts(batch: int = 2, pos: int = 4, shared: int = 1) -> tuple[Tensor, Tensor]:
    """A clean and a corrupted prompt that share their first tokens."""
    clean, corrupted = tiny_tokens(batch, pos, seed=3), tiny_tokens(batch, pos, seed=4)
    corrupted[:, :shared] = clean[:, :shared]
    return clean, corrupted


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -2, 5]).mean() + logits[:, 0, 7].mean()


def patched_run(
    model: Any,
    tokens: Tensor,
    cache: Any,
    names: Sequence[str],
    activation: str,
    at: dict[str, int],
    score: Callable[[Tensor], Tensor] = metric,
    **arguments: Any,
) -> Tensor:
    """The definition of a cell: one full forward pass with hooks."""

    def hook(value: Tensor, hook: Any) -> Tensor:
        value, clean = value.clone(), cache[hook.name]
        pos, head, src = (at.get(axis, slice(None)) for axis in ("pos", "head", "src_pos"))
        if activation == "pattern":
            value[:, head, pos, src] = clean[:, head, pos, src]
        elif activation in HEADS:
            value[:, pos, head] = clean[:, pos, head]
        else:
            value[:, pos] = clean[:, pos]
        return value

    points = [model.hook_dict[name] for name in names]
    for point in points:
        point.add_hook(hook, level=99)
    try:
        return score(model(tokens, **arguments))
    finally:
        for point in points:
            point.remove_hooks(level=99)


def definition(
    model: Any, tokens: Tensor, cache: Any, activation: str, axes: Sequence[str], **arguments: Any
) -> Tensor:
    """The whole grid by its definition."""
    layout, cfg = model.layout, model.cfg
    heads = cfg.n_heads
    if activation in ("k", "v") and cfg.n_key_value_heads:
        heads = cfg.n_key_value_heads
    pos = tokens.shape[1]
    sizes = dict(
        iteration=layout.n_iterations,
        layer=layout.n_core,
        block=layout.n_layers,
        pos=pos,
        head=heads,
        src_pos=pos,
    )
    scores = []
    for index in itertools.product(*(range(sizes[axis]) for axis in axes)):
        at = dict(zip(axes, index, strict=True))
        if activation in RUN:
            names = [f"hook_{activation}"]
        elif activation in BETWEEN:
            ts = [at["iteration"]] if "iteration" in at else range(layout.n_iterations)
            names = [f"iter.{t}.hook_{activation}" for t in ts]
        elif {"iteration", "layer"} & set(axes):
            ts = [at["iteration"]] if "iteration" in at else range(layout.n_iterations)
            ls = [at["layer"]] if "layer" in at else range(layout.n_core)
            names = [layout.hook_name(activation, iteration=t, layer=i) for t in ts for i in ls]
        else:
            blocks = [at["block"]] if "block" in at else range(layout.n_layers)
            rest = layout.hook_name(activation, iteration=0, layer=0).split(".", 2)[2]
            names = [f"blocks.{block}.{rest}" for block in blocks]
        scores.append(patched_run(model, tokens, cache, names, activation, at, **arguments))
    return torch.stack(scores).reshape([sizes[axis] for axis in axes])


def agree(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-5, rtol=1e-5)


CASES = [
    ("resid_pre", ("block", "pos")),
    ("resid_mid", ("layer", "pos")),
    ("resid_post", ("iteration", "layer")),
    ("attn_out", ("pos", "iteration")),
    ("mlp_out", ("block",)),
    ("z", ("iteration", "layer", "head")),
    ("q", ("layer", "head")),
    ("k", ("iteration", "pos")),
    ("v", ("block", "head")),
    ("pattern", ("iteration", "layer", "head")),
    ("pattern", ("pos", "head")),
    ("state_in", ("iteration", "pos")),
    ("injected", ("iteration",)),
    ("state_out", ("pos", "iteration")),
    ("injection", ("pos",)),
    ("initial_state", ("pos",)),
]


@pytest.mark.parametrize(
    ("architecture", "activation", "axes"),
    [("huginn", *case) for case in CASES]
    + [(name, *case) for name in ARCHITECTURES if name != "huginn" for case in CASES[::3]],
)
def test_equals_one_forward_pass_a_cell(models, architecture, activation, axes):
    model = models[architecture]
    if activation == "injection" and model.cfg.injection is None:
        pytest.skip("nothing is injected")
    clean, corrupted = prompts()
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        expected = definition(model, corrupted, cache, activation, axes)
        found = activation_patch(model, corrupted, cache, metric, activation, axes, progress=False)
    assert found.dtype == torch.float32
    agree(found, expected)


@pytest.mark.parametrize("batch_size", [1, 3, None])
@pytest.mark.parametrize("shared", [0, 3])
def test_batch_size_and_shared_prefix_do_not_matter(models, batch_size, shared):
    model = models["huginn"]
    clean, corrupted = prompts(shared=shared)
    axes = ("block", "pos")
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        expected = definition(model, corrupted, cache, "z", axes)
        found = activation_patch(model, corrupted, cache, metric, "z", axes, batch_size, False)
    agree(found, expected)
    assert expected.std() > 1e-3


@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_any_grid_equals_the_definition(models, data):
    model = models[data.draw(st.sampled_from(["layer_norm", "ouro", "olmo_grouped"]))]
    activation = data.draw(st.sampled_from(["resid_post", "z", "v", "pattern", "state_out"]))
    depth = [("iteration",), ("layer",), ("iteration", "layer"), ("block",), ()]
    if activation == "state_out":
        depth = [("iteration",), ()]
    axes = list(data.draw(st.sampled_from(depth)))
    if activation in ("z", "v", "pattern") and data.draw(st.booleans()):
        axes.append("head")
    if data.draw(st.booleans()) and len(axes) < 3:
        axes.append("pos")
    axes = data.draw(st.permutations(axes))
    clean, corrupted = prompts(1, 3, shared=data.draw(st.integers(0, 2)))
    batch_size = data.draw(st.sampled_from([None, 1, 2, 5]))
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        expected = definition(model, corrupted, cache, activation, axes)
        found = activation_patch(
            model, corrupted, cache, metric, activation, axes, batch_size, False
        )
    agree(found, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_from_the_clean_run_is_the_clean_run(models, architecture):
    model = models[architecture]
    clean, corrupted = prompts(shared=0)
    with torch.no_grad():
        logits, cache = model.run_with_cache(clean)
        # Value embeddings read the corrupted tokens behind the last resid_pre, too.
        everything = ("resid_post",) if model.cfg.value_embeddings else ("resid_pre", "resid_post")
        for activation in everything:
            found = activation_patch(model, corrupted, cache, metric, activation, (), None, False)
            assert found.shape == ()
            agree(found, metric(logits))
        last = activation_patch(
            model, corrupted, cache, metric, "resid_post", ("block",), None, False
        )
    agree(last[-1], metric(logits))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("grad", [False, True])
def test_nothing_new_from_the_clean_run_is_the_corrupted_run(models, architecture, grad):
    model = models[architecture]
    _, corrupted = prompts()
    with torch.set_grad_enabled(grad):
        _, cache = model.run_with_cache(corrupted)
        expected = metric(model(corrupted))
        found = activation_patch(model, corrupted, cache, metric, "z", ("block", "pos"), 7, False)
    agree(found, expected.expand_as(found))


@pytest.mark.parametrize(
    ("function", "activation", "axes"),
    [
        ("get_act_patch_resid_pre", "resid_pre", ("block", "pos")),
        ("get_act_patch_resid_mid", "resid_mid", ("block", "pos")),
        ("get_act_patch_attn_out", "attn_out", ("block", "pos")),
        ("get_act_patch_mlp_out", "mlp_out", ("block", "pos")),
        ("get_act_patch_attn_head_out_by_pos", "z", ("block", "pos", "head")),
        ("get_act_patch_attn_head_q_all_pos", "q", ("block", "head")),
        ("get_act_patch_attn_head_k_all_pos", "k", ("block", "head")),
        ("get_act_patch_attn_head_v_by_pos", "v", ("block", "pos", "head")),
        ("get_act_patch_attn_head_pattern_all_pos", "pattern", ("block", "head")),
        ("get_act_patch_attn_head_pattern_by_pos", "pattern", ("block", "head", "dest_pos")),
    ],
)
@pytest.mark.parametrize("kind", ["looped", "plain"])
def test_equals_transformer_lens_patching(models, plain, function, activation, axes, kind):
    model = plain if kind == "plain" else models["olmo_grouped"]
    clean, corrupted = prompts(1, 3, shared=1)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        if activation == "resid_mid" and is_bridge(model):
            with pytest.raises(LoopedSemanticsError, match="MLP's input alone"):
                activation_patch(model, corrupted, cache, metric, activation, axes, None, False)
            return
        expected = getattr(upstream_patching, function)(model, corrupted, cache, metric)
        found = activation_patch(model, corrupted, cache, metric, activation, axes, None, False)
    assert found.shape == expected.shape
    agree(found, expected)


def test_single_pattern_entries_equal_transformer_lens(models):
    model = models["weightless"]
    clean, corrupted = prompts(1, 2, shared=0)
    axes = ("block", "head", "dest_pos", "src_pos")
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        expected = upstream_patching.get_act_patch_attn_head_pattern_dest_src_pos(
            model, corrupted, cache, metric
        )
        found = activation_patch(model, corrupted, cache, metric, "pattern", axes, None, False)
    agree(found, expected)


def test_plain_models_call_their_blocks_layers(plain):
    clean, corrupted = prompts(1, 4)
    with torch.no_grad():
        _, cache = plain.run_with_cache(clean)
        by_block = activation_patch(
            plain, corrupted, cache, metric, axes=("block",), progress=False
        )
        by_layer = activation_patch(
            plain, corrupted, cache, metric, axes=("layer",), progress=False
        )
    assert torch.equal(by_block, by_layer)


@pytest.mark.parametrize("padded", [False, True])
def test_plain_models_with_learned_positions(padded):
    model = plain_model(
        n_layers=2,
        d_model=16,
        n_ctx=8,
        d_head=8,
        n_heads=2,
        d_vocab=50,
        act_fn="relu",
        seed=0,
        initializer_range=0.4,
        device="cpu",
    )
    clean, corrupted = prompts(shared=2)
    arguments: Any = {}
    if padded:
        arguments["attention_mask"] = torch.ones_like(clean)
        arguments["attention_mask"][1, :1] = 0
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, **arguments)
        for activation in ("v", "mlp_out", "pattern", "embed"):
            axes = ("pos",) if activation == "embed" else ("block", "pos")
            found = activation_patch(
                model, corrupted, cache, metric, activation, axes, 3, False, **arguments
            )
            for index in itertools.product(*map(range, found.shape)):
                at = dict(zip(axes, index, strict=True))
                rest = "mlp_out" if activation == "mlp_out" else f"attn.{activation}"
                rest = rest.replace("attn.", "attn.hook_") if "attn." in rest else f"hook_{rest}"
                names = ["hook_embed"] if activation == "embed" else [f"blocks.{index[0]}.{rest}"]
                cell = patched_run(model, corrupted, cache, names, activation, at, **arguments)
                agree(found[index], cell)


def test_results_of_heads(models):
    model = models["weightless"]
    clean, corrupted = prompts()
    model.set_use_attn_result(True)
    try:
        with torch.no_grad():
            _, cache = model.run_with_cache(clean)
            found, same = (
                activation_patch(
                    model, corrupted, cache, metric, name, ("iteration", "layer", "head"), 5, False
                )
                for name in ("result", "z")
            )
    finally:
        model.set_use_attn_result(False)
    agree(found, same)  # A head's result is linear in its z.
    assert found.std() > 1e-3


def test_inference_mode(models):
    model = models["retrofitted"]
    clean, corrupted = prompts()
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        expected = activation_patch(model, corrupted, cache, metric, progress=False)
    with torch.inference_mode():
        found = activation_patch(model, corrupted, cache, metric, progress=False)
    agree(found, expected)


def test_windows_cover_neighbouring_iterations(models):
    model = models["retrofitted"]
    clean, corrupted = prompts()
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        found = activation_patch(
            model, corrupted, cache, metric, "attn_out", ("iteration",), progress=False, window=2
        )
        for t, cell in enumerate(found):
            names = [
                model.layout.hook_name("attn_out", iteration=u, layer=i)
                for u in (t, t + 1)
                for i in range(model.cfg.n_core)
            ]
            agree(cell, patched_run(model, corrupted, cache, names, "attn_out", {}))
    assert found.shape == (model.cfg.n_iterations - 1,)


def test_where_restricts_named_and_unnamed_axes(models):
    model = models["retrofitted"]
    clean, corrupted = prompts()
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        full = activation_patch(
            model, corrupted, cache, metric, "z", ("iteration", "layer", "pos"), progress=False
        )
        named = activation_patch(
            model,
            corrupted,
            cache,
            metric,
            "z",
            ("iteration", "pos"),
            progress=False,
            where={"layer": -1, "pos": [3, 1], "iteration": (0, 2)},
        )
        agree(named, full[[0, 2]][:, -1][:, [3, 1]])
        scattered = activation_patch(
            model, corrupted, cache, metric, "z", ("block",), progress=False, where={"pos": [1, 3]}
        )
        for block, cell in enumerate(scattered):
            name = f"blocks.{block}.attn.hook_z"
            agree(cell, patched_run(model, corrupted, cache, [name], "z", {"pos": [1, 3]}))


def test_one_clean_prompt_serves_all_corrupted_ones(models):
    model = models["huginn"]
    clean, corrupted = prompts(3)
    with torch.no_grad():
        _, single = model.run_with_cache(clean[:1])
        _, many = model.run_with_cache(clean[:1].expand(3, -1))
        _, flat = model.run_with_cache(clean[:1], remove_batch_dim=True)
        arguments: Any = dict(activation="pattern", axes=("block", "head"), progress=False)
        expected = activation_patch(model, corrupted, many, metric, **arguments)
        agree(activation_patch(model, corrupted, single, metric, **arguments), expected)
        agree(activation_patch(model, corrupted, flat, metric, **arguments), expected)


def test_caches_and_weights_are_left_alone(models):
    model = models["ouro"]
    clean, corrupted = prompts()
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        before = {name: value.clone() for name, value in cache.items()}
        for activation in ("resid_post", "pattern", "state_out"):
            activation_patch(
                model, corrupted, cache, metric, activation, ("iteration", "pos"), 4, False
            )
    assert all(torch.equal(cache[name], value) for name, value in before.items())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("architecture", ["retrofitted", "ouro"])
def test_gradients_reach_weights_and_clean_activations(models, architecture):
    model = models[architecture]
    clean, corrupted = prompts()
    _, cache = model.run_with_cache(clean)
    names = [f"blocks.{i}.hook_resid_pre" for i in range(model.cfg.n_layers)]
    given = {name: cache[name].clone().requires_grad_() for name in names}
    weight = model.blocks[1].mlp.W_in

    found = activation_patch(
        model, corrupted, given, metric, axes=("block", "pos"), progress=False, gradients=True
    )
    coefficients = torch.linspace(-1, 1, found.numel()).reshape(found.shape)
    (found * coefficients).sum().backward()
    gradients = {name: given[name].grad.clone() for name in names}
    weight_gradient, weight.grad = weight.grad.clone(), None

    model.zero_grad()
    for value in given.values():
        value.grad = None
    expected = definition(model, corrupted, given, "resid_pre", ("block", "pos"))
    (expected * coefficients).sum().backward()
    agree(found.detach(), expected.detach())
    for name in names:
        torch.testing.assert_close(gradients[name], given[name].grad, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(weight_gradient, weight.grad, atol=1e-3, rtol=1e-3)
    assert weight_gradient.abs().max() > 0
    model.zero_grad()


def test_no_graph_is_kept_unless_gradients_are_asked_for(models):
    model = models["retrofitted"]
    clean, corrupted = prompts()
    _, cache = model.run_with_cache(clean)
    found = activation_patch(model, corrupted, cache, metric, axes=("block",), progress=False)
    assert not found.requires_grad
    with torch.no_grad():
        without = activation_patch(
            model, corrupted, cache, metric, axes=("block",), progress=False, gradients=True
        )
    assert not without.requires_grad
    agree(found, without)


@pytest.mark.parametrize("architecture", ["huginn", "ouro", "olmo_grouped"])
def test_bfloat16(architecture):
    model = tiny_model(architecture)
    clean, corrupted = prompts()
    axes = ("block", "pos")
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        exact = activation_patch(model, corrupted, cache, metric, "z", axes, progress=False)
        model = model.to(torch.bfloat16)
        _, cache = model.run_with_cache(clean)
        expected = definition(model, corrupted, cache, "z", axes).float()
        found = activation_patch(model, corrupted, cache, metric, "z", axes, 5, False)
    assert found.dtype == torch.float32
    # Runs that are batched otherwise round otherwise; neither is nearer to float32.
    error = (expected - exact).abs().mean()
    assert (found - exact).abs().mean() < 3 * error + 0.01
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)


def test_float64_stays_float64(models):
    model = tiny_model("retrofitted").to(torch.float64)
    clean, corrupted = prompts()
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        expected = definition(model, corrupted, cache, "resid_mid", ("block", "pos"))
        found = activation_patch(
            model, corrupted, cache, metric, "resid_mid", ("block", "pos"), None, False
        )
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_metrics_may_return_numbers(models):
    model = models["retrofitted"]
    clean, corrupted = prompts()
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        arguments: Any = dict(axes=("block",), progress=False)
        expected = activation_patch(model, corrupted, cache, metric, **arguments)
        for other in (
            lambda x: metric(x).item(),
            lambda x: metric(x)[None],
            lambda x: metric(x).numpy(),
        ):
            agree(activation_patch(model, corrupted, cache, other, **arguments), expected)


def test_hooks_on_the_model_act_in_every_cell(models):
    model = models["retrofitted"]
    clean, corrupted = prompts()

    def double_first_row(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[0] *= 2.0  # Would hit another cell if cells shared a batch.
        return value

    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        with model.hooks(fwd_hooks=[("iter.1.0.hook_attn_out", double_first_row)]):
            expected = definition(model, corrupted, cache, "resid_pre", ("block", "pos"))
            found = activation_patch(
                model, corrupted, cache, metric, "resid_pre", ("block", "pos"), 8, False
            )
        without = activation_patch(model, corrupted, cache, metric, progress=False)
    agree(found, expected)
    assert (found - without).abs().max() > 1e-3


@pytest.mark.parametrize(
    "arguments", [dict(exit_at=0), dict(exit_threshold=0.5), dict(weighted_exit=True)]
)
def test_exit_modes(models, arguments):
    model = models["ouro"]
    clean, corrupted = prompts()
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        for activation, axes in (("z", ("block",)), ("exit_gate", ("iteration", "pos"))):
            found = activation_patch(
                model, corrupted, cache, metric, activation, axes, 5, False, **arguments
            )
            if activation == "z":
                agree(found, definition(model, corrupted, cache, "z", axes, **arguments))
            else:
                for t, p in itertools.product(range(found.shape[0]), range(found.shape[1])):
                    name = f"iter.{t}.hook_exit_gate"
                    at = {"pos": p}
                    cell = patched_run(model, corrupted, cache, [name], activation, at, **arguments)
                    agree(found[t, p], cell)


def test_left_padding(models):
    model = models["olmo_grouped"]
    clean, corrupted = prompts(shared=2)
    mask = torch.ones_like(clean)
    mask[0, :2] = 0
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, attention_mask=mask)
        expected = definition(model, corrupted, cache, "v", ("block", "pos"), attention_mask=mask)
        found = activation_patch(
            model, corrupted, cache, metric, "v", ("block", "pos"), 5, False, attention_mask=mask
        )
        unmasked = activation_patch(
            model, corrupted, cache, metric, "v", ("block", "pos"), 5, False
        )
    agree(found, expected)
    assert (found - unmasked).abs().max() > 1e-3


def test_fresh_initial_states_are_drawn_once():
    model = tiny_model("huginn", state_seed=None)
    _, corrupted = prompts()
    with torch.no_grad():
        _, cache = model.run_with_cache(corrupted)
        everything, other = (
            activation_patch(model, corrupted, cache, metric, name, (), progress=False)
            for name in ("initial_state", "injection")
        )
        # With the cached draw the run is the cached run; each call makes one draw of its own.
        agree(everything, metric(model(corrupted, initial_state=cache["hook_initial_state"])))
        assert (everything - other).abs() > 1e-4
    # With gradients no cell is left out, though none changes anything; all share the draw.
    same = activation_patch(
        model, corrupted, cache, metric, "attn_out", ("pos",), 1, False, where={"block": 0}
    )
    agree(same.detach(), same[0].detach().expand_as(same))


def test_given_initial_state(models):
    model = models["huginn"]
    clean, corrupted = prompts()
    state = torch.randn(2, 4, model.cfg.d_model, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        for axes in (("block", "pos"), ("block",)):
            expected = definition(model, corrupted, cache, "mlp_out", axes, initial_state=state)
            found = activation_patch(
                model, corrupted, cache, metric, "mlp_out", axes, 5, False, initial_state=state
            )
            agree(found, expected)


def test_other_numbers_of_iterations(models):
    model = models["retrofitted"]
    clean, corrupted = prompts()
    with torch.no_grad(), model.iterations(5):
        _, cache = model.run_with_cache(clean)
        found = activation_patch(
            model, corrupted, cache, metric, "state_out", ("iteration",), progress=False
        )
        assert found.shape == (5,)
        agree(found, definition(model, corrupted, cache, "state_out", ("iteration",)))


def test_bidirectional_attention_is_not_cut():
    model = tiny_model("retrofitted", attention_dir="bidirectional")
    clean, corrupted = prompts()
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        expected = definition(model, corrupted, cache, "resid_pre", ("block", "pos"))
        found = activation_patch(model, corrupted, cache, metric, progress=False)
    agree(found, expected)


class Work:
    """Counts what the blocks of a model run."""

    def __init__(self, model: Any):
        self.tokens = [0] * model.cfg.n_layers
        self.rows = 0
        self._handles = [
            block.register_forward_pre_hook(self._count(index))
            for index, block in enumerate(model.blocks)
        ]

    def _count(self, index: int) -> Callable:
        def count(module: Any, arguments: tuple) -> None:
            self.tokens[index] += arguments[0].shape[0] * arguments[0].shape[1]
            self.rows = max(self.rows, arguments[0].shape[0])

        return count

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def test_only_what_a_patch_can_change_is_run_again(models):
    model = models["retrofitted"]
    clean, corrupted = prompts(1, 8, shared=0)
    n_layers = model.cfg.n_layers
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        with Work(model) as work:
            activation_patch(model, corrupted, cache, metric, axes=("block",), progress=False)
        # The prompt once, and block i for the cells of blocks 0 to i.
        assert [w - 8 for w in work.tokens] == [8 * (i + 1) for i in range(n_layers)]
        with Work(model) as work:
            activation_patch(
                model, corrupted, cache, metric, axes=("pos",), progress=False, where={"block": 3}
            )
        assert max(work.tokens[:3]) == 8  # Nothing before the patched block.
        assert work.tokens[3] - 8 < 8 * 8  # Nothing before the patched position.


def test_a_shared_prefix_costs_nothing(models):
    model = models["retrofitted"]
    clean, corrupted = prompts(1, 8, shared=7)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        with Work(model) as work:
            found = activation_patch(model, corrupted, cache, metric, progress=False)
        assert sum(work.tokens) < 3 * 8 * model.cfg.n_layers
        agree(found, definition(model, corrupted, cache, "resid_pre", ("block", "pos")))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batch_size_bounds_the_rows(models, batch_size):
    model = models["huginn"]
    clean, corrupted = prompts(2)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        with Work(model) as work:
            activation_patch(model, corrupted, cache, metric, batch_size=batch_size, progress=False)
    assert work.rows == 2 * batch_size


def test_progress_bar_counts_cells(models, capsys):
    model = models["ouro"]
    clean, corrupted = prompts()
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        activation_patch(model, corrupted, cache, metric, axes=("block",))
        assert f"{model.cfg.n_layers}/{model.cfg.n_layers}" in capsys.readouterr().err
        activation_patch(model, corrupted, cache, metric, axes=("block",), progress=False)
        assert capsys.readouterr().err == ""


def test_axis_labels(models):
    model = models["retrofitted"]
    tokens = tiny_tokens(2, 3)
    assert axis_labels(model, ("iteration", "layer")) == [["r0", "r1", "r2"], ["l0", "l1"]]
    blocks = ["p0", "r0.0", "r0.1", "r1.0", "r1.1", "r2.0", "r2.1", "c0"]
    assert axis_labels(model, ("block", "pos"), tokens) == [blocks, ["0", "1", "2"]]
    assert axis_labels(model, ("iteration",), window=2) == [["r0-r1", "r1-r2"]]
    assert axis_labels(model, ("head",), activation="z", where={"head": [1, -1]}) == [["H1", "H3"]]
    with pytest.raises(ValueError, match="tokens"):
        axis_labels(model, ("pos",))


# Bad input: one clear error before any forward pass.


class Forbidden:
    """Fails the test when a block runs."""

    def __init__(self, model: Any):
        self._handles = [block.register_forward_pre_hook(self._fail) for block in model.blocks]

    def _fail(self, *_: object) -> None:
        raise AssertionError("a forward pass was run")

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("unknown activation", dict(activation="resid_pree"), ValueError, "did you mean resid_pre"),
    ("unknown axis", dict(axes=("block", "step")), ValueError, "unknown axis 'step'.*choose among"),
    ("no heads", dict(axes=("head",)), ValueError, "'resid_pre' has no axis 'head'"),
    ("no layers", dict(activation="state_out", axes=("layer",)), ValueError, "no axis 'layer'"),
    ("mixed depth", dict(axes=("block", "iteration")), ValueError, "mixes 'block'"),
    ("twice", dict(axes=("pos", "pos")), ValueError, "twice"),
    ("no gate", dict(activation="exit_gate"), ValueError, "no activation 'exit_gate'"),
    ("flag", dict(activation="result"), ValueError, "use_attn_result"),
    ("window", dict(axes=("iteration",), window=9), ValueError, "window=9 is longer"),
    ("window axis", dict(axes=("pos",), window=2), ValueError, "window slides"),
    ("window kind", dict(axes=("iteration",), window=0), ValueError, "at least 1"),
    ("iteration", dict(axes=("pos",), where={"iteration": 3}), IndexError, "no iteration 3"),
    ("position", dict(where={"pos": 4}), IndexError, "no pos 4"),
    ("batch size", dict(batch_size=0), ValueError, "batch_size"),
    ("argument", dict(n_iterations=4), ValueError, "model.iterations"),
    ("mask", dict(attention_mask=torch.ones(2, 3)), ValueError, "attention_mask must be"),
    ("state", dict(initial_state=torch.ones(2, 4, 3)), ValueError, "initial_state must be"),
    ("metric shape", dict(metric=lambda x: x[:, -1]), ValueError, "to a scalar.*returns"),
    ("metric kind", dict(metric=lambda x: None), ValueError, "returns NoneType"),
    ("float tokens", dict(corrupted_tokens=torch.ones(2, 4)), ValueError, "integer tokens"),
    ("length", dict(corrupted_tokens=tiny_tokens(2, 6)), ValueError, "4 positions.*has 6"),
    ("batch", dict(corrupted_tokens=tiny_tokens(3, 4)), ValueError, "batch size 2.*3 corrupted"),
]


@pytest.mark.parametrize(
    ("changes", "error", "match"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_input_is_refused_before_any_forward_pass(models, changes, error, match):
    model = models["retrofitted"]
    clean, corrupted = prompts()
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
    arguments = {
        "corrupted_tokens": corrupted,
        "clean_cache": cache,
        "metric": metric,
        "progress": False,
        **changes,
    }
    with Forbidden(model), pytest.raises(error, match=match):
        activation_patch(model, **arguments)


def test_bad_caches_are_refused(models, plain):
    model = models["retrofitted"]
    clean, corrupted = prompts()
    with torch.no_grad():
        _, longer = model.run_with_cache(clean, n_iterations=4)
        _, partial = model.run_with_cache(clean, names_filter="iter.1.0.hook_resid_pre")
        _, plain_cache = plain.run_with_cache(clean)
    with Forbidden(model):
        with pytest.raises(ValueError, match="n_iterations=3"):
            activation_patch(model, corrupted, longer, metric)
        with pytest.raises(ValueError, match="another number of iterations"):
            activation_patch(model, corrupted, dict(longer), metric)
        with pytest.raises(ValueError, match=r"lacks 'blocks\.0\.hook_resid_pre' and 6 more"):
            activation_patch(model, corrupted, partial, metric)
        grouped = {name: value for name, value in partial.items()}
        grouped["blocks.3.attn.hook_z"] = torch.zeros(2, 4, 2, 8)
        with pytest.raises(ValueError, match="2 heads in the cache but 4"):
            activation_patch(model, corrupted, grouped, metric, "z", ("head",), where={"block": 3})
    with Forbidden(plain), pytest.raises(ValueError, match="no iterations"):
        activation_patch(plain, corrupted, plain_cache, metric, axes=("iteration",))
