"""Ctrl-C at chosen moments of every tool: the model is as before, and its numbers are right."""

import os
import random

import pytest
import torch

from tests.kills import N_MOMENTS, interrupted_at
from tests.models import tiny_model, tiny_tokens
from tests.unit.measurements.test_measure import prompts, quiet
from tl_loops import dynamics, steering, training
from tl_loops.attribution import attribution_patch, iteration_gradients
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


def last_logit(logits):
    return logits[:, -1, 0].float().mean()


def with_gradients(tool):
    def use(model):
        with torch.enable_grad():
            return tool(model)

    return use


def mapped(model):
    with torch.no_grad():
        step = dynamics.loop_map(model, TOKENS[0])
        return step(step.state)


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
    "logits_only_at": lambda model: (
        logit_lens(model, TOKENS, positions=[-1], keep_logits=True).logits
    ),
    "grid_of_read_positions": lambda model: ablate(
        model, TOKENS, loss, "mlp_out", axes=("iteration",), logits_at="last", progress=False
    ),
    "steering_effect": lambda model: steering.steering_effect(
        model,
        TOKENS,
        direction=torch.ones(32),
        metric=loss,
        axes=("iteration",),
        progress=False,
    ),
    "kernel_alignment": lambda model: dynamics.kernel_alignment(model, list(TOKENS)).matrix,
    "key_value_spectra": lambda model: dynamics.key_value_spectra(
        model, list(TOKENS)
    ).singular_values["k"]["core.0"],
    "loop_map": lambda model: dynamics.loop_map(model, TOKENS[0]).state,
    "map of an iteration": mapped,
    "iteration_gradients": with_gradients(
        lambda model: iteration_gradients(model, TOKENS, last_logit).norms()
    ),
    "training.iteration_gradients": lambda model: training.iteration_gradients(model, TOKENS),
    "training_pass": lambda model: training.training_pass(model, TOKENS, 3, 1).logits.detach(),
    "evaluate": lambda model: torch.tensor(
        list(training.evaluate(model, TOKENS.flatten(), 4, (1, 2)).values())
    ),
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


@pytest.mark.parametrize("lines", ["read_positions.py", "weight_uses.py"])
def test_an_interrupt_at_every_line_of_what_acts_on_a_module_itself(lines):
    """A hook before the unembedding is no hook of a hook point; nor is a stand-in for a weight."""
    tool = {"read_positions.py": "logits_only_at", "weight_uses.py": "iteration_gradients"}[lines]
    model, use, files = tiny_model("huginn"), TOOLS[tool], (os.sep + lines,)
    logits, weights = model(TOKENS).detach(), list(model.parameters())
    n_lines = interrupted_at(None, lambda: use(model), files=files)
    # Every line where there are few, and otherwise the first ones, the last ones and some between.
    chosen = {*range(16), *range(n_lines - 10, n_lines), *range(0, n_lines, 1 + n_lines // 8)}
    for moment in sorted(chosen & {*range(n_lines)}):
        assert interrupted_at(moment, lambda: use(model), files=files) is None
        assert not model.unembed._forward_pre_hooks and not model._forward_pre_hooks, moment
        assert all(x is y for x, y in zip(model.parameters(), weights, strict=True)), moment
        assert torch.equal(model(TOKENS), logits), moment
