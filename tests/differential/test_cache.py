"""One iteration is a feedforward model: its cache gives what HookedTransformer's gives."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.differential.pairs import architectures, cached, close, pair, prompts, sample
from tl_loops.upstream import HAS_HOOKED_TRANSFORMER

if not HAS_HOOKED_TRANSFORMER:
    pytest.skip("compares with HookedTransformer, which 4.0 removed", allow_module_level=True)

SLICES = st.sampled_from([None, -1, 0, (0, 2), [0, 1], slice(1, None)])


def layers(depth: int) -> Any:
    return st.sampled_from([None, -1, *range(depth + 1)])


def both(fields: dict[str, Any], tokens: torch.Tensor) -> Any:
    """Our model and cache, and TransformerLens's."""
    looped, plain = pair(fields)
    return looped, plain, cached(looped, tokens), cached(plain, tokens)


@sample
@given(architectures(), prompts(), st.data())
def test_entries(fields, tokens, data):
    _, plain, ours, theirs = both(fields, tokens)
    missing = set(theirs.keys()) - set(ours.keys())
    assert {name.split(".")[-1] for name in missing} <= {"hook_resid_pre", "hook_in", "hook_out"}
    for name in theirs:
        if name in ours:
            close(ours[name], theirs[name])
    for block in range(-plain.cfg.n_layers, plain.cfg.n_layers):
        for short in ("resid_pre", "resid_mid", "resid_post", "q", "k", "v", "z", "pattern", "pre"):
            close(ours[short, block], theirs[short, block])
        close(ours["scale", block, "ln1"], theirs["scale", block, "ln1"])
    close(ours["embed"], theirs["embed"])
    name = data.draw(st.sampled_from(["resid_pre", "z", "attn_out", "pattern", "mlp_out", "post"]))
    layer = data.draw(layers(plain.cfg.n_layers).filter(lambda i: i != 0))
    close(ours.stack_activation(name, layer), theirs.stack_activation(name, layer))


@sample
@given(architectures(), prompts(), st.data())
def test_what_run_with_cache_keeps(fields, tokens, data):
    looped, plain = pair(fields)
    arguments: dict[str, Any] = dict(
        names_filter=data.draw(
            st.sampled_from(
                [
                    "blocks.1.hook_resid_pre",
                    ["blocks.0.attn.hook_z", "blocks.1.hook_mlp_out", "ln_final.hook_scale"],
                    lambda name: name.endswith(("hook_resid_post", "hook_pattern", "hook_embed")),
                ]
            )
        ),
        pos_slice=data.draw(st.sampled_from([None, -1, 1, (0, 2), [0, 1]])),
        incl_bwd=data.draw(st.booleans()),
        remove_batch_dim=len(tokens) == 1 and data.draw(st.booleans()),
    )
    arguments["return_type"] = "loss" if arguments["incl_bwd"] else "logits"
    if not arguments["incl_bwd"]:
        arguments["stop_at_layer"] = data.draw(st.sampled_from([None, 1, -1]))
    (a, ours), (b, theirs) = (m.run_with_cache(tokens, **arguments) for m in (looped, plain))
    close(a, b)
    for name in theirs:
        if name.endswith("pattern") and arguments["pos_slice"] is not None:
            assert name in ours  # The axes that TransformerLens slices here are its own.
        else:
            close(ours[name], theirs[name])
    extra = set(ours.keys()) - set(theirs.keys())
    assert not {name for name in extra if name.startswith("blocks")}


@sample
@given(architectures(), prompts(), st.data())
def test_the_accumulated_stream(fields, tokens, data):
    _, plain, ours, theirs = both(fields, tokens)
    arguments = dict(
        layer=data.draw(layers(plain.cfg.n_layers)),
        incl_mid=data.draw(st.booleans()),
        apply_ln=data.draw(st.booleans()),
        pos_slice=data.draw(SLICES),
    )
    arguments["mlp_input"] = arguments["layer"] in range(plain.cfg.n_layers) and data.draw(
        st.booleans()
    )
    stack, labels = ours.accumulated_resid(return_labels=True, **arguments)
    expected, names = theirs.accumulated_resid(return_labels=True, **arguments)
    assert len(labels) == len(names)
    if arguments["apply_ln"]:
        # TransformerLens divides every row by one scale and applies no gain; the last row of ours
        # is what the norm gives.
        last = "ln_final.hook_normalized"
        if arguments["layer"] in (None, -1, plain.cfg.n_layers):
            _normed(plain.ln_final, theirs[last], stack[-1], ours, arguments["pos_slice"])
        return
    close(stack, expected)


