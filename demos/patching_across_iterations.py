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
# # Which iteration takes which step?
#
# The embedded model `tl-loops-tiny` reads facts and a question, such as *"... 4 hops from Sue
# :"*, and answers with the person at the end of a chain of four facts. It runs two layers eight
# times. Does each pass take one step of the chain? In this notebook a lens suggests an answer,
# patching locates each step in an iteration, a layer and a position, and interventions put the
# finding to the test: if it is right, we can predict what the model will say after we change its
# state in the middle of the loop.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("tl_loops") is None:  # as in Colab
    install = [sys.executable, "-m", "pip", "install", "--quiet", "tl-loops[plots]"]
    subprocess.run(install, check=True)

# %%
import matplotlib.pyplot as plt
import torch

import tl_loops
from tl_loops import lens, loop_hooks, patching, plots, tasks

torch.set_grad_enabled(False)
model = tl_loops.LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny")
print(model.cfg.describe())

# %%
prompts = tasks.fact_chain_prompts(24, n_hops=4)
tokens = model.to_tokens([prompt.text for prompt in prompts])
rows = torch.arange(len(prompts))


def token_ids(people):
    return torch.tensor([model.to_single_token(person) for person in people])


answers = token_ids(prompt.answer for prompt in prompts)
accuracy = (model(tokens)[:, -1].argmax(-1) == answers).float().mean()
print(prompts[0].text)
print("chain:", " -> ".join([prompts[0].start, *prompts[0].hops]), f"; accuracy {accuracy:.2f}")

# %% [markdown]
# ## By lens: one hop per iteration
#
# The coda lens decodes the state that leaves an iteration with the model's own last layers. We
# look at the last token and count how often the best word is the person after 1, 2, 3 and 4 hops.

# %%
result = lens.coda_lens(model, tokens, positions="last")
after_hop = torch.stack([token_ids(prompt.hops[hop] for prompt in prompts) for hop in range(4)])
predictions = result.predictions[..., 0]  # [iteration, prompt]
share = (predictions[:, None] == after_hop).float().mean(-1)  # [iteration, hop]
for iteration, row in enumerate(share):
    print(
        f"iteration {iteration}:", *(f"hop {hop + 1} {value:.2f}" for hop, value in enumerate(row))
    )
assert torch.equal(share[:4], torch.eye(4)) and (share[4:, 3] == 1).all()

# %% [markdown]
# The person moves one hop per iteration and then stays. But a lens only says what *can* be read
# from a state, not what the model uses. So we patch.
#
# ## By patching: where each hop happens
#
# One pair of prompts first, which differ in the third fact of the chain: the state that enters
# each iteration, position by position.

# %%
clean_prompt, corrupted_prompt = tasks.sample_pair()
pair = model.to_tokens([clean_prompt.text, corrupted_prompt.text])
clean_logits, pair_cache = model.run_with_cache(pair[:1])
good, bad = token_ids([clean_prompt.answer, corrupted_prompt.answer])


def difference(logits):
    return logits[0, -1, good] - logits[0, -1, bad]


grid = patching.activation_patch(
    model, pair[1:], pair_cache, difference, "state_in", ("iteration", "pos"), progress=False
)
base = difference(model(pair[1:]))
plots.plot_patching(
    (grid - base) / (difference(clean_logits) - base),
    ("iteration", "pos"),
    model=model,
    tokens=pair[1:],
    prompts="sample pair",
    unit="clean answer restored",
    limits=(-1, 1),
    title="Clean state that enters an iteration, one position at a time",
    backend="matplotlib",
)

# %% [markdown]
# Blue appears at the changed fact, and from some iteration on at the last token. Now many
# prompts, and every hop.
#
# For each hop we make a corrupted prompt, in which the fact of this hop names somebody else.
# Then, one place at a time, we put the clean run's activation into the corrupted run, and ask how
# much of the clean answer comes back: 0 is nothing, 1 is all of it. We do this twice: at the full
# stop after the fact, and at the last token, where the answer appears.

