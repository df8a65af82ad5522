"""Folding changes no number, whatever mechanisms a model has: in float64, in every combination."""

import itertools
import warnings

import pytest
import torch

from tests.models import ARCHITECTURES, MECHANISMS, STACKS, VARIATIONS, tiny_model, tiny_tokens
from tl_loops import ConfigError
from tl_loops.mechanisms import MECHANISMS as ALL

# Two iterations are enough to go round the loop; those of stacks come in cycles.
BASES = {
    **{name: (name, {"n_iterations": 2}) for name in (*ARCHITECTURES, *MECHANISMS)},
    **{name: (name, {}) for name in STACKS},
    **{name: (base, {**more, "n_iterations": 2}) for name, (base, more) in VARIATIONS.items()},
}
BIASES = dict(attn_bias=True, mlp_bias=True, unembed_bias=True)
CHANGES: dict[str, dict] = {
    "gains": dict(normalization_type="RMS"),
    "grouped keys": dict(n_key_value_heads=2),
    "attn_gate": dict(attn_gate=True),
    "first_pass_window": dict(first_pass_window=3),
    "value_embeddings": dict(value_embeddings=True, value_gate_channels=5),
    "time_conditioning": dict(time_conditioning=True),
    "time_conditioning by t": dict(time_conditioning="iteration"),
    "state_gate_rank": dict(state_gate_rank=3, halt_head=True),
    "exit_gate": dict(exit_gate=True),
    "norm_injection": dict(norm_injection=True),
    "linear_before_coda": dict(linear_before_coda=True),
    "kv_sharing": dict(kv_sharing="last"),
    "hyper_connections": dict(hyper_connections=2),
    "router": dict(router="token_choice"),
    "step_embedding": dict(step_embedding="learned"),
    "norm_between_iterations": dict(norm_between_iterations=True),
    "tied": dict(tie_word_embeddings=True),
    "one iteration": dict(n_iterations=1),
    "no weights in blocks": dict(block_norm_weight=False),
    "head_weight": dict(qk_norm="head_weight"),
}
PAIRS = list(itertools.combinations(CHANGES, 2))
TOKENS = tiny_tokens(pos=7)
READ = ("hook_resid_post", "hook_state_out", "hook_exit_gate", "hook_halt_logit", "hook_resid_mid")


def check(architecture: str, **changes) -> bool:
    """Whether there is such a model; it computes the same before and after folding."""
    try:
        model = tiny_model(architecture, dtype=torch.float64, **changes)
    except ConfigError:
        return False
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0

    def values():
        logits, cache = model.run_with_cache(
            TOKENS, attention_mask=mask, names_filter=lambda name: name.endswith(READ)
        )
        longer = None
        if model.cfg.stacks is None:
            try:
                longer = model(TOKENS, n_iterations=model.cfg.n_iterations + 1)
            except ConfigError:
                pass
        return {"logits": logits, "longer": longer, **dict(cache.items())}

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = values()
        model.process_weights_()
        after = values()
    real = mask.bool()
    for name, value in before.items():
        if value is None:
            continue
        was, now = (x[real] if name != "longer" else x for x in (value, after[name]))
        assert float((was - now).abs().max()) <= 1e-10 * max(1.0, float(was.abs().max())), name
    return True


@pytest.mark.parametrize("base", BASES)
def test_folding_is_exact_for_every_mechanism(base):
    architecture, variation = BASES[base]
    assert check(architecture, **variation)
    for change in CHANGES.values():
        check(architecture, **{**variation, **change, **BIASES})


@pytest.mark.parametrize("first", CHANGES)
def test_folding_is_exact_for_every_pair_of_mechanisms(first):
    pairs = [pair for pair in PAIRS if pair[0] == first]
    for pair in pairs:
        changes = {"n_iterations": 2, **CHANGES[pair[0]], **CHANGES[pair[1]], **BIASES}
        check("retrofitted", **changes)


def test_every_mechanism_is_among_the_models_that_are_folded():
    plain = {**ARCHITECTURES, **MECHANISMS, **STACKS}
    models = [{**plain[name], **more} for name, more in BASES.values()]
    fields = {field for model in (*models, *CHANGES.values()) for field in model}
    unseen = [m.name for m in ALL if not fields & {setting.name for setting in m.settings}]
    assert unseen == ["n_extra_tokens"]  # rows of the embedding, which no norm reads


def test_value_biases_stay_where_a_gate_scales_them():
    model = tiny_model("retrofitted", attn_bias=True, attn_gate=True)
    with pytest.warns(UserWarning, match=r"fold_value_biases \(attn_gate scales what they add\)"):
        model.process_weights_()
    assert model.b_V.any()
