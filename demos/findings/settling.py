"""What does it take that the state of a pre-norm loop settles? (2604.11791, 4.2; Parcae's rule)

    python demos/findings/settling.py [--quick]

The blocks of a pre-norm loop read the state through a norm, so that what they add is bounded. What
is left of the state itself goes through the matrix W_s of the injection, s ← W_s s + W_e e. So the
state should grow without bound where the spectral radius of W_s is above 1, at that rate, and stay
bounded where it is below 1. Is that so in the embedded models, and in ``tl-loops-tiny`` with its
W_s made larger? ``tl-loops-tiny`` was trained to settle with a radius of 0.9: are its answers kept?
And where does the radius go if it is trained on without that rule?
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from fact_chains import FactChains, asked
from finding import bootstrap, merged
from finding import main as run_finding
from torch import Tensor
from trajectories import prompts as prompts_of

from tl_loops import LoopedTransformer
from tl_loops.metrics import successive_difference
from tl_loops.plots import plot_curves
from tl_loops.tasks import Prompt, fact_chain_prompts
from tl_loops.training import (
    ConstantIterations,
    MixedIterations,
    TrainingSettings,
    UniformIterations,
    state_radius,
    train,
    training_pass,
)

RADII = (0.5, 1.1, 1.33)
"""Of the injection of ``tl-loops-tiny``, scaled."""
N_ITERATIONS = 128
EXITS = (1, 6, 8, 16, 32, 64, 128)
N_GRADIENT = 8
EMBEDDED = ("tl-loops-tiny", "tl-loops-text")


def embedded(name: str) -> LoopedTransformer:
    return LoopedTransformer.from_pretrained_no_processing(name)


def scaled(radius: float) -> LoopedTransformer:
    """``tl-loops-tiny`` with another spectral radius of W_s, and nothing else changed."""
    model = embedded("tl-loops-tiny")
    weight = dict(model.physical_named_parameters())["injection.W"]
    with torch.no_grad():
        weight[: model.cfg.d_model] *= radius / state_radius(model)
    return model


def trained_on(n_steps: int, seed: int) -> LoopedTransformer:
    """``tl-loops-tiny`` trained on without the rule, at every exit, to 8 to 32 iterations."""
    model = embedded("tl-loops-tiny")
    model.cfg.state_seed = None  # a new initial state at every step
    settings = TrainingSettings(
        n_steps=n_steps,
        batch_size=32,
        iterations=MixedIterations(
            ConstantIterations(N_GRADIENT), UniformIterations(N_GRADIENT + 1, 4 * N_GRADIENT)
        ),
        n_gradient=N_GRADIENT,
        exit_loss="mean",
        warmup_steps=20,
        seed=seed,
    )
    train(model, FactChains(model, hop_by_hop=True), settings, progress=False)
    model.cfg.state_seed = 0
    return model


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
        "radius_of_the_injection": state_radius(model),
        "exits": exits,
        "accuracy": bootstrap(torch.stack(right, 1), seed=seed),
        **{key: bootstrap(value, seed=seed) for key, value in found.items()},
    }


def of_text(n_prompts: int, n: int, seed: int) -> dict[str, Any]:
    """Radius and path of ``tl-loops-text``."""
    text = embedded("tl-loops-text")
    verses = prompts_of("tl-loops-text", n_prompts, seed)
    each = [path(text, text.to_tokens(verse), n) for verse in verses]
    return {
        "radius_of_the_injection": state_radius(text),
        **{
            key: bootstrap(torch.cat([one[key] for one in each]), seed=seed)
            for key in ("growth", "relative_step")
        },
    }


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """The embedded models, tl-loops-tiny with other radii, and trained on without the rule."""
    n_steps, n_prompts, n, n_seeds = (1, 6, 8, 1) if quick else (400, 300, N_ITERATIONS, 3)
    prompts = fact_chain_prompts(n_prompts, seed=seed + 1)
    tiny, text = EMBEDDED
    found = {
        tiny: measured(embedded(tiny), prompts, n, seed),
        text: of_text(2 if quick else 16, n, seed),
    }
    for radius in RADII:
        found[f"{tiny}, W_s scaled to {radius}"] = measured(scaled(radius), prompts, n, seed)
    found[f"{tiny}, trained on without the rule"] = merged(
        [measured(trained_on(n_steps, s), prompts, n, s) for s in range(seed, seed + n_seeds)]
    )
    return {
        "n_steps": n_steps,
        "n_prompts": n_prompts,
        "n_seeds": n_seeds,
        "n_iterations": n,
        "embedded": EMBEDDED,
        "models": found,
    }


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
