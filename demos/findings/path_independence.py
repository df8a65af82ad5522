"""Does a loop forget its initial state, and is it worth running it from several? (2211.09961)

    python demos/findings/path_independence.py [--quick]

Both embedded models begin from a random state. From six of them, as long as in training and 50
times as long: how far apart are the states after each iteration? And as width instead of depth: is
the mean prediction of six runs of t iterations better than one run, and than one iteration more?
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from finding import bootstrap
from finding import main as run_finding
from subjects import EMBEDDED, Subject, embedded
from torch import Tensor

from tl_loops import LoopedTransformer
from tl_loops.metrics import path_independence
from tl_loops.plots import plot_curves
from tl_loops.training import exit_logits, training_pass

N_ITERATIONS = 16
SCALES = (1, 50)
"""Length of the initial state, in that of the training."""


@contextmanager
def begins_from(model: LoopedTransformer, seed: int, scale: float) -> Iterator[None]:
    """Let a model begin from another random state."""
    cfg = model.cfg
    before = cfg.state_seed, cfg.initial_state_std
    cfg.state_seed, cfg.initial_state_std = seed, scale * cfg.initial_state_std
    try:
        yield
    finally:
        cfg.state_seed, cfg.initial_state_std = before


def of_prompt(subject: Subject, i: int, seeds: Sequence[int], scale: float, n: int) -> Tensor:
    """Curves over iterations, [curve, iteration].

    Relative distance and cosine between states of two seeds, mean loss of one run, and loss of the
    mean prediction of all.
    """
    model, tokens = subject.model, subject.prompts[i]
    states, logits = [], []
    for seed in seeds:
        with begins_from(model, seed, scale):
            run = training_pass(model, tokens, n)
            logits.append(torch.stack(exit_logits(model, tokens, run)))
        states.append(torch.stack(run.states)[:, 0])
    apart = path_independence(torch.stack(states))
    each = torch.stack(logits).float().log_softmax(-1)  # [seed, iteration, 1, pos, d_vocab]
    together = each.logsumexp(0) - torch.tensor(float(len(seeds))).log()
    single = torch.stack([torch.stack([subject.loss(x, i) for x in run]) for run in each])
    return torch.stack(
        [
            apart.relative_distance.mean(-1),
            apart.cosine.mean(-1),
            single.mean(0),
            torch.stack([subject.loss(x, i) for x in together]),
        ]
    )


@torch.no_grad()
def of_model(subject: Subject, seeds: Sequence[int], n: int, seed: int) -> dict[str, Any]:
    """The curves for each length of the initial state, with intervals over prompts."""
    found = {}
    with subject.model.iterations(n):
        for scale in SCALES:
            curves = torch.stack(
                [of_prompt(subject, i, seeds, scale, n) for i in range(len(subject.prompts))]
            )
            distance, cosine, single, together = curves.unbind(1)
            found[scale] = {
                "relative_distance": bootstrap(distance, seed=seed),
                "cosine": bootstrap(cosine, seed=seed),
                "loss": bootstrap(single, seed=seed),
                "gain_of_width": bootstrap(single - together, seed=seed),
                "gain_of_one_iteration": bootstrap(single[:, :-1] - single[:, 1:], seed=seed),
            }
    return found


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """Both models; in a quick run the small one, two prompts, two seeds and four iterations."""
    names = EMBEDDED[1:] if quick else EMBEDDED
    n_prompts, n_seeds, n = (2, 2, 4) if quick else (12, 6, N_ITERATIONS)
    seeds = range(seed, seed + n_seeds)
    models = {name: of_model(embedded(name, n_prompts, seed), seeds, n, seed) for name in names}
    return {
        "n_prompts": n_prompts,
        "n_initial_states": n_seeds,
        "n_iterations": n,
        "models": models,
    }


def draw(results: dict[str, Any]) -> Any:
    """Relative distance between the states of two seeds against iterations."""
    curves, bands = {}, {}
    for name, of in results["models"].items():
        for scale, row in of.items():
            label = f"{name}, {scale} times the length"
            found = {key: torch.tensor(value) for key, value in row["relative_distance"].items()}
            curves[label] = found["mean"].clamp_min(1e-8)
            bands[label] = (found["high"] - found["low"]) / 2
    return plot_curves(
        curves,
        "States reached from two random initial states",
        x=list(range(1, results["n_iterations"] + 1)),
        x_label="number of iterations",
        y_label="distance over length",
        std=bands,
        log=True,
        backend="matplotlib",
    )


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    return run_finding("path_independence", __doc__.splitlines()[0], measure, draw, given)


if __name__ == "__main__":
    main()
