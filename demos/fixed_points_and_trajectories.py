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
# # Fixed points and trajectories
#
# As the loop goes on, where does the state go? It may settle at a fixed point, circle in an
# orbit, or keep sliding in one direction (arXiv 2604.11791, arXiv 2502.05171). This notebook
# measures which, for the embedded model and for three models with random weights, of which one
# settles.

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
model = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny")
prompts = [prompt.text for prompt in tasks.fact_chain_prompts(16, n_hops=4)]

# %% [markdown]
# ## Steps that get smaller, or do not
#
# The length of a step from one iteration to the next, absolute and relative to the state, at 128
# iterations. The model was trained at up to about a hundred.

# %%
profile = tl_loops.measure(
    model,
    prompts,
    (
        "successive_difference",
        "successive_difference_relative",
        "fixed_point_distance",
        "step_angles",
    ),
    n_iterations=128,
    progress=False,
)
plots.plot_fixed_points(profile, backend="matplotlib")

# %%
states = model.run_with_cache(prompts, n_iterations=128)[1].stack_activation("state_out")
print(tuple(states.shape), "[iteration, batch, pos, d_model]")
norms = states[:, :, -1].norm(dim=-1).mean(-1)
cosines = metrics.successive_cosine(states[:, :, -1:]).mean(-1)
for iteration in (1, 2, 4, 8, 16, 32, 64, 127):
    print(
        f"iteration {iteration:2d}: length {norms[iteration]:7.0f}, "
        f"cosine to the one before {cosines[iteration - 1]:.4f}"
    )

# %% [markdown]
# The state of the last token comes to a fixed point, its direction first and its length later. The
# classification of arXiv 2604.11791 looks at cosines to the end of the path. Most tokens are fixed
# points to it. The last one takes the hops, and so turns away again before it comes to rest: in
# half of the prompts its path fits no label.

# %%
every, last = (metrics.classify_trajectory(x) for x in (states, states[:, :, -1]))
for label in metrics.TRAJECTORY_LABELS:
    print(f"{label:12s} {every.fraction(label):.2f} of all, {last.fraction(label):.2f} of the last")

# %% [markdown]
# ## The path
#
# Principal components of one token's path through all unrolled blocks, with the share of variance
# that a random walk of the same length would show: a random walk, too, looks like a smooth curve
# in its first two components.

# %%
_, cache = model.run_with_cache(prompts[0])
plots.plot_pca(cache, backend="matplotlib")

# %% [markdown]
# ## The map itself
#
# One iteration is a map of the state. The largest eigenvalues of its Jacobian say what happens
# near a point: below 1 in magnitude a small difference dies out, and a complex pair turns as it
# does so.


# %%
def spectral_radius(model, cache):
    """Of one iteration, at the state that leaves the last one."""
    state = cache[f"iter.{model.cfg.n_iterations - 1}.hook_state_out"][:1]
    injection = cache["hook_injection"][:1]
    behind = model.cfg.n_prelude + model.cfg.n_core

    def one_iteration(state):
        return model(
            state, start_at_iteration=0, stop_at_layer=behind, injection=injection, n_iterations=1
        )

    return metrics.loop_spectrum(one_iteration, state, tolerance=1e-2).spectral_radius


with model.iterations(128):
    _, late = model.run_with_cache(prompts[0])
    radius_late = spectral_radius(model, late)
radius = spectral_radius(model, cache)
print(f"spectral radius {radius:.3f} after 8 iterations, {radius_late:.3f} after 128")
assert radius_late < 1
growth = (norms[127] / norms[63]) ** (1 / 64)
print(f"growth of the length {growth:.4f} per iteration")

# %% [markdown]
# After eight iterations it is about 1: small differences neither grow nor die out there. At the
# fixed point itself it is below 1: what is left of the way shrinks by that factor per iteration.
#
# ## Models that settle, and models that do not
#
# Three models with random weights. The first norms the stream after each branch, as Huginn does;
# the second adds up, as Llama does; the third is the first with weights ten times as large. No
# training is involved, so this shows the tools and not what trained models do.


# %%
def random_model(name, **architecture):
    sizes = {"d_model": 64, "d_head": 16, "n_heads": 4, "d_mlp": 128, "d_vocab": 100, "n_ctx": 64}
    loop = {"n_prelude": 1, "n_core": 2, "n_coda": 1, "n_iterations": 48, "injection": "add"}
    random = {"initial_state": "normal", "initializer_range": 0.02, "seed": 0}
    cfg = LoopedTransformerConfig(model_name=name, **{**sizes, **loop, **random, **architecture})
    return LoopedTransformer(cfg).eval()


random_models = [
    random_model("normed", block_norm="post_residual"),
    random_model("adding", block_norm="pre"),
    random_model("normed, large weights", block_norm="post_residual", initializer_range=0.2),
]
tokens = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(0))
for random in random_models:
    _, run = random.run_with_cache(tokens)
    path = run.stack_activation("state_out")
    found = metrics.classify_trajectory(path)
    shares = {label: round(found.fraction(label), 2) for label in metrics.TRAJECTORY_LABELS}
    step = metrics.successive_difference(path)[-1].mean() / path[-1].norm(dim=-1).mean()
    radius = spectral_radius(random, run)
    print(
        f"{random.cfg.model_name:22s} last relative step {step:.0e}, spectral radius {radius:.2f}"
    )
    print(" " * 22, shares)

# %%
plots.plot_trajectories(
    random_models[2].run_with_cache(tokens)[1].stack_activation("state_out"),
    model=random_models[2],
    backend="matplotlib",
)

# %% [markdown]
# The first contracts: its steps vanish and its spectral radius is below 1. The second has a
# spectral radius of 1, since what was added stays: it slides. The third neither settles nor
# slides.
#
# ## Does the start matter?
#
# From different initial states, a path-independent model ends at the same place. The embedded
# model was trained from random initial states:

# %%
ends = []
for seed in range(4):
    noise = torch.randn(
        1, cache["hook_embed"].shape[1], 64, generator=torch.Generator().manual_seed(seed)
    )
    _, run = model.run_with_cache(prompts[0], initial_state=0.02 * noise)
    ends.append(run["iter.7.hook_state_out"])
independence = metrics.path_independence(torch.stack(ends))
for name, values in vars(independence).items():
    print(f"{name:18s} last token {values.flatten()[-1]:.4f}, mean {values.mean():.4f}")
