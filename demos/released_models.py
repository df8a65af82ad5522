# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Huginn, Ouro and retrofitted Llama
#
# The same questions, asked of released models. The weights are large, so this notebook looks for
# them on this machine and skips a model that is not there: nothing is downloaded. To get one, run
# `huggingface-cli download NAME` before, or set its directory below.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("tl_loops") is None:  # as in Colab
    install = [sys.executable, "-m", "pip", "install", "--quiet", "tl-loops[plots]"]
    subprocess.run(install, check=True)

# %%
import torch

import tl_loops
from tl_loops import LoopedTransformer, lens, metrics, plots
from tl_loops.errors import CheckpointError, UnknownModelError

torch.set_grad_enabled(False)
MODELS = {
    "huginn-0125": 16,  # iterations
    "Ouro-1.4B": 4,
    "Recurrent-Llama-3.2-train-recurrence-32": 8,
}
PROMPTS = [
    "Hello! I've been well. I hope that you're doing well.",
    "The square root of 16 is",
]


def load(name, n_iterations):
    """The model in bfloat16, or None where its weights are not on this machine."""
    try:
        return LoopedTransformer.from_pretrained_no_processing(
            name, n_iterations=n_iterations, dtype="bfloat16", local_files_only=True
        )
    except (OSError, CheckpointError, UnknownModelError):
        print(f"{name}: not on this machine, skipped")
        return None


models = {name: model for name, n in MODELS.items() if (model := load(name, n)) is not None}
print("here:", ", ".join(models) or "none")

# %% [markdown]
# ## What they do in one iteration

# %%
for model in models.values():
    print(model.cfg.describe(), "\n")

# %% [markdown]
# ## Where the next token appears
#
# The coda lens (for Ouro, which has no coda, the exit that it was trained with) after each
# iteration.

# %%
for name, model in models.items():
    read = lens.coda_lens if model.cfg.n_coda else lens.exit_lens
    result = read(model, PROMPTS[1], positions="last")
    print(name, model.to_str_tokens(result.predictions[..., 0].flatten()))

# %% [markdown]
# ## Fixed points
#
# The length of each step over the length of the state (arXiv 2502.05171; arXiv 2604.11791, Fig.
# 3), and the classes of the trajectories of all tokens.

# %%
for name, model in models.items():
    _, cache = model.run_with_cache(PROMPTS[0], names_filter=lambda name: "hook_state_out" in name)
    states = cache.stack_activation("state_out")
    steps = metrics.successive_difference(states, relative=True)
    print(name, "relative steps:", *(f"{step:.3f}" for step in steps.flatten()))
    found = metrics.classify_trajectory(states)
    print({label: round(found.fraction(label), 2) for label in metrics.TRAJECTORY_LABELS})

# %% [markdown]
# ## Sinks and mixing, iteration by iteration

# %%
for model in models.values():
    profile = tl_loops.measure(model, PROMPTS, ("sink_rate", "mixing_score"), progress=False)
    display(plots.plot_profile(profile, "sink_rate", by="iteration", backend="matplotlib"))
    display(plots.plot_profile(profile, "mixing_score", by="layer", backend="matplotlib"))

# %% [markdown]
# ## When Ouro would stop
#
# Its halting gate gives a probability of leaving the loop after each iteration.

# %%
for model in models.values():
    if model.cfg.exit_gate:
        _, cache = model.run_with_cache(PROMPTS[0])
        gates = cache.stack_activation("exit_gate")
        display(
            plots.plot_exits(metrics.exit_distribution(gates), model=model, backend="matplotlib")
        )
