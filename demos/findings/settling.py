"""What does it take that the state of ``tl-loops-tiny`` settles? (2604.11791, 4.2; Parcae's rule)

    python demos/findings/settling.py [--quick]

The blocks of a pre-norm loop read the state through a norm, so that what they add is bounded. What
is left of the state itself goes through the matrix W_s of the injection, s ← W_s s + W_e e. So the
state should grow without bound where the spectral radius of W_s is above 1, at that rate, and stay
bounded where it is below 1. Is that so in the embedded models? And does ``tl-loops-tiny`` settle,
with its answers kept, if it is trained on while that radius is lowered to 0.9? The control is
trained on as long, without the rule.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from exits import asked
from finding import bootstrap
from finding import main as run_finding
from torch import Tensor
from torch.nn.functional import cross_entropy
from trajectories import prompts as prompts_of

from tl_loops import LoopedTransformer
from tl_loops.metrics import successive_difference
from tl_loops.plots import plot_curves
from tl_loops.tasks import Prompt, fact_chain_prompts
from tl_loops.training import exit_logits, training_pass

RADIUS = 0.9
BATCH = 32
LEARNING_RATE = 1e-3
N_ITERATIONS = 128
EXITS = (1, 6, 8, 16, 32, 64, 128)
N_GRADIENT = 8


def state_matrix(model: LoopedTransformer) -> Tensor:
    """The part of the injection that reads the state, [d_model, d_model]; a view of the weight."""
    return dict(model.physical_named_parameters())["injection.W"][: model.cfg.d_model]


@torch.no_grad()
def radius(model: LoopedTransformer) -> float:
    """Its spectral radius."""
    return float(torch.linalg.eigvals(state_matrix(model).double()).abs().max())


def targets(model: LoopedTransformer, prompts: list[Prompt], iterations: range) -> Tensor:
    """The person after min(t, k) hops, [iteration, prompt]; iterations are counted from 0."""
    names = [[prompt.hops[min(t, prompt.n_hops - 1)] for prompt in prompts] for t in iterations]
    return torch.tensor([[model.to_single_token(name) for name in row] for row in names])


def train(model: LoopedTransformer, n_steps: int, cap: float | None, seed: int) -> None:
    """Train on with every exit, and lower the radius of the injection to ``cap`` on the way.

    Every other step runs 9 to 32 iterations, of which the last 8 have gradients.
    """
    rng, first = random.Random(seed), radius(model)
    torch.manual_seed(seed)
    model.cfg.state_seed = None  # a new initial state at every step
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    for step in range(n_steps):
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 20, (n_steps - step) / n_steps * 3)
        prompts = fact_chain_prompts(BATCH, seed=rng.getrandbits(64), split="train")
        tokens, _ = asked(model, prompts)
        n = rng.randint(N_GRADIENT + 1, 4 * N_GRADIENT) if step % 2 else N_GRADIENT
        with model.iterations(n):
            run = training_pass(model, tokens, n, N_GRADIENT)
            logits = torch.stack([each[:, -1] for each in exit_logits(model, tokens, run)])
        right = targets(model, prompts, range(run.first, n))
        loss = cross_entropy(logits.flatten(0, 1), right.flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if cap is not None:
            share = min(1.0, (step + 1) / (0.6 * n_steps))
            allowed = first + share * (cap - first)
            with torch.no_grad():
                state_matrix(model).mul_(min(1.0, allowed / radius(model)))
    model.cfg.state_seed = 0


@torch.no_grad()
def path(model: LoopedTransformer, tokens: Tensor, n: int) -> dict[str, Tensor]:
    """Growth and relative step of the state into each iteration but the first, [prompt, step]."""
    with model.iterations(n):
        states = torch.stack(training_pass(model, tokens, n).states)
    norm = states.norm(dim=-1)
    step = successive_difference(states, relative=True)  # a mean over positions
    return {"growth": (norm[1:] / norm[:-1]).mean(-1).T, "relative_step": step.T}


@torch.no_grad()
def measured(model: LoopedTransformer, prompts: list[Prompt], n: int, seed: int) -> dict[str, Any]:
    """Radius, path of the state, and accuracy by exit."""
    tokens, answers = asked(model, prompts)
    exits = [t for t in EXITS if t <= n]
    right = []
    for t in exits:
        with model.iterations(t):
            logits = torch.cat([model(part)[:, -1] for part in tokens.split(100)])
            right.append((logits.argmax(-1) == answers).double())
    found = path(model, tokens[:32], n)
    return {
        "radius_of_the_injection": radius(model),
        "exits": exits,
        "accuracy": bootstrap(torch.stack(right, 1), seed=seed),
        **{key: bootstrap(value, seed=seed) for key, value in found.items()},
    }


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """The embedded models, and tl-loops-tiny trained on with and without the rule."""
    n_steps, n_prompts, n = (1, 6, 8) if quick else (400, 300, N_ITERATIONS)
    prompts = fact_chain_prompts(n_prompts, seed=seed + 1)
    embedded = LoopedTransformer.from_pretrained_no_processing
    found = {"tl-loops-tiny": measured(embedded("tl-loops-tiny"), prompts, n, seed)}
    for name, cap in (
        (f"trained on, radius at most {RADIUS}", RADIUS),
        ("trained on, without the rule", None),
    ):
        model = embedded("tl-loops-tiny")
        train(model, n_steps, cap, seed)
        found[name] = measured(model, prompts, n, seed)
    text = embedded("tl-loops-text")
    verses = prompts_of("tl-loops-text", 2 if quick else 16, seed)
    each = [path(text, text.to_tokens(verse), n) for verse in verses]
    found["tl-loops-text"] = {
        "radius_of_the_injection": radius(text),
        **{
            key: bootstrap(torch.cat([one[key] for one in each]), seed=seed)
            for key in ("growth", "relative_step")
        },
    }
    return {"n_steps": n_steps, "n_prompts": n_prompts, "n_iterations": n, "models": found}


def draw(results: dict[str, Any]) -> Any:
    """Relative step of the state against the iteration."""
    curves = {}
    for name, of in results["models"].items():
        steps = [math.nan if step is None else step for step in of["relative_step"]["mean"]]
        curves[f"{name} ({of['radius_of_the_injection']:.2f})"] = torch.tensor(steps)
    return plot_curves(
        curves,
        "Relative step of the state (in brackets: spectral radius of the injection)",
        x=[float(t) for t in range(2, results["n_iterations"] + 1)],
        x_label="iteration",
        y_label="relative step, mean over prompts and positions",
        log=True,
        backend="matplotlib",
    )


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    return run_finding("settling", __doc__.splitlines()[0], measure, draw, given)


if __name__ == "__main__":
    main()