def _normed(norm: Any, normalized: Any, row: Any, ours: Any, pos_slice: Any) -> None:
    gain, bias = getattr(norm, "w", None), getattr(norm, "b", None)
    value = normalized if gain is None else normalized * gain
    value = value if bias is None else value + bias
    close(row, ours._run(pos_slice).pos.apply(value, dim=-2))


@sample
@given(architectures(), prompts(), st.data())
def test_decompositions_into_blocks(fields, tokens, data):
    _, plain, ours, theirs = both(fields, tokens)
    layer = data.draw(layers(plain.cfg.n_layers))
    arguments = dict(
        layer=layer,
        incl_embeds=data.draw(st.booleans()),
        mode=data.draw(st.sampled_from(["all", "attn", "mlp"])),
        pos_slice=data.draw(SLICES),
        mlp_input=layer in range(plain.cfg.n_layers) and data.draw(st.booleans()),
    )
    if layer == 0 and not arguments["incl_embeds"]:
        return  # Nothing is left: TransformerLens raises.
    stack, labels = ours.decompose_resid(return_labels=True, **arguments)
    expected, names = theirs.decompose_resid(return_labels=True, **arguments)
    assert len(labels) == len(names)
    close(stack, expected)


@sample
@given(architectures(), prompts(), st.data())
def test_heads(fields, tokens, data):
    _, plain, ours, theirs = both(fields, tokens)
    for cache in (ours, theirs):
        cache.compute_head_results()
    for block in range(plain.cfg.n_layers):
        close(ours["result", block], theirs["result", block])
    arguments = dict(
        layer=data.draw(layers(plain.cfg.n_layers).filter(lambda i: i != 0)),
        incl_remainder=data.draw(st.booleans()),
        pos_slice=data.draw(SLICES),
    )
    stack, labels = ours.stack_head_results(return_labels=True, **arguments)
    expected, names = theirs.stack_head_results(return_labels=True, **arguments)
    assert len(labels) == len(names)
    if plain.cfg.use_normalization_before_and_after:
        return  # TransformerLens leaves out the norm behind the attention.
    close(stack, expected)


@sample
@given(architectures(), prompts(), st.data())
def test_neurons(fields, tokens, data):
    _, plain, ours, theirs = both(fields, tokens)
    if plain.cfg.use_normalization_before_and_after:
        return  # TransformerLens leaves out the norm behind the MLP.
    depth = plain.cfg.n_layers
    block = data.draw(st.integers(0, depth - 1))
    some = data.draw(st.sampled_from([None, 3, (0, 5), [1, 4]]))
    pos = data.draw(st.sampled_from([None, -1, (0, 2)]))
    close(
        ours.get_neuron_results(block, neuron_slice=some, pos_slice=pos),
        theirs.get_neuron_results(block, neuron_slice=some, pos_slice=pos),
    )
    arguments = dict(
        layer=data.draw(layers(depth).filter(lambda i: i != 0)),
        neuron_slice=some if some != 3 else None,
        incl_remainder=data.draw(st.booleans()),
        pos_slice=pos,
    )
    if data.draw(st.booleans()):
        arguments["project_output_onto"] = data.draw(
            st.sampled_from([plain.W_U[:, 5], plain.W_U[:, :3]])
        )
    stack, labels = ours.stack_neuron_results(return_labels=True, **arguments)
    expected, names = theirs.stack_neuron_results(return_labels=True, **arguments)
    assert len(labels) == len(names)
    close(stack, expected)


