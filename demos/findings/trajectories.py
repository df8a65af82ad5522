"""How often do states orbit or slide, and how far is that a matter of thresholds? (2604.11791, C)

    python demos/findings/trajectories.py [--quick]

Every token of some prompts is followed for 128 iterations. Its path is labelled by the paper's rule
(as reconstructed: the body of Algorithm 1 is not in the text) for several tau and rho, and by a
criterion that needs no threshold on directions: the lag after which the curve of mean distance
against lag falls again (recurrence lag).
"""

from collections.abc import Sequence
from typing import Any

import torch
from finding import bootstrap, rounded
from finding import main as run_finding
from torch import Tensor

from tl_loops import LoopedTransformer
from tl_loops.metrics import (
    TRAJECTORY_LABELS,
    classify_trajectory,
    recurrence_curve,
    recurrence_lag,
)
from tl_loops.plots import plot_curves
from tl_loops.tasks import fact_chain_prompts
from tl_loops.tasks.prompts import VERSES
from tl_loops.training import training_pass

TAUS = (0.01, 0.05, 0.1)
RHOS = (0.5, 0.8, 0.9, 0.95)
N_ITERATIONS = 128
MODELS = ("tl-loops-text", "tl-loops-tiny")


def prompts(name: str, n: int, seed: int) -> list[str]:
    """Prompts of the task that a model knows."""
    if name == "tl-loops-text":
        return list(VERSES[:n])
    return [prompt.text for prompt in fact_chain_prompts(n, seed=seed)]


def paths(name: str, n_prompts: int, n_iterations: int, seed: int) -> list[Tensor]:
    """The state after each iteration, one [iteration, pos, d_model] per prompt."""
    model = LoopedTransformer.from_pretrained_no_processing(name)
    found = []
    with torch.no_grad(), model.iterations(n_iterations):
        for prompt in prompts(name, n_prompts, seed):
            run = training_pass(model, model.to_tokens(prompt), n_iterations)
            found.append(torch.stack(run.states)[:, 0])
    return found


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """Shares of the labels per prompt, for each threshold, with intervals over prompts."""
    names = ("tl-loops-tiny",) if quick else MODELS
    n_prompts, n_iterations = (2, 32) if quick else (16, N_ITERATIONS)
    models = {}
    for name in names:
        every = paths(name, n_prompts, n_iterations, seed)
        grid = []
        for tau in TAUS:
            for rho in RHOS:
                shares = torch.tensor(
                    [
                        [of.fraction(label) for label in TRAJECTORY_LABELS]
                        for of in (classify_trajectory(path, tau=tau, rho=rho) for path in every)
                    ]
                )
                found = bootstrap(shares, seed=seed)
                grid.append(
                    {
                        "tau": tau,
                        "rho": rho,
                        "share": {
                            label: {key: value[i] for key, value in found.items()}
                            for i, label in enumerate(TRAJECTORY_LABELS)
                        },
                    }
                )
        late = [path[len(path) // 4 :] for path in every]
        lags = [recurrence_lag(recurrence_curve(path)) for path in late]
        back = torch.tensor([float(lag.isfinite().float().mean()) for lag in lags])
        direction = [path / path.norm(dim=-1, keepdim=True) for path in late]
        turned = [recurrence_lag(recurrence_curve(path)) for path in direction]
        turning = torch.tensor([float(lag.isfinite().float().mean()) for lag in turned])
        models[name] = rounded(
            {
                "n_tokens": sum(path.shape[1] for path in every),
                "n_prompts": len(every),
                "grid": grid,
                "share_that_recurs": bootstrap(back, seed=seed),
                "share_whose_direction_recurs": bootstrap(turning, seed=seed),
                "lags": sorted({float(x) for lag in lags for x in lag if x == x}),
                "late_relative_step": bootstrap(
                    torch.stack(
                        [((p[-1] - p[-2]).norm(dim=-1) / p[-1].norm(dim=-1)).mean() for p in every]
                    ),
                    seed=seed,
                ),
            }
        )
    return {"n_iterations": n_iterations, "models": models}


def draw(results: dict[str, Any]) -> Any:
    """Share of tokens that are no fixed point, against rho, for each tau."""
    curves, bands = {}, {}
    for name, of in results["models"].items():
        for tau in TAUS:
            rows = [row for row in of["grid"] if row["tau"] == tau]
            share = [row["share"]["fixed_point"] for row in rows]
            curves[f"{name}, tau {tau}"] = torch.tensor([s["mean"] for s in share])
            bands[f"{name}, tau {tau}"] = torch.tensor([(s["high"] - s["low"]) / 2 for s in share])
    return plot_curves(
        curves,
        "Share of tokens that the paper's rule calls fixed points",
        x=list(RHOS),
        x_label="rho, the share of iterations that must be near the end",
        y_label="share of tokens",
        std=bands,
        backend="matplotlib",
    )


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    return run_finding("trajectories", __doc__.splitlines()[0], measure, draw, given)


if __name__ == "__main__":
    main()
