"""Stages of inference in a trained loop: do later iterations repeat the first? (2604.11791, 5.1)

    python demos/findings/stages.py [--quick]

ColSum concentration, sink rate, mixing score and residual entropy of every block of
``tl-loops-text`` at 4 and 8 iterations, with 1,000 bootstrap resamples over prompts. Whether each
iteration repeats the profile over layers of the one before is a correlation; its null permutes the
layers. What is measured of a random model of the same shape stands beside it.
"""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
from finding import bootstrap, random_like
from finding import main as run_finding
from torch import Tensor

from tl_loops import LoopedTransformer
from tl_loops.metrics import (
    colsum_concentration,
    mixing_score,
    residual_entropy,
    sink_rate,
)
from tl_loops.plots import plot_curves
from tl_loops.tasks.prompts import VERSES

METRICS = ("colsum_concentration", "sink_rate", "mixing_score", "residual_entropy")


def of_prompt(model: LoopedTransformer, prompt: str | Tensor) -> tuple[Tensor, Tensor]:
    """The metrics of every block, [metric, block], and the logits of the run."""
    logits, cache = model.run_with_cache(prompt)
    rows = []
    for block in range(model.cfg.n_layers):
        pattern, resid = cache["pattern", block][0], cache["resid_post", block][0]
        rows.append(
            torch.stack(
                [
                    colsum_concentration(pattern).mean(),
                    sink_rate(pattern).mean(),
                    mixing_score(pattern, normalize="row").mean(),
                    residual_entropy(resid, normalize="log_min"),
                ]
            )
        )
    return torch.stack(rows, dim=1), logits


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's over the last axis; NaN for a constant."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def repetition(core: Tensor) -> dict[str, Any]:
    """How alike the profiles over layers of successive iterations are, and under permuted layers.

    Args:
        core: [iteration, layer].
    """
    observed = correlation(core[1:], core[:-1]).mean()
    _, *orders = permutations(range(core.shape[1]))  # all but the one that was observed
    null = torch.stack([correlation(core[1:, list(o)], core[:-1]).mean() for o in orders])
    at_least = int((null >= observed - 1e-9).sum())
    p = (1 + at_least) / (1 + len(orders))
    return {"correlation": float(observed), "p": p if observed.isfinite() else float("nan")}


def profile(model: LoopedTransformer, texts: Sequence[str], n: int, seed: int) -> dict[str, Any]:
    """Intervals of every metric by block, and how far iterations repeat each other."""
    with torch.no_grad(), model.iterations(n):
        layout = model.layout
        found = torch.stack([of_prompt(model, text)[0] for text in texts])
    core = found[:, :, layout.core_start : layout.coda_start].unflatten(-1, (n, layout.n_core))
    return {
        metric: {
            "blocks": bootstrap(found[:, i], seed=seed),
            "repetition": repetition(core[:, i].mean(0)),
            "late_repetition": repetition(core[:, i, n // 2 :].mean(0)),
        }
        for i, metric in enumerate(METRICS)
    }


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """The trained model and a random one, at each number of iterations."""
    name = "tl-loops-tiny" if quick else "tl-loops-text"
    texts = ["Ann likes Bob . 1 hops from Ann :"] * 2 if quick else VERSES
    trained = LoopedTransformer.from_pretrained_no_processing(name)
    random = random_like(trained, seed)
    models = {}
    for n in (4,) if quick else (4, 8):
        models[f"{name}, {n} iterations"] = profile(trained, texts, n, seed)
        models[f"random weights, {n} iterations"] = profile(random, texts, n, seed)
    return {"model": name, "n_prompts": len(texts), "models": models}


def draw(results: dict[str, Any]) -> Any:
    """ColSum concentration of every block, trained and random."""
    curves, bands = {}, {}
    chosen = {name: of for name, of in results["models"].items() if name.endswith("4 iterations")}
    for name, of in chosen.items():
        for metric in ("colsum_concentration", "residual_entropy"):
            blocks = of[metric]["blocks"]
            label = f"{metric.replace('_', ' ')}, {name.split(',')[0]}"
            curves[label] = torch.tensor(blocks["mean"])
            high, low = torch.tensor(blocks["high"]), torch.tensor(blocks["low"])
            bands[label] = (high - low) / 2
    model = LoopedTransformer.from_pretrained_no_processing(results["model"], n_iterations=4)
    return plot_curves(
        curves,
        "Stages by block: 4 iterations",
        x="blocks",
        y_label="value",
        std=bands,
        model=model,
        prompts=results["n_prompts"],
        backend="matplotlib",
    )


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    return run_finding("stages", __doc__.splitlines()[0], measure, draw, given)


if __name__ == "__main__":
    main()
