"""Ctrl-C at chosen moments of every tool: the model is as before, and its numbers are right."""

import random

import pytest
import torch

from tests.kills import N_MOMENTS, interrupted_at
from tests.models import tiny_model, tiny_tokens
from tests.unit.measurements.test_measure import prompts, quiet
from tl_loops.attribution import attribution_patch
from tl_loops.lens import coda_lens, logit_lens
from tl_loops.lens.exit_curve import exit_curve
from tl_loops.patching import ablate, activation_patch

TOKENS = tiny_tokens(2, 6)


def loss(logits):
    return logits[:, -1, 0].mean()


def in_contexts(model):
    with model.iterations(3), model.hooks([("iter.1.0.hook_mlp_out", lambda x, hook: 0 * x)]):
        return model(TOKENS)


def patched(model):
    _, cache = model.run_with_cache(TOKENS)
    return activation_patch(model, TOKENS.flip(0), cache, loss, axes=("iteration",), progress=False)


def attributed(model):
    _, cache = model.run_with_cache(TOKENS)
    with torch.enable_grad():
        return attribution_patch(model, TOKENS.flip(0), cache, loss)


def measured(model):
    return quiet(model, prompts((4, 5)), "successive_difference", n_iterations=3).mean(
        "successive_difference"
    )


TOOLS = {
    "measure": measured,
    "call": lambda model: model(TOKENS, n_iterations=3),
    "with": in_contexts,
    "run_with_hooks": lambda model: model.run_with_hooks(
        TOKENS, n_iterations=3, fwd_hooks=[("iter.1.0.hook_mlp_out", lambda x, hook: 0 * x)]
    ),
    "run_with_cache": lambda model: model.run_with_cache(TOKENS)[1]["state_out", 1],
    "activation_patch": patched,
    "attribution_patch": attributed,
    "ablate": lambda model: ablate(
        model, TOKENS, loss, "mlp_out", axes=("iteration",), progress=False
    ),
    "exit_curve": lambda model: exit_curve(model, list(TOKENS), progress=False).loss,
    "logit_lens": lambda model: logit_lens(model, TOKENS, keep_logits=True).logits,
    "coda_lens": lambda model: coda_lens(model, TOKENS, keep_logits=True).logits,
    "generate": lambda model: model.generate(
        TOKENS, 2, verbose=False, do_sample=False, stop_at_eos=False
    ),
}


def condition(model):
    """All that a tool must leave as it was."""
    return {
        "hooks": [
            (name, [*point.fwd_hooks], [*point.bwd_hooks], [*point._forward_hooks])
            for name, point in model.hook_dict.items()
        ],
        "names": [point.name for point in model.hook_dict.values()],
        "iterations": (model.cfg.n_iterations, model.cfg.n_layers, len(model.blocks)),
        "level": (model.context_level, model.is_caching),
        "gradients": torch.is_grad_enabled(),
        "training": [module.training for module in model.modules()],
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "left": [parameter.grad is None for parameter in model.parameters()],
        "default": torch.get_default_dtype(),
    }


@pytest.mark.parametrize("tool", TOOLS)
def test_an_interrupt_leaves_everything_as_it_was(tool):
    model, draw, use = tiny_model("huginn"), random.Random(tool), TOOLS[tool]
    # A hook of the user's own, which acts in every run.
    model.add_hook("iter.0.0.hook_attn_out", lambda x, hook: 2 * x)
    # Whether the model is in a with statement of the user's is nobody's to see but the statement's.
    spared = ("__enter__", "__exit__") if tool == "with" else ()
    logits, numbers = model(TOKENS).detach(), use(model)
    n_moments = interrupted_at(None, lambda: use(model), spared)
    before = condition(model)
    n_tried = N_MOMENTS // 4  # of each tool: all tools run the same code
    for k in range(n_tried):
        moment = int((k + draw.random()) / n_tried * n_moments)
        assert interrupted_at(moment, lambda: use(model), spared) is None, moment
        after = condition(model)
        assert [key for key in before if after[key] != before[key]] == [], moment
    assert torch.equal(model(TOKENS), logits)
    assert torch.equal(use(model).nan_to_num(), numbers.nan_to_num())