# %%
last, at_fact = [], []
for hop in range(1, 5):
    pairs = []
    for prompt in prompts:
        try:
            pairs.append((prompt, tasks.corrupt(prompt, hop)))
        except ValueError:  # No single change of this fact gives another answer.
            continue
    clean, corrupted = zip(*pairs, strict=True)
    row = torch.arange(len(pairs))
    right, wrong = token_ids(p.answer for p in clean), token_ids(p.answer for p in corrupted)
    _, cache = model.run_with_cache(model.to_tokens([p.text for p in clean]))
    corrupted_tokens = model.to_tokens([p.text for p in corrupted])

    def metric(logits, row=row, right=right, wrong=wrong):
        return (logits[row, -1, right] - logits[row, -1, wrong]).mean()

    low, high = (
        metric(model(corrupted_tokens)),
        metric(model(model.to_tokens([p.text for p in clean]))),
    )

    effect = patching.activation_patch(
        model, corrupted_tokens, cache, metric, "resid_pre", ("iteration", "layer"), progress=False,
        where={"pos": -1},
    )  # fmt: skip
    last.append((effect - low) / (high - low))

    # The facts stand at another place in every prompt, so these cells are hooks of our own.
    full_stop = torch.tensor([p.hop_positions[hop - 1] + 2 for p in clean])
    effect = torch.zeros(model.cfg.n_iterations, model.cfg.n_core)
    for iteration in range(model.cfg.n_iterations):
        for layer in range(model.cfg.n_core):

            def put_clean(resid, hook, row=row, full_stop=full_stop, cache=cache):
                resid = resid.clone()
                resid[row, full_stop] = cache[hook.name][row, full_stop]
                return resid

            name = loop_hooks.at(model, "resid_pre", iteration=iteration, layer=layer)
            logits = model.run_with_hooks(corrupted_tokens, fwd_hooks=[(name, put_clean)])
            effect[iteration, layer] = (metric(logits) - low) / (high - low)
    at_fact.append(effect)
