"""The table of hook points agrees with every model; what is cached can be patched, or says why."""

import pytest
import torch

from tests.closeness import assert_close
from tests.models import ARCHITECTURES, MECHANISMS, STACKS, any_model, tiny_tokens
from tl_loops.layout.names import HookSpec, declare, spec_of
from tl_loops.patching import activation_patch
from tl_loops.runs.activations import find_activation
from tl_loops.runs.seen_keys import UnseenKeyError

MODELS = (*ARCHITECTURES, *MECHANISMS, *STACKS)
BATCH, N_POS = 2, 5


def _models(name: str):
    model = any_model(name)
    yield model
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    yield model


def _sizes(cfg) -> dict[str, int | None]:
    grouped = cfg.n_key_value_heads or cfg.n_heads
    return {
        "batch": BATCH,
        "pos": N_POS,
        "query": N_POS,
        "key": N_POS,
        "head": cfg.n_heads,
        "kv_head": grouped,
        "one": 1,
        "d_vocab": cfg.d_vocab,
        "d_mlp": cfg.d_mlp,
        "d_head": cfg.d_head,
    }


@pytest.mark.parametrize("name", MODELS)
def test_axes_are_those_of_the_tensors(name: str) -> None:
    for model in _models(name):
        _, cache = model.run_with_cache(tiny_tokens(BATCH, N_POS))
        sizes = _sizes(model.cfg)
        for hook_name in model.hook_dict:
            spec = spec_of(hook_name)
            assert spec is not None, f"{hook_name} is not in the table"
            if hook_name not in cache:
                continue
            axes, value = spec.axes_on(model.cfg), cache[hook_name]
            assert value.ndim == len(axes), hook_name
            for size, axis in zip(value.shape, axes, strict=True):
                assert sizes.get(axis, size) in (size, None), (hook_name, axis, size)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pos_slice", [-1, (1, 3), N_POS - 1])  # the last: no model has 5 heads
def test_position_slices_cut_the_position_axis(name: str, pos_slice) -> None:
    model = any_model(name)
    tokens = tiny_tokens(BATCH, N_POS)
    _, whole = model.run_with_cache(tokens)
    _, part = model.run_with_cache(tokens, pos_slice=pos_slice)
    index = [pos_slice] if isinstance(pos_slice, int) else slice(*pos_slice)
    for hook_name in whole.keys():
        dim = spec_of(hook_name).pos_dim
        value = whole[hook_name]
        expected = value if dim is None else value[(*[slice(None)] * dim, index)]
        assert torch.equal(part[hook_name], expected), hook_name


@pytest.mark.parametrize("name", MODELS)
def test_whatever_is_cached_can_be_patched_or_says_why(name: str) -> None:
    model = any_model(name)
    clean, corrupted = tiny_tokens(1, N_POS), tiny_tokens(1, N_POS, seed=4)
    _, cache = model.run_with_cache(clean)
    seen = {(spec_of(n).place, spec_of(n).name) for n in cache.keys()}
    for _, rest in sorted(seen):
        try:
            find_activation(model, rest)
        except ValueError as error:
            assert "one vector for all positions" in str(error), rest
            continue
        names = [n for n in cache.keys() if spec_of(n).name == rest]
        where = {}
        if names[0].startswith("blocks."):
            where = {"block": [int(n.split(".")[1]) for n in names]}
        elif names[0].startswith("iter."):
            where = {"iteration": [int(n.split(".")[1]) for n in names]}
        axes = {"blocks": "block", "iter": "iteration"}.get(names[0].split(".")[0])

        def metric(logits):
            return logits[0, -1, 3]

        try:
            result = activation_patch(
                model, corrupted, cache, metric, rest, [axes] if axes else ["pos"],
                where=where or None,
            )  # fmt: skip
        except UnseenKeyError:  # Each prompt is routed to blocks of its own.
            assert name.startswith("recursions") and rest.endswith(("pattern", "attn_scores"))
            continue
        # The first and the last place of each: the others run through the same code.
        for k in sorted({0, len(result) - 1}) if axes is not None else ():
            value, chosen = result[k], [names[k]]

            def put(tensor, hook):
                return cache[hook.name]

            with torch.no_grad():
                logits = model.run_with_hooks(corrupted, fwd_hooks=[(n, put) for n in chosen])
            size = float(logits.abs().max())
            assert_close(value, metric(logits), rtol=1e-4, atol=1e-5, size=size, msg=rest)


def test_a_second_meaning_for_a_hook_point_is_an_error() -> None:
    with pytest.raises(ValueError, match="declared twice"):
        declare(HookSpec("hook_state_out", "iteration", ("batch", "pos")))
