"""TransformerLens's own patching, head detector and SVD work on unrolled blocks as they stand."""

import warnings
from functools import partial

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens import SVDInterpreter, head_detector, patching
from transformers import PreTrainedTokenizerFast

from tests.closeness import assert_close
from tests.feedforward import only_from_4
from tests.models import ARCHITECTURES, VARIATIONS, any_model, tiny_config, tiny_model
from tl_loops import LoopedSemanticsError, LoopedTransformer

CLEAN = torch.tensor([[3, 14, 7], [15, 9, 2]])
CORRUPTED = torch.tensor([[3, 11, 7], [4, 9, 30]])
CLOSE = dict(rtol=1e-4, atol=1e-5)

SMALL = {
    "pre": ("retrofitted", dict(n_core=1, n_iterations=2, n_coda=0)),
    "sandwich": ("ouro", dict(n_core=1, n_iterations=3)),
    "post_residual": ("huginn", dict(n_prelude=1, n_core=1, n_coda=1, n_iterations=2)),
    "post_branch": ("olmo_grouped", dict(n_core=1, n_coda=0, n_iterations=2, n_key_value_heads=1)),
}
"""One small model for every norm placement."""


@pytest.fixture(params=SMALL, scope="module")
def model(request):
    architecture, changes = SMALL[request.param]
    return tiny_model(architecture, n_heads=2, **changes)


@pytest.fixture(scope="module")
def clean_cache(model):
    return model.run_with_cache(CLEAN)[1]


def metric(logits):
    return (logits[:, -1, 5] - logits[:, -1, 8]).sum()


VECTOR = [("z", "head_out"), ("q", "head_q"), ("k", "head_k"), ("v", "head_v")]
FUNCTIONS = {
    **{
        f"get_act_patch_{name}": (name, ("layer", "pos"))
        for name in ("resid_pre", "resid_mid", "attn_out", "mlp_out")
    },
    **{f"get_act_patch_attn_{f}_by_pos": (a, ("layer", "pos", "head")) for a, f in VECTOR},
    **{f"get_act_patch_attn_{f}_all_pos": (a, ("layer", "head")) for a, f in VECTOR},
    "get_act_patch_attn_head_pattern_all_pos": ("pattern", ("layer", "head_index")),
    "get_act_patch_attn_head_pattern_by_pos": ("pattern", ("layer", "head_index", "dest_pos")),
    "get_act_patch_attn_head_pattern_dest_src_pos": (
        "pattern",
        ("layer", "head_index", "dest_pos", "src_pos"),
    ),
}
"""Every single patching function: the activation and the axes that it runs over."""


def place(axes, cell):
    """Where in the activation a cell lies."""
    if axes == ("layer", "head"):
        return (slice(None), slice(None), cell[1])
    return (slice(None), *cell[1:])


