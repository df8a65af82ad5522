"""Weight-only analyses agree with dense matrices, with the caches, and with TransformerLens."""

import warnings

import pytest
import torch

from tests.closeness import assert_close
from tests.feedforward import only_before_4
from tests.models import ARCHITECTURES, SIZES, VARIATIONS, any_model, tiny_model, tiny_tokens
from tl_loops import LoopedSemanticsError
from tl_loops.upstream import HookedTransformer

TOKENS = tiny_tokens()
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(params=[*ARCHITECTURES, *VARIATIONS], scope="module")
def model(request):
    return any_model(request.param)


def folded(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.process_weights_()
    return model


# Composition.


def linear(norm):
    """The matrix M of a norm ``x -> x M`` without its scale."""
    d = SIZES["d_model"]
    M = torch.eye(d) - (1 / d if norm.centred else 0.0)
    return M if norm.w is None else M * norm.w


def reads(block, name, head):
    """A head's weight as it acts on the residual stream."""
    W = getattr(block.attn, name)[head]
    return linear(block.ln1) @ W if hasattr(block, "ln1") else W


def dense_score(model, left, right, mode, head1, head2):
    """‖OV M C‖ / (‖OV M‖ ‖C‖) between two unrolled blocks, by multiplying out the direct path."""
    cfg, layout, blocks = model.cfg, model.layout, model.blocks
    path = torch.eye(cfg.d_model)
    inner = cfg.block_norm in ("sandwich", "post_branch")
    if inner:
        path = path @ linear(blocks[left].ln1_post)
    c = cfg.residual_rate
    if c is not None:
        path = path * (c * blocks[left].attn_rate.w).abs()
    for index in range(left, right):
        if c is not None:
            kept = 1 - (c * blocks[index].mlp_rate.w).abs()
            path = path * (
                kept if index == left else kept * (1 - (c * blocks[index].attn_rate.w).abs())
            )
        at, after = layout.coordinate(index), layout.coordinate(index + 1)
        if cfg.block_norm in ("post_residual", "post_norm"):
            path = path @ linear(blocks[index].ln1_post) @ linear(blocks[index].ln2_post)
        new_iteration = after.phase == "core" and after.layer == 0
        if at.phase == "core" and (new_iteration or after.phase == "coda"):
            if cfg.norm_between_iterations:
                path = path @ linear(model.ln_final)
        if after.phase == "coda" and after.layer == 0 and cfg.norm_before_coda:
            path = path @ linear(model.ln_final)
        if after.phase == "coda" and after.layer == 0 and cfg.linear_before_coda:
            path = path @ model.coda_in.W
        if at.phase == "prelude" and new_iteration and cfg.norm_injection:
            path = path @ linear(model.ln_injection)
        if new_iteration and cfg.injection not in (None, "add_normed"):  # its norms are scales
            step = model.injection.prepare if at.phase == "prelude" else model.injection.carry
            path = step(path) - step(torch.zeros(cfg.d_model))  # without a bias
    writes = reads(blocks[left], "W_V", head1) @ blocks[left].attn.W_O[head1] @ path
    q, k, v = (reads(blocks[right], f"W_{x}", head2) for x in "QKV")
    if cfg.query_scale is not None:
        q = q * (cfg.query_scale * blocks[right].attn.query_scale.w[head2]) ** 2
    if cfg.qk_norm == "full":
        q = q * blocks[right].attn.q_norm.w.view(cfg.n_heads, -1)[head2]
        groups = blocks[right].attn.groups
        k = k * blocks[right].attn.k_norm.w.view(cfg.n_heads // groups, -1)[head2 // groups]
    W_O = blocks[right].attn.W_O[head2]
    W_O = W_O @ linear(blocks[right].ln1_post) if inner else W_O
    W_O = W_O if c is None else W_O * (c * blocks[right].attn_rate.w).abs()
    if mode == "V" and cfg.block_norm in ("post_residual", "post_norm"):
        W_O = W_O @ linear(blocks[right].ln1_post)
    circuit = {"Q": q @ k.T, "K": k @ q.T, "V": v @ W_O}[mode]
    return (writes @ circuit).norm() / writes.norm() / circuit.norm()


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_composition_is_the_direct_path_multiplied_out(model, mode):
    layout, names = model.layout, model.layout.physical_names()
    with torch.no_grad():
        scores = model.all_composition_scores(mode, 1)
        core, coda = layout.core_start, layout.coda_start
        n_core, last = layout.n_core, layout.n_layers - 1
        pairs = [(core, core + 1, 0), (core + 1, core + n_core, 1), (core, core + n_core, 1)]
        if layout.n_prelude:
            pairs += [(0, core + 1, 0), (0, core + n_core, 1)]
        if layout.n_coda:
            pairs += [(coda - 1, coda, 0), (coda - n_core, last, 0), (coda - 2 * n_core, coda, 1)]
        for left, right, apart in pairs:
            l1, l2 = (names.index(layout.physical_name(i)) for i in (left, right))
            expected = dense_score(model, left, right, mode, 1, 3)
            assert_close(scores[apart, l1, 1, l2, 3], expected, **CLOSE, msg=f"{left} {right}")


@only_before_4
def test_composition_of_a_loop_without_specials_is_what_transformer_lens_says():
    ours = folded(any_model("plain", n_iterations=2))
    cfg, layout = ours.cfg, ours.layout
    sizes = ("n_layers", "d_model", "d_head", "n_heads", "d_mlp", "d_vocab", "n_ctx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = HookedTransformer(
            dict(
                {size: getattr(cfg, size) for size in sizes},
                act_fn="silu",
                gated_mlp=True,
                normalization_type="RMSPre",
                positional_embedding_type="rotary",
                rotary_dim=cfg.d_head,
                device="cpu",
            )
        )
    theirs.load_state_dict(ours.state_dict(), strict=False)
    names = layout.physical_names()
    for mode in "QKV":
        with torch.no_grad():
            expected = theirs.all_composition_scores(mode)
            scores = ours.all_composition_scores(mode)
        assert scores.shape == (2, 4, cfg.n_heads, 4, cfg.n_heads)
        for left in range(cfg.n_layers):
            for right in range(left + 1, cfg.n_layers):
                at, to = layout.coordinate(left), layout.coordinate(right)
                start = at.iteration if at.phase == "core" else (0 if at.phase == "prelude" else 1)
                end = to.iteration if to.phase == "core" else (0 if to.phase == "prelude" else 1)
                same = at.phase == to.phase != "core"
                apart = 0 if same else end - start
                l1, l2 = (
                    names.index(layout.physical_name(left)),
                    names.index(layout.physical_name(right)),
                )
                assert_close(scores[apart, l1, :, l2], expected[left, :, right], **CLOSE)


def test_pairs_without_a_path_have_no_score(model):
    with torch.no_grad():
        scores = model.all_composition_scores("V", 1)
    layout, n = model.layout, model.layout.n_physical_layers
    prelude, coda = layout.n_prelude, n - layout.n_coda
    for l1 in range(n):
        for l2 in range(n):
            assert bool((scores[0, l1, :, l2] > 0).all()) == (l1 < l2)
            within = l2 >= prelude and l1 < coda
            assert bool((scores[1, l1, :, l2] > 0).all()) == within
    assert bool((scores <= 1 + 1e-5).all())


def test_scores_do_not_change_when_norms_are_folded(model):
    other = type(model)(model.cfg)
    other.load_physical_state_dict(model.physical_state_dict())
    folded(other)
    with torch.no_grad():
        for mode in "QKV":
            assert_close(
                other.all_composition_scores(mode), model.all_composition_scores(mode), **CLOSE
            )


@pytest.mark.parametrize(
    "arguments, message", [(("O",), "mode must be"), (("Q", -1), "iterations_apart must be")]
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model("ouro").all_composition_scores(*arguments)


# Labels and biases.


def test_head_labels_are_those_of_the_head_stack(model):
    _, cache = model.run_with_cache(TOKENS)
    _, labels = cache.stack_head_results(return_labels=True)
    assert model.all_head_labels() == labels


def test_accumulated_bias_is_the_bias_of_the_full_decomposition(model):
    _, cache = model.run_with_cache(TOKENS)
    depth, refused = model.cfg.n_layers, 0
    for layer, mlp_input in [(i, m) for i in range(depth) for m in (False, True)] + [
        (depth, False)
    ]:
        full, labels = cache.get_full_resid_decomposition(layer, mlp_input, return_labels=True)
        row = full[labels.index("bias")]
        try:
            bias = model.accumulated_bias(layer, mlp_input)
        except LoopedSemanticsError as error:
            refused += 1
            assert "get_full_resid_decomposition" in str(error)
            # Refused where one vector cannot be right.
            assert not torch.allclose(row, row[:1, :1].expand_as(row), atol=1e-4)
            continue
        assert_close(bias.expand_as(row), row, **CLOSE)
    cfg = model.cfg
    norms = cfg.block_norm != "pre" or cfg.norm_between_iterations or cfg.norm_before_coda
    assert bool(refused) == (cfg.attn_bias and norms)


def test_accumulated_bias_without_mlps():
    model = any_model("layer_norm")
    _, cache = model.run_with_cache(TOKENS)
    full, labels = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    bias = model.accumulated_bias(model.cfg.n_layers, include_mlp_biases=False)
    assert_close(bias.expand(2, 9, -1), full[labels.index("bias")], **CLOSE)
    assert not torch.allclose(bias, model.accumulated_bias(model.cfg.n_layers))
    for bad in ((99, False), (model.cfg.n_layers, True)):
        with pytest.raises(ValueError, match="out of range"):
            model.accumulated_bias(*bad)


# Weights with norms folded in.


def test_effective_weights_are_the_maps_of_the_model(model):
    _, cache = model.run_with_cache(TOKENS)
    weights = model.tl_parameters()
    assert len(weights) == len(list(weights)) and "blocks.0.ln2.w" not in weights
    with pytest.raises(KeyError):
        weights["blocks.0.ln2.w"]
    cfg = model.cfg
    assert_close(weights["embed.W_E"][TOKENS], cache["embed"])
    ln_bias = 0 if model.ln_final.b is None else model.ln_final.b @ model.W_U
    x = cache["resid_post", -1]
    if cfg.norm_before_coda and not cfg.n_coda:
        x = cache["ln_coda.hook_normalized"] * model.ln_final.w
    logits = x @ weights["unembed.W_U"] / cache["ln_final.hook_scale"] + model.b_U + ln_bias
    assert_close(logits, cache["unembed.hook_out"], rtol=1e-3, atol=1e-4)
    for index in (0, cfg.n_layers - 1):
        block, prefix = model.blocks[index], f"blocks.{index}"
        pre = cfg.block_norm not in ("post_branch", "post_norm")
        scale = cache[f"{prefix}.ln2.hook_scale"] if pre else 1.0
        bias = block.ln2.b if pre and block.ln2.b is not None else torch.zeros(cfg.d_model)
        name = "pre_linear" if cfg.gated_mlp else "pre"
        read = cache["resid_mid", index] @ weights[f"{prefix}.mlp.W_in"] / scale
        read = read + bias @ block.mlp.W_in + (0 if cfg.gated_mlp else block.mlp.b_in)
        assert_close(read, cache[name, index], **CLOSE)
        values = torch.einsum(
            "bpd,hde->bphe", cache["resid_pre", index], weights[f"{prefix}.attn.W_V"]
        )
        if pre:
            values = values / cache[f"{prefix}.ln1.hook_scale"][..., None]
            if block.ln1.b is not None:
                values = values + torch.einsum("d,hde->he", block.ln1.b, block.attn.W_V)
        values = values + block.attn.b_V
        if hasattr(block.attn, "value_embed"):
            read = cache["normalized", index, "ln1"] * block.ln1.w
            values = values + block.attn.value_embed(read, TOKENS, block.attn.groups)
        groups = block.attn.groups if cfg.n_key_value_heads else 1
        assert_close(values[:, :, ::groups], cache["v", index], **CLOSE)
        if cfg.block_norm in ("sandwich", "post_branch") and not cfg.mlp_bias:
            written = cache["post", index] @ weights[f"{prefix}.mlp.W_out"]
            written = written / cache[f"{prefix}.ln2_post.hook_scale"]
            assert_close(written, cache["mlp_out", index], **CLOSE)