last, at_fact = torch.stack(last), torch.stack(at_fact)  # [hop, iteration, layer]

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 2.4), sharey=True, layout="constrained")
places = {"full stop of the fact": at_fact, "last token": last}
for panel, (place, values) in zip(panels, places.items(), strict=True):
    image = panel.imshow(values.flatten(1), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    panel.set_title(f"resid_pre at the {place}, {len(prompts)} prompts", fontsize=9)
    panel.set_xticks(range(16), model.layout.labels()[1:17], rotation=90, fontsize=7)
    panel.set_xlabel("iteration.layer")
panels[0].set_yticks(range(4), [f"hop {hop}" for hop in range(1, 5)])
figure.colorbar(image, ax=panels, label="clean answer restored")
plt.show()

# %% [markdown]
# The two pictures meet. The full stop of the fact matters up to iteration h - 1 and not one layer
# longer; the last token carries the answer from then on. So the hop h is taken in iteration h -
# 1, by the attention of its layer 0 (for the first hop, one layer later: layer 0 tells the name
# in the question, layer 1 moves it to the last token).

# %%
for hop in range(4):
    block = 2 * hop
    carried = at_fact[hop].flatten()
    arrived = last[hop].flatten()
    assert carried[block] > 0.4 and carried[block + 1 :].abs().max() < 0.05
    moved = block + (2 if hop == 0 else 1)  # The first hop goes by way of the name.
    assert arrived[:moved].abs().max() < 0.05 and arrived[moved:].min() > 0.9
    print(
        f"hop {hop + 1}: read in iteration {hop}, layer 0; the last token has it from block {moved}"
    )

# %% [markdown]
# Which is what the attention pattern of layer 0 shows. From the last token, to the full stop of
# each hop's fact, the strongest head:

# %%
_, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
full_stops = torch.tensor(
    [[position + 2 for position in prompt.hop_positions] for prompt in prompts]
)
for iteration in range(5):
    pattern = cache["pattern", iteration, 0][:, :, -1]  # [prompt, head, source]
    received = pattern[rows[:, None], :, full_stops].mean(0).max(-1).values
    print(
        f"iteration {iteration}:",
        *(f"hop {hop + 1} {value:.2f}" for hop, value in enumerate(received)),
    )

# %% [markdown]
# ## By intervening: predict what the model will say
#
# **Cut one edge in one iteration.** If hop h is read in iteration h - 1 alone, then forbidding
# the last token to look at that fact should destroy the answer in that iteration and do nothing
# in any other.

# %%
correct = torch.zeros(4, 6)
for hop in range(4):
    fact = full_stops[:, hop, None] + torch.arange(-3, 3)  # the fact's words and their neighbours
    for iteration in range(6):

        def cut(scores, hook, fact=fact):
            scores = scores.clone()
            scores[rows[:, None], :, -1, fact] = float("-inf")
            return scores

        names = loop_hooks.every_iteration(model, "attn_scores", iterations=iteration)
        logits = model.run_with_hooks(tokens, fwd_hooks=loop_hooks.hooks_at(names, cut))
        correct[hop, iteration] = (logits[:, -1].argmax(-1) == answers).float().mean()
    print(
        f"fact of hop {hop + 1} cut in iteration:",
        *(f"{i}: {c:.2f}" for i, c in enumerate(correct[hop])),
    )
for hop in range(1, 4):
    assert correct[hop, hop] < 0.5 and (correct[hop].sum() - correct[hop, hop]) > 4.9

# %% [markdown]
# **Change the person in the middle of the chain.** A donor prompt has the same facts and asks
# about another person. We take the donor's state at the last token after iteration a and put it
# into our run after iteration b. If the state says who has been reached and how many hops are
# left, the model must go on from the donor's person, as far as iterations are left.


# %%
def ask(prompt, start):
    """The same facts, the question from another person."""
    facts = prompt.text[: prompt.text.index(f"{prompt.n_hops} hops from")]
    hops = tasks.follow(prompt.facts, start, prompt.n_hops)
    return tasks.Prompt(facts + tasks.question(start, prompt.n_hops), start, hops, prompt.facts)


donors = [
    ask(prompt, next(who for who, _ in prompt.facts if who not in (prompt.start, *prompt.hops)))
    for prompt in prompts
]
_, donor_cache = model.run_with_cache(model.to_tokens([donor.text for donor in donors]))
hits = torch.zeros(4, 8)
for a in range(4):
    for b in range(8):

        def replace(state, hook, a=a):
            state = state.clone()
            state[:, -1] = donor_cache[f"iter.{a}.hook_state_out"][:, -1]
            return state

        logits = model.run_with_hooks(tokens, fwd_hooks=[(f"iter.{b}.hook_state_out", replace)])
        hops_done = min(4, a + 1 + (7 - b))
        predicted = token_ids(donor.hops[hops_done - 1] for donor in donors)
        hits[a, b] = (logits[:, -1].argmax(-1) == predicted).float().mean()
print("share of prompts that end at the predicted person, donor iteration by row, target by column")
print(hits)
assert hits.min() > 0.9

# %% [markdown]
# **Leave iterations out.** The iterations are the same weights; what differs is the state. So a
# run without iteration 1 should still do four hops in the seven that are left, and a run of three
# iterations should stop at the third person.

# %%
for name, schedule, hop in (
    ("without iteration 1", patching.skip_schedule(model, 1), 4),
    ("iteration 1 three times", patching.repeat_schedule(model, 1, 3), 4),
    ("three iterations", [0, 1, 2], 3),
    ("iterations 0 and 5", [0, 5], 2),
):
    said = patching.run_schedule(model, tokens, schedule)[:, -1].argmax(-1)
    share = (said == after_hop[hop - 1]).float().mean()
    print(f"{name}: {schedule} -> the person after hop {hop} in {share:.2f} of the prompts")
    assert share > 0.9

# %% [markdown]
# ## What we found
#
# Iteration t takes hop t + 1: its layer 0 reads the fact of the person whom the state names, and
# writes the next person into the last token. The state holds the person and how many hops are
# left; the number of the iteration itself plays no part. The lens suggested it, patching located
# it, and four interventions came out as predicted.