@sample
@given(architectures(), prompts(), st.data())
def test_the_full_decomposition(fields, tokens, data):
    _, plain, ours, theirs = both(fields, tokens)
    if plain.cfg.use_normalization_before_and_after:
        return
    depth = plain.cfg.n_layers
    layer = data.draw(layers(depth).filter(lambda i: i != 0))
    arguments = dict(
        layer=layer,
        expand_neurons=data.draw(st.booleans()),
        pos_slice=data.draw(st.sampled_from([None, -1, (0, 2)])),
        mlp_input=layer in range(depth) and data.draw(st.booleans()),
    )
    stack, labels = ours.get_full_resid_decomposition(return_labels=True, **arguments)
    expected, names = theirs.get_full_resid_decomposition(return_labels=True, **arguments)
    close(stack.sum(0), expected.sum(0))
    assert len(labels) == len(names), (labels, names)
    close(stack, expected)


@sample
@given(architectures(), prompts(), st.data())
def test_norms_of_stacks_and_attributions(fields, tokens, data):
    _, plain, ours, theirs = both(fields, tokens)
    depth = plain.cfg.n_layers
    layer = data.draw(layers(depth))
    mlp_input = layer in range(depth) and data.draw(st.booleans())
    pos = data.draw(st.sampled_from([None, -1, (0, 2)]))
    rows = data.draw(st.sampled_from([None, 0, (0, 1)]))
    stack = theirs.decompose_resid(pos_slice=pos)
    where = dict(layer=layer, mlp_input=mlp_input, pos_slice=pos, batch_slice=rows)
    gain = getattr(_norm(plain, layer, mlp_input), "w", 1.0)
    close(ours.apply_ln_to_stack(stack, **where), theirs.apply_ln_to_stack(stack, **where) * gain)
    if layer in (None, -1, depth):  # Elsewhere TransformerLens does not read recompute_ln.
        where["recompute_ln"] = True
        close(ours.apply_ln_to_stack(stack, **where), theirs.apply_ln_to_stack(stack, **where))
    answers = tokens[:, -1]
    wrong = data.draw(st.sampled_from([None, tokens[:, 0]]))
    if hasattr(plain.ln_final, "w"):
        return  # TransformerLens leaves the gain out.
    if len(answers) > 1 and pos != -1:
        answers = answers[:, None]
        wrong = None if wrong is None else wrong[:, None]
    close(
        ours.logit_attrs(stack, answers, incorrect_tokens=wrong, pos_slice=pos),
        theirs.logit_attrs(stack, answers, incorrect_tokens=wrong, pos_slice=pos),
    )


def _norm(plain: Any, layer: int | None, mlp_input: bool) -> Any:
    """The norm of a place, of which TransformerLens applies neither gain nor bias to a stack."""
    if layer not in range(plain.cfg.n_layers):
        return plain.ln_final
    return plain.blocks[layer].ln2 if mlp_input else plain.blocks[layer].ln1


NORMED = [
    "decompose_resid",
    "stack_head_results",
    "stack_neuron_results",
    "get_full_resid_decomposition",
]


@pytest.mark.parametrize("method", NORMED)
@sample
@given(architectures(), prompts(), st.data())
def test_decompositions_after_the_norm(method, fields, tokens, data):
    _, plain, ours, theirs = both(fields, tokens)
    if plain.cfg.use_normalization_before_and_after:
        return  # TransformerLens leaves out the norm behind each branch.
    depth = plain.cfg.n_layers
    arguments = dict(
        layer=data.draw(st.sampled_from([-1, *range(1, depth + 1)])),
        pos_slice=data.draw(st.sampled_from([None, -1, (0, 2)])),
        apply_ln=True,
    )
    mlp_input = method in ("decompose_resid", "get_full_resid_decomposition")
    if mlp_input:
        arguments["mlp_input"] = arguments["layer"] in range(depth) and data.draw(st.booleans())
    stack, labels = getattr(ours, method)(return_labels=True, **arguments)
    expected, names = getattr(theirs, method)(return_labels=True, **arguments)
    norm = _norm(plain, arguments["layer"], arguments.get("mlp_input", False))
    expected = expected * getattr(norm, "w", 1.0)
    if names[-1] == "bias":
        expected = torch.cat([expected[:-1], expected[-1:] + getattr(norm, "b", 0.0)])
    # In a decomposition into blocks the bias of the norm is a component of its own.
    kept = [i for i, label in enumerate(labels) if label != "ln_bias"]
    assert len(kept) == len(names), (labels, names)
    close(stack[kept], expected)