def patched_by_hand(model, clean_cache, activation, at, layer):
    rest = f"hook_{activation}"
    if activation in ("z", "q", "k", "v", "pattern"):
        rest = f"attn.{rest}"

    # By the coordinate, where the library under test goes by the index.
    name = model.layout.alias(f"blocks.{layer}.{rest}")

    def patch(x, hook):
        x = x.clone()
        x[at] = clean_cache[hook.name][at]
        return x

    return metric(model.run_with_hooks(CORRUPTED, fwd_hooks=[(name, patch)]))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_patching_one_cell_at_a_time(model, clean_cache, function):
    activation, axes = FUNCTIONS[function]
    before = {name: tensor.clone() for name, tensor in clean_cache.items()}
    grid = getattr(patching, function)(model, CORRUPTED, clean_cache, metric)
    heads = model.cfg.n_heads
    if activation in ("k", "v") and model.cfg.n_key_value_heads:
        heads = model.cfg.n_key_value_heads
    sizes = {"layer": model.cfg.n_layers, "head": heads, "head_index": heads}
    assert grid.shape == tuple(sizes.get(axis, 3) for axis in axes)
    cells = [(0,) * len(axes), tuple(n - 1 for n in grid.shape), tuple(n // 2 for n in grid.shape)]
    for cell in cells:
        expected = patched_by_hand(model, clean_cache, activation, place(axes, cell), cell[0])
        assert_close(grid[cell], expected.detach(), **CLOSE)
    for name, tensor in clean_cache.items():
        assert torch.equal(tensor, before[name])


def test_patching_from_the_same_run_changes_nothing(model):
    _, own = model.run_with_cache(CORRUPTED)
    expected = metric(model(CORRUPTED)).item()
    grid = patching.get_act_patch_resid_pre(model, CORRUPTED, own, metric)
    assert_close(grid, torch.full_like(grid, expected), **CLOSE)


def test_patching_everything_from_the_clean_run_gives_the_clean_logits(model, clean_cache):
    cfg = model.cfg
    expected = model(CLEAN)

    def restore(x, hook):
        return clean_cache[hook.name].clone()

    last = f"blocks.{cfg.n_layers - 1}.hook_resid_post"
    start = ["hook_embed", "hook_initial_state"]
    branches = [n for n in clean_cache.keys() if n.endswith(("hook_attn_out", "hook_mlp_out"))]
    parts = [n for n in clean_cache.keys() if n.endswith(("attn.hook_z", "mlp.hook_post"))]
    entering = ["hook_injection"] if cfg.injection else []
    first = f"blocks.{cfg.n_prelude}.hook_resid_pre"
    for names in (
        ["hook_embed"],
        [*start, *branches],
        [*start, *parts],
        [*entering, first],
        [last],
    ):
        logits = model.run_with_hooks(CORRUPTED, fwd_hooks=[(name, restore) for name in names])
        assert_close(logits, expected, **CLOSE)


def test_given_cells_and_their_table(model, clean_cache):
    cells = pd.DataFrame([[1, 2], [0, 1], [1, 0]], columns=["layer", "pos"])
    patch = partial(
        patching.generic_activation_patch,
        patch_setter=patching.layer_pos_patch_setter,
        activation_name="resid_mid",
    )
    values, table = patch(
        model, CORRUPTED, clean_cache, metric, index_df=cells, return_index_df=True
    )
    assert table is cells and values.shape == (3,)
    grid = patch(model, CORRUPTED, clean_cache, metric, index_axis_names=("layer", "pos"))
    assert_close(values, grid[cells["layer"], cells["pos"]])
    ranges = patching.make_df_from_ranges([2, 3], ["layer", "pos"])
    assert ranges.values.tolist() == [[a, b] for a in range(2) for b in range(3)]


SETTERS = {
    "layer_pos_patch_setter": (lambda i: (slice(None), i[1]), 2),
    "layer_pos_head_vector_patch_setter": (lambda i: (slice(None), i[1], i[2]), 3),
    "layer_head_vector_patch_setter": (lambda i: (slice(None), slice(None), i[1]), 2),
    "layer_head_pattern_patch_setter": (lambda i: (slice(None), i[1]), 2),
    "layer_head_pos_pattern_patch_setter": (lambda i: (slice(None), i[1], i[2]), 3),
    "layer_head_dest_src_pos_pattern_patch_setter": (
        lambda i: (slice(None), i[1], i[2], i[3]),
        4,
    ),
}


@pytest.mark.parametrize("name", SETTERS)
def test_a_setter_changes_its_cell_alone(name):
    at, n_axes = SETTERS[name]
    generator = torch.Generator().manual_seed(0)
    corrupted, clean = torch.randn(2, 2, 3, 3, 3, generator=generator)
    index = [5, 1, 2, 0][:n_axes]  # the layer is not read
    expected = corrupted.clone()
    expected[at(index)] = clean[at(index)]
    assert torch.equal(getattr(patching, name)(corrupted.clone(), index, clean), expected)
    assert not torch.equal(expected, corrupted)


def test_all_kinds_of_heads_in_one_tensor_need_a_key_head_for_every_query_head():
    small = dict(n_prelude=0, n_core=1, n_coda=0, n_iterations=2, n_heads=2, n_key_value_heads=1)
    model = tiny_model("olmo_grouped", **small)
    run = (model, CORRUPTED, model.run_with_cache(CLEAN)[1], metric)
    for name in ("all_pos", "by_pos"):
        with pytest.raises(LoopedSemanticsError, match="fills in 0 for key and value heads"):
            getattr(patching, f"get_act_patch_attn_head_{name}_every")(*run)
    assert patching.get_act_patch_attn_head_k_all_pos(*run).shape[-1] == 1


def test_all_kinds_of_activation_in_one_tensor():
    small = dict(n_prelude=0, n_core=1, n_coda=0, n_iterations=2, n_heads=2, n_key_value_heads=None)
    model = tiny_model("olmo_grouped", **small)
    run = (model, CORRUPTED, model.run_with_cache(CLEAN)[1], metric)
    kinds = ("out", "q", "k", "v", "pattern")

    every = patching.get_act_patch_attn_head_all_pos_every(*run)
    for row, kind in zip(every, kinds, strict=True):
        single = getattr(patching, f"get_act_patch_attn_head_{kind}_all_pos")(*run)
        assert_close(row, single, **CLOSE)
    by_pos = patching.get_act_patch_attn_head_by_pos_every(*run)
    for row, kind in zip(by_pos, kinds, strict=True):
        single = getattr(patching, f"get_act_patch_attn_head_{kind}_by_pos")(*run)
        single = single.movedim(1, 2) if kind == "pattern" else single
        assert_close(row, single, **CLOSE)
    blocks = patching.get_act_patch_block_every(*run)
    for row, kind in zip(blocks, ("resid_pre", "attn_out", "mlp_out"), strict=True):
        assert_close(row, getattr(patching, f"get_act_patch_{kind}")(*run), **CLOSE)


# Heads.


@pytest.fixture(scope="module")
def speaking():
    words = {w: i for i, w in enumerate(["<bos>", "<eos>", "<unk>", *"abcdefghij"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    return LoopedTransformer(tiny_config("huginn"), tokenizer=fast).eval()


TEXT = "a b c a b c"
DETECTED = {
    "previous_token_head": head_detector.get_previous_token_head_detection_pattern,
    "duplicate_token_head": head_detector.get_duplicate_token_head_detection_pattern,
    "induction_head": head_detector.get_induction_head_detection_pattern,
}


@pytest.mark.parametrize("kind", DETECTED)
def test_heads_are_detected_in_every_iteration(speaking, kind):
    cfg, layout = speaking.cfg, speaking.layout
    scores = head_detector.detect_head(speaking, TEXT, kind)
    assert scores.shape == (cfg.n_layers, cfg.n_heads)
    _, cache = speaking.run_with_cache(TEXT, remove_batch_dim=True)
    wanted = DETECTED[kind](speaking.to_tokens(TEXT))
    for t in range(cfg.n_iterations):
        for layer in range(cfg.n_core):
            pattern = cache["pattern", t, layer]
            expected = (pattern * wanted).sum((-1, -2)) / pattern.sum((-1, -2))
            found = scores[layout.index(iteration=t, layer=layer)]
            assert_close(found, expected.detach(), **CLOSE)
    again = head_detector.detect_head(speaking, TEXT, kind, cache=cache)
    assert_close(again, scores)
    block = layout.index(iteration=1, layer=1)
    chosen = head_detector.detect_head(
        speaking, TEXT, kind, heads=[(block, 2)], exclude_bos=True, error_measure="abs"
    )
    assert (chosen == -1).sum() == chosen.numel() - 1
    difference = (cache["pattern", block][2] - wanted).abs()
    difference[:, 0] = 0
    assert chosen[block, 2].item() == pytest.approx(1 - difference.mean().item() * 7, abs=2e-3)


def test_detection_patterns():
    tokens = torch.tensor([[0, 4, 5, 4]])
    previous = head_detector.get_previous_token_head_detection_pattern(tokens)
    assert previous.nonzero().tolist() == [[1, 0], [2, 1], [3, 2]]
    duplicate = head_detector.get_duplicate_token_head_detection_pattern(tokens)
    assert duplicate.nonzero().tolist() == [[3, 1]]
    induction = head_detector.get_induction_head_detection_pattern(tokens)
    assert induction.nonzero().tolist() == [[3, 2]]


def test_similarity_of_a_perfect_head_is_one(capsys):
    pattern = torch.eye(4).roll(1, 0).tril()
    score = head_detector.compute_head_attention_similarity_score(
        pattern,
        detection_pattern=pattern,
        exclude_bos=False,
        exclude_current_token=False,
        error_measure="mul",
    )
    assert score == 1.0
    head_detector.get_supported_heads()
    assert "induction_head" in capsys.readouterr().out


# Singular vectors.


@pytest.mark.parametrize("name", [*ARCHITECTURES, *VARIATIONS])
def test_singular_vectors_are_those_of_the_weights_with_norms(name):
    model = any_model(name)
    weights, layout = model.tl_parameters(), model.layout
    interpreter = SVDInterpreter(model)
    block = layout.index(iteration=1, layer=1)
    with torch.no_grad():
        OV = weights[f"blocks.{block}.attn.W_V"][2] @ weights[f"blocks.{block}.attn.W_O"][2]
        matrices = {
            "OV": OV,
            "w_in": weights[f"blocks.{block}.mlp.W_in"].T,
            "w_out": weights[f"blocks.{block}.mlp.W_out"],
        }
        for kind, matrix in matrices.items():
            options = dict(num_vectors=4, head_index=2 if kind == "OV" else None)
            found = interpreter.get_singular_vectors(kind, block, **options)
            expected = torch.linalg.svd(matrix)[2][:4] @ weights["unembed.W_U"]
            assert found.shape == (model.cfg.d_vocab, 1, 4)
            assert_close(found[:, 0].abs(), expected.T.abs(), rtol=1e-3, atol=1e-4)
            other = layout.index(iteration=0, layer=1)
            again = interpreter.get_singular_vectors(kind, other, **options)
            assert torch.equal(again, found)  # one layer, whatever the iteration


@pytest.mark.parametrize("name", ["retrofitted", "ouro", "huginn"])
def test_singular_vectors_do_not_change_when_norms_are_folded(name):
    model, other = any_model(name), any_model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        other.process_weights_()
    with torch.no_grad():
        for kind, head in (("OV", 1), ("w_in", None), ("w_out", None)):
            vectors = [
                SVDInterpreter(m).get_singular_vectors(kind, 2, 3, head_index=head)
                for m in (model, other)
            ]
            assert_close(vectors[0].abs(), vectors[1].abs(), rtol=1e-3, atol=1e-4)


# What TransformerLens 4 adds.


@only_from_4
def test_the_logit_lens_of_a_cache(model):
    with torch.no_grad():
        logits, cache = model.run_with_cache(CLEAN)
        found = cache.logit_lens(positions=None)
    assert len(found.labels) == model.cfg.n_layers + 1
    assert_close(found.readout.values[-1], logits, rtol=1e-4, atol=1e-4)
    resid = cache["resid_pre", 1]
    expected = model.unembed(model.ln_final(resid))
    assert_close(found.readout.values[1], expected, rtol=1e-4, atol=1e-4)


@only_from_4
def test_results_prompt_by_prompt(model, clean_cache):
    def each(logits):
        return logits[:, -1, 5] - logits[:, -1, 8]

    found = patching.get_act_patch_resid_pre(model, CORRUPTED, clean_cache, each, reduce="none")
    total = patching.get_act_patch_resid_pre(model, CORRUPTED, clean_cache, metric)
    assert isinstance(found, patching.PatchingResult)
    assert_close(found.values.sum(-1), total, rtol=1e-4, atol=1e-5)
    assert_close(found.mean(), total / 2, rtol=1e-4, atol=1e-5)


@only_from_4
@pytest.mark.parametrize(
    "name", ["get_act_patch_direct_path", "get_act_patch_direct_path_all_sources"]
)
def test_direct_paths_are_refused(model, name):
    with pytest.raises(LoopedSemanticsError, match="path_patch"):
        getattr(patching, name)(model, CORRUPTED)
