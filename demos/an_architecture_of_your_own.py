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
# # An architecture of your own
#
# A looped model is data: a `LoopedTransformerConfig` says how large the phases are, what is
# injected, where norms stand, and whether the loop halts by itself. In this notebook we write
# down a model that nobody has released, train it for half a minute, and study it with the same
# tools as any other. Then we loop a feedforward model over its own weights.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("tl_loops") is None:  # as in Colab
    install = [sys.executable, "-m", "pip", "install", "--quiet", "tl-loops[plots]"]
    subprocess.run(install, check=True)

# %%
import torch
import torch.nn.functional as F

import tl_loops
from tl_loops import LoopedTransformer, LoopedTransformerConfig, metrics, plots
from tl_loops.loop_losses import act_ponder_cost

N_DIGITS, LENGTH = 10, 12

cfg = LoopedTransformerConfig(
    model_name="largest-so-far",
    n_core=1,
    n_iterations=4,
    injection="add",
    initial_state="zeros",
    exit_gate=True,
    halting="act",
    d_model=32,
    d_head=8,
    n_heads=4,
    d_mlp=64,
    d_vocab=N_DIGITS,
    n_ctx=2 * LENGTH,
    seed=0,
    device="cpu",
)
model = LoopedTransformer(cfg)
print(cfg.describe())

# %% [markdown]
# One layer, run at most four times. With `halting="act"` each position decides how many passes it
# needs (adaptive computation time, arXiv 1603.08983): its output is the sum of the states,
# weighted by the halting probabilities.
#
# The task: at each position, the largest digit so far. The loss adds a small price for each pass.

# %%
generator = torch.Generator().manual_seed(0)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
gates = []


def keep_halting(value, hook):
    gates.append(value)


hooks = [(f"iter.{t}.hook_halting", keep_halting) for t in range(cfg.n_iterations)]
for step in range(301):
    tokens = torch.randint(0, N_DIGITS, (64, LENGTH), generator=generator)
    targets = tokens.cummax(-1).values
    gates.clear()
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    price = act_ponder_cost(torch.stack(gates)).mean()
    optimizer.zero_grad()
    (loss + 0.02 * price).backward()
    optimizer.step()
    if step % 100 == 0:
        right = (logits.argmax(-1) == targets).float().mean()
        print(f"step {step}: loss {loss:.2f}, right {right:.2f}, price {price:.2f} passes")
assert right > 0.9
_ = torch.set_grad_enabled(False)

# %% [markdown]
# ## Study it
#
# Names, cache, measurements and figures work as for any model. When does each position halt?

# %%
tokens = torch.randint(0, N_DIGITS, (256, LENGTH), generator=generator)
logits, cache = model.run_with_cache(tokens)
halting = cache.stack_activation("halting").squeeze(-1)  # [iteration, batch, pos], sums to 1
print("probability of halting after each pass:", *(f"{p:.2f}" for p in halting.mean((1, 2))))
passes = act_ponder_cost(halting.unsqueeze(-1)).flatten(1).mean(0)
print("passes by position:", *(f"{p:.1f}" for p in passes))

# %%
plots.plot_exits(halting, model=model, prompts=256, backend="matplotlib")

# %%
profile = tl_loops.measure(model, list(tokens), "all", progress=False)
frame = profile.to_frame().dropna(subset="mean")
frame.pivot(index="metric", columns="block", values="mean").round(2).head(12)

# %% [markdown]
# What does the model look at? In the first pass each position should attend to the largest
# digits.

# %%
pattern = cache["pattern", 0, 0].max(1).values[:, -1]  # [batch, source], the strongest head
for digit in range(N_DIGITS):
    at_digit = pattern[tokens == digit].mean()
    print(f"attention of the last position to a {digit}: {at_digit:.2f}")

# %% [markdown]
# Some tools have no meaning for a model that mixes its states, and say so:

# %%
try:
    cache.decompose_resid()
except tl_loops.LoopedSemanticsError as error:
    print(error)

# %% [markdown]
# ## Loop a feedforward model
#
# `tl_loops.loop` repeats blocks of a model that was never looped (Encode-Think-Decode, arXiv
# 2510.07358), over the same weights. Here a small model with random weights; in earnest,
# `LoopedTransformer.from_pretrained("gpt2")` or `TransformerBridge.boot_transformers("gpt2")`.

# %%
plain = tl_loops.LoopedTransformer(
    tl_loops.LoopedTransformerConfig(
        n_core=6, n_iterations=1, d_model=32, d_head=8, n_heads=4, d_mlp=128, n_ctx=32, d_vocab=50,
        seed=0, device="cpu",
    )
)  # fmt: skip
looped = tl_loops.loop(plain, start=2, stop=4, n_iterations=3)
print(looped.cfg.notation, looped.layout.labels())
assert looped.blocks[2].attn.W_Q is plain.blocks[2].attn.W_Q

tokens = torch.randint(0, 50, (2, 10), generator=generator)
with looped.iterations(1):
    assert torch.equal(looped(tokens), plain(tokens))  # once is the original, bit for bit

_, cache = looped.run_with_cache(tokens)
steps = metrics.successive_difference(cache.stack_activation("state_out"))
print("length of the steps between iterations:", *(f"{step:.2f}" for step in steps[:, 0]))