@sample
@given(architectures(), st.sampled_from(["left", "right"]), prompts(batch=3), st.data())
def test_caches_of_padded_prompts(fields, side, tokens, data):
    looped, plain = pair(fields)
    mask = torch.ones_like(tokens)
    for row in mask:
        count = data.draw(st.integers(0, len(row) - 1))
        row[slice(count) if side == "left" else slice(len(row) - count, None)] = 0
    ours, theirs = (cached(m, tokens, attention_mask=mask) for m in (looped, plain))
    real = mask.bool()
    for short in ("resid_pre", "z", "attn_out", "mlp_out", "resid_post"):
        close(ours[short, -1][real], theirs[short, -1][real])
    close(ours.accumulated_resid()[:, real], theirs.accumulated_resid()[:, real])
    close(ours.decompose_resid()[:, real], theirs.decompose_resid()[:, real])
    if not plain.cfg.use_normalization_before_and_after:
        for method in ("stack_head_results", "get_full_resid_decomposition"):
            close(getattr(ours, method)()[:, real], getattr(theirs, method)()[:, real])


@sample
@given(architectures(), prompts(), st.data())
def test_projections_of_neurons(fields, tokens, data):
    # In float64 TransformerLens's full decomposition multiplies by a bias in float32.
    looped, plain = pair(fields, dtype=torch.float32)
    ours, theirs = cached(looped, tokens), cached(plain, tokens)
    if plain.cfg.use_normalization_before_and_after:
        return
    onto = data.draw(st.sampled_from([plain.W_U[:, 5], plain.W_U[:, :3]]))
    pos = data.draw(st.sampled_from([None, -1, (0, 2)]))
    block = data.draw(st.integers(0, plain.cfg.n_layers - 1))
    arguments = dict(pos_slice=pos, project_output_onto=onto)
    a, b = (c.get_neuron_results(block, **arguments) for c in (ours, theirs))
    close(a, b, 1e-4)
    a, b = (c.get_full_resid_decomposition(**arguments) for c in (ours, theirs))
    close(a, b, 1e-4)


@sample
@given(architectures(), prompts(), st.booleans())
def test_places_and_the_switch_of_gradients(fields, tokens, mode):
    _, _, ours, theirs = both(fields, tokens)
    before = torch.is_grad_enabled()
    a, b = (cache.to("cpu") for cache in (ours, theirs))
    close(a["resid_post", -1], b["resid_post", -1])
    assert list(a.keys()) == list(ours.keys())
    try:
        found = []
        for cache in (ours, theirs):
            torch.set_grad_enabled(not mode)
            cache.toggle_autodiff(mode)
            found.append(torch.is_grad_enabled())
        assert found == [mode, mode]
    finally:
        torch.set_grad_enabled(before)


def test_every_method_of_the_cache_is_called_here():
    from transformer_lens import ActivationCache

    source = Path(__file__).read_text()
    refused = {"compute_ssm_state", "compute_ssm_effective_attention"}  # no state-space mixers
    names = {name for name, value in vars(ActivationCache).items() if inspect.isfunction(value)}
    missing = {
        name
        for name in names - refused
        if not name.startswith("_") and f".{name}(" not in source and f'"{name}"' not in source
    }
    assert not missing


@sample
@given(architectures(), prompts(), st.data())
def test_rows(fields, tokens, data):
    _, _, ours, theirs = both(fields, tokens)
    rows = data.draw(st.sampled_from([0, (0, 1), [0], slice(None, None, 2), -1]))
    a, b = (cache.apply_slice_to_batch_dim(rows) for cache in (ours, theirs))
    close(a["resid_post", 0], b["resid_post", 0])
    assert a.has_batch_dim == b.has_batch_dim
    close(a.decompose_resid(), b.decompose_resid())
    assert len(a) == len(list(a)) == len(list(a.values())) == len(list(a.items()))
    if len(tokens) == 1:
        close(ours.remove_batch_dim()["z", 0], theirs.remove_batch_dim()["z", 0])
        close(ours.accumulated_resid(), theirs.accumulated_resid())
    assert list(ours.ssm_layers()) == list(theirs.ssm_layers()) == []
