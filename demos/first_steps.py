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
# # First steps
#
# A looped language model runs one block of layers several times. In TransformerLens a layer has a
# name; here every *pass* of every layer has one. This notebook loads the small model that comes
# with the package, finds its way around the names, and asks the usual questions of it.

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
from tl_loops import LoopedTransformer, plots, tasks

model = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny")
print(
    model.cfg.notation, f"{model.cfg.n_params:,} parameters, {model.cfg.n_layers} unrolled blocks"
)
print(model.cfg.describe())

# %% [markdown]
# `(1, 2⊗8, 1)_I` reads: one prelude layer, two core layers run eight times, one coda layer, and
# the prelude's output is injected into every iteration. The task of this model is to follow a
# chain of facts.

# %%
prompt = tasks.fact_chain_prompts(1, n_hops=3, seed=5)[0]
logits, cache = model.run_with_cache(prompt.text)
print(prompt.text)
print("model:", model.to_string(logits[0, -1].argmax()), "  expected:", prompt.answer)

# %% [markdown]
# ## One tensor, several names
#
# An unrolled block has TransformerLens's name, and a name by iteration and layer. Both lead to
# the same tensor.

# %%
layout = model.layout
block = layout.index(iteration=3, layer=0)
print("iteration 3, layer 0 is block", block, "=", layout.coordinate(block))
assert cache["pattern", block] is cache["iter.3.0.attn.hook_pattern"]
assert cache[layout.hook_name("pattern", iteration=3, layer=0)] is cache["pattern", 3, 0]
print(layout.labels())

# %% [markdown]
# Between iterations there are hook points that a feedforward model does not have: the state that
# enters and leaves an iteration, and what is injected.

# %%
for name in (
    "hook_initial_state",
    "hook_injection",
    "iter.3.hook_state_in",
    "iter.3.hook_injected",
    "iter.3.hook_state_out",
):
    print(f"{name:24s}", tuple(cache[name].shape))

# %% [markdown]
# Weights exist once. Iteration 0 and iteration 7 use the same parameters:

# %%
first, last = (
    model.blocks[layout.index(iteration=0, layer=0)],
    model.blocks[layout.index(iteration=7, layer=0)],
)
assert first is not last and first.attn.W_Q is last.attn.W_Q
print(model.W_Q.shape, "[physical layer, head, d_model, d_head]")

# %% [markdown]
# ## More or fewer iterations
#
# The number of iterations is an argument of a call, of a block of code, or of the model.

# %%
for n_iterations in (1, 2, 3, 4, 16):
    said = model(prompt.text, n_iterations=n_iterations)[0, -1].argmax()
    print(f"{n_iterations:2d} iterations: {model.to_string(said)}")
with model.iterations(2):
    print(model.cfg.notation, len(model.blocks), "blocks")
print("chain:", " -> ".join([prompt.start, *prompt.hops]))

# %% [markdown]
# The model takes one hop per iteration, and stays at the answer once it is there.
#
# ## Hooks
#
# A hook acts in one iteration alone. Here attention of layer 0 is switched off in one iteration
# at a time, for 64 questions of three hops; its heads are needed as long as hops are left.

# %%
questions = tasks.fact_chain_prompts(64, n_hops=3, seed=5)
tokens = model.to_tokens([question.text for question in questions])
answers = [model.to_single_token(question.answer) for question in questions]
for iteration in range(6):
    logits = model.run_with_hooks(
        tokens, fwd_hooks=[(f"iter.{iteration}.0.hook_attn_out", lambda out, hook: out * 0)]
    )
    right = (logits[:, -1].argmax(-1) == torch.tensor(answers)).float().mean()
    print(f"no attention in iteration {iteration}, layer 0: {right:.2f} of the answers are right")
    assert right < 0.3 if iteration < 3 else right == 1

# %% [markdown]
# ## Attention, iteration by iteration
#
# All patterns on one page: each row is a head, each column a block, iterations set apart.

# %%
plots.plot_floorplan(cache, backend="matplotlib")

# %% [markdown]
# Single heads are better looked at with circuitsvis: `plots.attention_patterns(cache,
# iterations=[0, 1, 2], layers=0)` shows them side by side, without asking the network for
# anything.
#
# ## Many prompts
#
# `measure` streams prompts through the model, reduces each activation as it appears, and keeps
# mean, standard deviation and count.

# %%
prompts = [p.text for p in tasks.fact_chain_prompts(32, seed=1)]
profile = tl_loops.measure(model, prompts, progress=False)
profile.to_frame().head()

# %%
profile.plot("mixing_score", by="iteration", backend="matplotlib")

# %% [markdown]
# From here: [patching across iterations](patching_across_iterations.ipynb),
# [lenses](lenses.ipynb), [fixed points and trajectories](fixed_points_and_trajectories.ipynb),
# [stages of inference](stages_of_inference.ipynb), [an architecture of your
# own](an_architecture_of_your_own.ipynb), [released models](released_models.ipynb).
