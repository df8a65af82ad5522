"""Prediction and suppression neurons by depth (2604.11791, appendix E.1; 2401.12181).

    python demos/findings/neurons.py [--quick]

From the weights alone: a neuron's output direction, read by the unembedding, gives one cosine per
token. A prediction neuron has kurtosis above 10 and positive skew, a suppression neuron negative
skew. In how many random directions the same unembedding finds a kurtosis that high says
what the threshold means for a small vocabulary. SmolLM2 is measured where it is installed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from finding import bootstrap
from finding import main as run_finding
from subjects import subjects
from torch import Tensor

from tl_loops import LoopedTransformer
from tl_loops.metrics import neuron_vocabulary_statistics, prediction_suppression_neurons
from tl_loops.plots import plot_curves

THRESHOLD = 10.0  # of the kurtosis, 2401.12181
N_RANDOM = 1536


def by_layer(classes: Tensor, seed: int) -> dict[str, Tensor]:
    """Share of the neurons of each layer, with intervals over neurons."""
    return bootstrap(classes.double().T, seed=seed)


def of_model(model: LoopedTransformer, seed: int) -> dict[str, Any]:
    """Shares by physical layer, their quantiles of kurtosis, and what random directions give."""
    found = prediction_suppression_neurons(model, kurtosis_threshold=THRESHOLD)
    kurtosis = found.statistics.kurtosis.double()
    generator = torch.Generator().manual_seed(seed)
    n_random = min(N_RANDOM, model.cfg.d_mlp * len(kurtosis))
    directions = torch.randn(n_random, model.cfg.d_model, generator=generator)
    random = neuron_vocabulary_statistics(directions, model.W_U, model.ln_final.w).kurtosis.double()
    beyond = float(random.quantile(0.99))
    layout = model.layout
    return {
        "layers": [
            f"{phase}{'' if phase == 'core' else ' '}{i}".replace("core", "core ")
            for phase, n in (
                ("prelude", layout.n_prelude),
                ("core", layout.n_core),
                ("coda", layout.n_coda),
            )
            for i in range(n)
        ],
        "d_vocab": model.cfg.d_vocab,
        "neurons_per_layer": model.cfg.d_mlp,
        "prediction": by_layer(found.classes.prediction, seed),
        "suppression": by_layer(found.classes.suppression, seed),
        "kurtosis_median": kurtosis.median(-1).values,
        "kurtosis_largest": kurtosis.max(-1).values,
        "random_kurtosis_99": beyond,
        "random_above_threshold": float((random > THRESHOLD).double().mean()),
        "beyond_99_of_random": by_layer(kurtosis > beyond, seed),
    }


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """Every model."""
    models, skipped = subjects(quick, 1, seed)
    with torch.no_grad():
        found = {name: of_model(subject.model, seed) for name, subject in models.items()}
    return {"threshold": THRESHOLD, "models": found, "skipped": skipped}


def draw(results: dict[str, Any]) -> Any:
    """Share of prediction and suppression neurons against relative depth."""
    points = torch.linspace(0, 100, 61)
    curves, bands = {}, {}
    for name, of in results["models"].items():
        depth = torch.linspace(0, 100, len(of["layers"]))
        nearest = (points[:, None] - depth).abs().argmin(1)
        for kind in ("prediction", "suppression"):
            share = {key: torch.tensor(of[kind][key])[nearest] for key in ("mean", "low", "high")}
            curves[f"{kind}, {name}"] = share["mean"]
            bands[f"{kind}, {name}"] = (share["high"] - share["low"]) / 2
    return plot_curves(
        curves,
        "Prediction and suppression neurons by depth",
        x=points.tolist(),
        x_label="depth of the physical layer, percent",
        y_label="share of the layer's neurons",
        std=bands,
        bounds=(0, 1),
        backend="matplotlib",
    )


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    return run_finding("neurons", __doc__.splitlines()[0], measure, draw, given)


if __name__ == "__main__":
    main()
