"""Train ``tl-loops-tiny`` on until its state settles, with its answers kept, and save it.

    python demos/train_tiny.py --out LEARNED
    python demos/settle_tiny.py LEARNED --out tl_loops/tiny

``train_tiny.py`` teaches the task, and leaves a state that grows by a third per iteration: the
spectral radius of the injection's part for the state is above 1. Here it is lowered to 0.9. What
fades has to be renewed by the blocks, so that answers must be held at every age:

1. *Carried*: twelve batches go on from step to step, four iterations with gradient at a time, at a
   learning rate of 1e-3, while the radius falls. The weights follow the few states at hand, and
   hold those better than others.
2. *Drawn*: each step runs fresh contexts without gradient, and goes on from four random ages, at
   2e-4. The mean of the weights over about the last hundred steps is saved.

One step in three is a fresh batch from the first iteration. Every exit is trained; a question whose
answer is already wrong has no loss, since nothing can bring it back.
"""

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from train_tiny import ID, N_ITERATIONS, TASK, Stage, accuracy_table, questions, write_tokenizer

from tl_loops import LoopedTransformer
from tl_loops.training import UNTRAINED, limit_state_radius, state_radius
from tl_loops.upstream import HookPoint

RADIUS = 0.9
WHOLE_TASK = Stage(TASK.n_people, N_ITERATIONS)
N_GRADIENT = 4
"""Iterations with gradient of states that are already old."""
N_CARRIED, N_FRESH, N_DRAWN = 12, 32, 12
"""Batches that are carried, contexts of a fresh batch, contexts of a drawn one."""
YOUNGEST, YOUNG = 8, 24
"""The least age in iterations, and the most at the start of a phase."""
AVERAGE = 0.01
"""Share of the newest weights in their running mean."""


@dataclass
class Held:
    """Contexts and the states that they are in after some iterations.

    Attributes:
        tokens: [batch, pos]
        targets: After each iteration, [iteration, batch, pos]; ``UNTRAINED`` but at questions.
        state: [batch, pos, d_model], without gradient; ``None``: before the first iteration.
        age: Iterations that made the state; of several ages the least.
    """

    tokens: Tensor
    targets: Tensor
    state: Tensor | None = None
    age: int = 0

    def target(self, t: int) -> Tensor:
        """After iteration t, counted from 0; the last one holds."""
        return self.targets[min(t, len(self.targets) - 1)]


def fresh(n: int, rng: random.Random) -> Held:
    """Contexts of the whole task."""
    return Held(*questions(n, WHOLE_TASK, rng))


def kept_states(model: LoopedTransformer, run: Sequence, ages: Sequence[int], **start) -> list:
    """States after some iterations of one run to the last of them."""
    kept: dict[int, Tensor] = {}

    def keep(state: Tensor, hook: HookPoint) -> None:
        kept[int(str(hook.name).split(".")[1])] = state

    hooks = [(f"iter.{age - 1}.hook_state_out", keep) for age in ages]
    stop = model.layout.index(iteration=ages[-1] - 1, layer=model.cfg.n_core - 1) + 1
    with model.hooks(fwd_hooks=hooks):
        model(*run, stop_at_layer=stop, **start)
    return [kept[age - 1] for age in ages]


def more_states(model: LoopedTransformer, held: Held, n: int) -> list[Tensor]:
    """The next n states, with gradient; the prelude runs afresh."""
    if held.state is None:
        return kept_states(model, (held.tokens,), range(1, n + 1))
    injection: list[Tensor] = []
    with model.hooks(fwd_hooks=[("hook_injection", lambda e, hook: injection.append(e))]):
        model(held.tokens, stop_at_layer=model.layout.n_prelude + 1)
    # All iterations have the same weights, so that it does not matter which of them go on.
    start = dict(start_at_iteration=1, injection=injection[0])
    return kept_states(model, (held.state,), range(2, n + 2), **start)


def readout(model: LoopedTransformer, states: Sequence[Tensor]) -> Tensor:
    """Logits of the exits, [iteration, batch, pos, d_vocab]."""
    logits = model(torch.cat(list(states)), start_at_layer=model.layout.coda_start)
    return logits.unflatten(0, (len(states), -1))


@torch.no_grad()
def still_right(model: LoopedTransformer, held: Held) -> Tensor:
    """Which questions the state answers rightly, [batch, pos]; before the first iteration all."""
    asked = held.tokens == ID[":"]
    if held.state is None:
        return asked
    answered = readout(model, [held.state])[0].argmax(-1)
    return asked & (answered == held.target(held.age - 1))


