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
# # Lenses
#
# What does the model already know after iteration t? A lens turns an intermediate residual stream
# into a distribution over words. On a looped model there are several ways to do so, and they
# disagree, because what lies between the place and the unembedding differs: more iterations, a
# coda, norms.

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
from tl_loops import lens, plots, tasks

torch.set_grad_enabled(False)
model = tl_loops.LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny")
prompts = tasks.fact_chain_prompts(24, n_hops=4)
tokens = model.to_tokens([prompt.text for prompt in prompts])


def token_ids(people):
    return torch.tensor([model.to_single_token(person) for person in people])


hops = {f"hop {h + 1}": token_ids(prompt.hops[h] for prompt in prompts) for h in range(4)}
options = {"positions": "last", "track": hops}

# %% [markdown]
# ## Logit lens and coda lens
#
# The logit lens reads a stream with the final norm and the unembedding alone. The coda lens runs
# the coda on the state first, as if the loop had ended there; at the last iteration it *is* the
# model, exactly.

# %%
by_logit = lens.logit_lens(model, tokens, points="states", **options)
by_coda = lens.coda_lens(model, tokens, points="states", **options)
answers = hops["hop 4"]
for name, result in (("logit lens", by_logit), ("coda lens", by_coda)):
    right = (result.predictions[..., 0] == answers).float().mean(-1)
    print(
        f"{name:11s}", " ".join(f"{value:.2f}" for value in right), "share of answers by iteration"
    )
with_model = model(tokens)[:, -1].log_softmax(-1).gather(-1, answers[:, None])[:, 0]
lens_says = by_coda.tracked["hop 4"].probability[-1].flatten().log()
print(
    "coda lens against the model, largest difference:", float((lens_says - with_model).abs().max())
)

# %%
plots.plot_ranks(by_coda, model=model, backend="matplotlib")

# %% [markdown]
# Each person leads for one iteration, and the answer stays. Answers change until the chain ends,
# and then never again:

# %%
print("changes of the answer per prompt:", by_coda.answer_flips().flatten().tolist())
print("iteration from which it stands:  ", by_coda.saturation_iteration().flatten().tolist())

# %% [markdown]
# ## Tuned lens
#
# The tuned lens learns one affine map for each place, so that the logit lens of the mapped stream
# agrees with the model's output. It says how much of the *final* answer is linearly there.
# Training takes a few seconds.

# %%
held_in = [prompt.text for prompt in tasks.fact_chain_prompts(64, n_hops=4, seed=7, split="train")]
with torch.enable_grad():
    tuned = lens.train_tuned_lens(
        model, held_in, points="states", n_steps=60, batch_size=16, progress=False
    )
by_tuned = lens.read_lens(model, tokens, tuned, points="states", **options)
print(f"loss {tuned.losses[0].mean():.2f} -> {tuned.losses[-5:].mean():.2f} nats")
right = (by_tuned.predictions[..., 0] == answers).float().mean(-1)
print("tuned lens ", " ".join(f"{value:.2f}" for value in right))

# %% [markdown]
# ## Jacobian lens
#
# The Jacobian lens takes the average derivative of the last state by the state after iteration t,
# over all iterations between them, as the map. Nothing is trained; a place whose influence on the
# end is not linear is read badly, and that is a finding, too.

# %%
with torch.enable_grad():
    jacobian = lens.fit_jacobian_lens(model, held_in[:4], points="states", progress=False)
by_jacobian = lens.read_lens(model, tokens, jacobian, points="states", **options)
right = (by_jacobian.predictions[..., 0] == answers).float().mean(-1)
print("Jacobian lens", " ".join(f"{value:.2f}" for value in right))

# %% [markdown]
# ## Following intermediate answers
#
# `track_entities` asks where each person of the chain first tops the list, and from where on one
# leads another.

# %%
tracks = lens.track_entities(model, tokens, hops, lens=lens.CodaLens(), points="states")
for name in hops:
    first = tracks.first_point()[tracks.entities.index(name)]
    print(name, "first leads at", sorted(set(tracks.labels[int(i)] for i in first)))
