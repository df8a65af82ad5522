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
# # Stages of inference
#
# Feedforward models go through stages: early layers gather context, middle layers compute, late
# layers write the prediction. Does a looped block repeat these stages in every iteration (arXiv
# 2604.11791)? The test: align the depth profile of one iteration with that of a feedforward
# model, and compare with chance.
#
# This notebook needs nothing from the network: the feedforward model is one with random weights.
# With weights at hand, put `HookedTransformer.from_pretrained("meta-llama/Llama-3.2-1B")` and its
# retrofitted looped sibling in the place of the two models; all other cells stay.

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
from tl_loops import LoopedTransformer, LoopedTransformerConfig, metrics, plots, tasks

torch.set_grad_enabled(False)
looped = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny")
feedforward = LoopedTransformer(
    LoopedTransformerConfig(
        model_name="feedforward, random weights",
        n_prelude=3,
        n_core=6,
        n_coda=3,
        n_iterations=1,  # a loop that runs once is a feedforward model
        d_model=64,
        d_head=16,
        n_heads=4,
        d_mlp=256,
        d_vocab=looped.cfg.d_vocab,
        n_ctx=64,
        initializer_range=0.1,
        seed=0,
    )
)
feedforward.set_tokenizer(looped.tokenizer)
print(looped.cfg.notation, "against", feedforward.cfg.notation)

# %% [markdown]
# ## Profiles
#
# `measure` takes any model with hooks. Each prompt is measured at its own length.

# %%
prompts = [prompt.text for prompt in tasks.fact_chain_prompts(32, seed=3)]
names = ("sink_rate", "mixing_score", "colsum_concentration", "residual_entropy", "residual_norm")
profile = tl_loops.measure(looped, prompts, names, progress=False)
reference = tl_loops.measure(feedforward, prompts, names, progress=False)
profile.to_frame().pivot_table(index="metric", columns="iteration", values="mean").round(3)

# %% [markdown]
# The same numbers in the three groupings of the paper: along the unrolled depth, one curve an
# iteration over the relative depth of a pass, and one curve per layer over the iterations.

# %%
plots.plot_profile(profile, "colsum_concentration", by="unrolled", backend="matplotlib")

# %%
plots.plot_profile(profile, "colsum_concentration", by="iteration", backend="matplotlib")

# %%
plots.plot_profile(profile, "colsum_concentration", by="layer", backend="matplotlib")

# %% [markdown]
# ## Alignment with the feedforward model
#
# `align_stages` stretches the depth axis of the feedforward model to that of an iteration and
# says how alike they are. The null permutes the depth of the reference: an alignment that a
# random order reaches as well means nothing.

# %%
print("metric               correlation by iteration, and its p value against random orders")
for name in names[1:4]:
    curves = profile.by_iteration(name, outer=True)  # [iteration, prelude + core + coda]
    alignment = metrics.align_stages(curves, reference.mean(name), n_permutations=200, seed=0)
    for label, values in (("r", alignment.pearson), ("p", alignment.null.pearson_p)):
        print(f"{name:20s} {label}", *(f"{value:5.2f}" for value in values))

# %%
plots.plot_stages(profile, reference, "mixing_score", backend="matplotlib")

# %% [markdown]
# With four blocks a pass and a reference without training, no p value is small: the embedded
# model shows how the comparison is made, not that there are stages. What it does show is that its
# iterations are alike: each correlates with the one before.

# %%
curves = profile.by_iteration("mixing_score", outer=True)
alignment = metrics.align_stages(curves, reference.mean("mixing_score"))
print("correlation with the iteration before:", *(f"{r:.3f}" for r in alignment.stability[1:]))