def exit_loss(logits: Tensor, held: Held, right: Tensor) -> Tensor:
    """Mean over the questions that are still right and the end; each place counts the same."""
    targets = torch.stack([held.target(held.age + t) for t in range(len(logits))])
    losses = cross_entropy(
        logits.flatten(0, 2), targets.flatten(), ignore_index=UNTRAINED, reduction="none"
    ).view_as(targets)
    n_questions = int((held.tokens[0] == ID[":"]).sum())
    people = (losses * right).sum() / (len(logits) * right.sum()).clamp_min(1)
    return (n_questions * people + losses[:, :, -1].mean()) / (n_questions + 1)


class Average:
    """A running mean of a model's weights."""

    def __init__(self, model: LoopedTransformer):
        self.weights = [weight.detach().clone() for weight in model.parameters()]

    @torch.no_grad()
    def add(self, model: LoopedTransformer) -> None:
        for mean, weight in zip(self.weights, model.parameters(), strict=True):
            mean.lerp_(weight, AVERAGE)

    @torch.no_grad()
    def put(self, model: LoopedTransformer) -> None:
        for mean, weight in zip(self.weights, model.parameters(), strict=True):
            weight.copy_(mean)


class Carried:
    """Batches that go on from step to step, to an age of 128 iterations."""

    def __init__(self) -> None:
        self.batches: list[Held] = []

    def take(self, model: LoopedTransformer, rng: random.Random, done: float) -> Held | None:
        """One of them; none before all are there."""
        if len(self.batches) < N_CARRIED:
            return None
        return self.batches.pop(rng.randrange(N_CARRIED))

    def give(self, held: Held, right: Tensor, rng: random.Random, done: float) -> None:
        """Carry a batch on, unless it is old, or mostly wrong, or by chance."""
        oldest = YOUNG + (128 - YOUNG) * min(1.0, max(0.0, (done - 0.3) / 0.4))
        asked = (held.tokens == ID[":"]).sum()
        leaves = held.age >= oldest or rng.random() < 0.06 or right.sum() < 0.6 * asked
        young = held.age <= N_ITERATIONS
        if len(self.batches) < N_CARRIED and (young or not leaves):
            self.batches.append(held)


class Drawn:
    """Fresh contexts after a run without gradient, at four random ages to 96 iterations."""

    def take(self, model: LoopedTransformer, rng: random.Random, done: float) -> Held:
        """The contexts, once for each age."""
        oldest = int(YOUNG + (96 - YOUNG) * min(1.0, done / 0.4))
        ages = sorted(rng.sample(range(YOUNGEST, oldest), 4))
        held = fresh(N_DRAWN, rng)
        with torch.no_grad(), model.iterations(ages[-1]):
            states = kept_states(model, (held.tokens,), ages)
        repeated = held.tokens.repeat(4, 1), held.targets[-1:].repeat(1, 4, 1)
        return Held(*repeated, torch.cat(states), ages[0])

    def give(self, held: Held, right: Tensor, rng: random.Random, done: float) -> None:
        """Nothing is carried on."""


def settle(
    model: LoopedTransformer, source: Carried | Drawn, n_steps: int, rate: float, flat: float
) -> None:
    """Train in place; ``flat`` is the share of the steps before the learning rate falls."""
    rng, began, first = random.Random(0), time.monotonic(), state_radius(model)
    torch.manual_seed(0)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": gains, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    average = Average(model)
    for step in range(n_steps):
        done = step / n_steps
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50, (1 - done) / (1 - flat))
        held = source.take(model, rng, done) if step % 3 else None
        held = held or fresh(N_FRESH, rng)
        right = still_right(model, held)
        states = more_states(model, held, N_GRADIENT if held.age else N_ITERATIONS)
        loss = exit_loss(readout(model, states), held, right)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        limit_state_radius(model, first + min(1.0, (step + 1) / (0.3 * n_steps)) * (RADIUS - first))
        average.add(model)
        held.state, held.age = states[-1].detach(), held.age + len(states)
        source.give(held, right, rng, done)
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - began
            print(f"step {step + 1} loss {float(loss.detach()):.4f} {seconds:.0f} s", flush=True)
    if isinstance(source, Drawn):
        average.put(model)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the state of tl-loops-tiny settle.")
    parser.add_argument("learned", type=Path, help="directory of the model to go on from")
    parser.add_argument("--out", type=Path, required=True, help="directory to save into")
    parser.add_argument("--stop-after", type=int, help="at most so many steps of each phase")
    parser.add_argument(
        "--n-evaluation", type=int, default=1000, help="prompts a hop count at the end"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = LoopedTransformer.from_pretrained_no_processing(str(options.learned))
    model.cfg.state_seed = None  # drawn afresh at every training step
    for source, n_steps, rate, flat in ((Carried(), 2000, 1e-3, 0.6), (Drawn(), 800, 2e-4, 0.3)):
        settle(model, source, min(n_steps, options.stop_after or n_steps), rate, flat)
    model.cfg.state_seed = 0
    options.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.out)
    write_tokenizer(options.out)
    print(accuracy_table(model, options.n_evaluation, 2 * N_ITERATIONS, 1000))


if __name__ == "__main__":
    main()
