"""What do injection, norms and the loop itself do? Controls of the same text (2604.11791, 5.1, 5.2)

    apt-get install bible-kjv bible-kjv-text
    python demos/findings/controls.py [--quick]

Models of the shape (2, 4⊗4, 2) with and without injection, with plain pre-norm and with Huginn's
norms, and a feedforward model of 12 layers, are trained from scratch on the text of
``tl-loops-text``: equal steps, width and contexts, three seeds each, no penalty on the state. Two
larger shapes have fewer steps. Compared are the loss by iterations up to 128, the step of the state
there, and the stages of each block. Whether an iteration mirrors the feedforward model is the
correlation of its profile with that of all 12 layers, both stretched to one length; beside it stand
two feedforward models of different seeds, and random weights.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from finding import SkippedError, over_seeds
from finding import main as run_finding
from random_stacks import NORMS
from stages import METRICS, correlation, of_prompt
from torch import Tensor
from train_text import chapters, encode, split

from tl_loops import LoopedTransformer, LoopedTransformerConfig
from tl_loops.metrics import align_stages
from tl_loops.plots import plot_curves
from tl_loops.tasks.prompts import VERSES
from tl_loops.training import (
    ConstantIterations,
    LogNormalPoissonIterations,
    TrainingSettings,
    cut_contexts,
    evaluate,
    train,
    training_pass,
)

N_CONTEXT = 64
D_MODEL = 64
NUMBERS = (1, 2, 3, 4, 6, 8, 16, 32, 64, 128)
"""Numbers of iterations at test time; 1 to 8 were trained, on average about 4."""
N_STAGES = 8
"""Iterations of the runs whose stages are compared."""
FEEDFORWARD = "feedforward, 12 layers"
_INJECTED: Mapping[str, Any] = dict(
    injection="concat", initial_state="normal", initial_state_std=0.02, state_seed=None
)
_PLAIN: Mapping[str, Any] = dict(injection=None, initial_state="embed")
ARMS: Mapping[str, Mapping[str, Any]] = {
    "injection": {**_INJECTED, **NORMS["pre"]},
    "no injection": {**_PLAIN, **NORMS["pre"]},
    "injection, Huginn's norms": {**_INJECTED, **NORMS["post-residual (Huginn)"]},
    "no injection, Huginn's norms": {**_PLAIN, **NORMS["post-residual (Huginn)"]},
    FEEDFORWARD: dict(n_prelude=0, n_core=12, n_coda=0, n_iterations=1),
}
LARGER: Mapping[str, Mapping[str, Any]] = {
    "injection, (2, 8⊗4, 2)": {**ARMS["injection"], "n_core": 8},
    "injection, (2, 12⊗4, 2)": {**ARMS["injection"], "n_core": 12},
}
QUICK: Mapping[str, Any] = dict(d_model=16, d_head=8, n_heads=2, d_mlp=24)


def texts(tokenizer: Any, quick: bool) -> tuple[Tensor, Tensor]:
    """Tokens to train on and held-out ones; a quick run has a few verses for both.

    Raises:
        SkippedError: The King James Bible is not installed.
    """
    if quick:
        tokens = encode(tokenizer, list(VERSES))
        return tokens, tokens
    if shutil.which("bible") is None:
        raise SkippedError("it needs a text: apt-get install bible-kjv bible-kjv-text")
    training, held = split(chapters())
    return encode(tokenizer, training), encode(tokenizer, held)


def make(fields: Mapping[str, Any], d_vocab: int, seed: int) -> LoopedTransformer:
    """A model of the shape (2, 4⊗4, 2) but for what ``fields`` say."""
    shape = dict(n_prelude=2, n_core=4, n_coda=2, n_iterations=4)
    sizes = dict(d_model=D_MODEL, d_head=D_MODEL // 4, n_heads=4, d_mlp=176)
    given = {**shape, **sizes, **fields}
    return LoopedTransformer(
        LoopedTransformerConfig(
            **given,
            d_vocab=d_vocab,
            n_ctx=N_CONTEXT,
            tie_word_embeddings=True,
            initializer_range=0.5 * given["d_model"] ** -0.5,
            seed=seed,
            device="cpu",
        )
    )


def stages(model: LoopedTransformer, contexts: Tensor) -> Tensor:
    """Mean of every metric at every block, [metric, block]."""
    return torch.stack([of_prompt(model, row[None])[0] for row in contexts]).mean(0)


def trained(
    fields: Mapping[str, Any],
    d_vocab: int,
    corpus: Tensor,
    held_out: Tensor,
    n_steps: int,
    seed: int,
) -> dict[str, Any]:
    """Train one model, and measure it on held-out contexts.

    Returns:
        Loss by number of iterations, relative step and growth of the state at the last of them,
        stages of the trained and of the untrained model, seconds of training.
    """
    quick = n_steps < 10
    model = make(fields, d_vocab, seed)
    looped = model.cfg.n_iterations > 1
    contexts = cut_contexts(held_out, N_CONTEXT, 2 if quick else 16, first_token=0)
    at_rest = {"state_seed": 0} if "state_seed" in fields else {}
    untrained = make({**fields, **at_rest}, d_vocab, seed)
    n_stages = N_STAGES if looped else 1
    with torch.no_grad(), untrained.iterations(n_stages):
        random = stages(untrained, contexts)
    settings = TrainingSettings(
        n_steps=n_steps,
        batch_size=2 if quick else 8,
        n_context=N_CONTEXT,
        first_token=0,
        iterations=(
            LogNormalPoissonIterations(mean=3.5, most=8) if looped else ConstantIterations(1)
        ),
        learning_rate=3e-3,
        warmup_steps=max(1, n_steps // 10),
        decay=0.5,
        weight_decay=0.05,
        seed=seed,
    )
    began = time.monotonic()
    train(model, corpus, settings, progress=False)
    seconds = time.monotonic() - began
    if model.cfg.state_seed is None:
        model.cfg.state_seed = 0  # from here on the state is a function of the position
    numbers = (NUMBERS[:4] if quick else NUMBERS) if looped else (1,)
    found: dict[str, Any] = {
        "n_params": model.cfg.n_params,
        "seconds": seconds,
        "loss": evaluate(
            model, held_out, N_CONTEXT, numbers, n_contexts=2 if quick else 48, first_token=0
        ),
        "random_stages": random,
    }
    with torch.no_grad(), model.iterations(n_stages):
        found["stages"] = stages(model, contexts)
    if looped:
        with torch.no_grad(), model.iterations(numbers[-1]):
            before, last = training_pass(model, contexts, numbers[-1]).states[-2:]
        found["relative_step"] = ((last - before).norm(dim=-1) / last.norm(dim=-1)).mean()
        found["growth"] = (last.norm(dim=-1) / before.norm(dim=-1)).mean()
    return found


def core(blocks: Tensor, n_core: int) -> Tensor:
    """The blocks of the loop alone, [metric, iteration, layer]."""
    return blocks[:, 2:-2].unflatten(-1, (-1, n_core))


def mirroring(profile: Tensor, reference: Tensor, seed: int) -> tuple[float, float]:
    """Correlation of the iterations' mean profile with a reference; p under permuted layers."""
    found = align_stages(profile, reference, n_permutations=1000, seed=seed)
    return float(found.pearson), float(found.null.pearson_p) if found.null else float("nan")


def compared(runs: Sequence[dict[str, Any]], feedforward: Sequence[Tensor], n_core: int) -> dict:
    """How far iterations repeat each other, and mirror the feedforward model of the same seed.

    Args:
        runs: One for each seed.
        feedforward: The feedforward models' stages, [metric, layer], for these seeds.
        n_core: Layers of the loop.
    """
    found: dict[str, Any] = {}
    for i, metric in enumerate(METRICS):
        rows: dict[str, list[float]] = {}
        for seed, (run, reference) in enumerate(zip(runs, feedforward, strict=True)):
            for kind, key in (("", "stages"), ("random_", "random_stages")):
                of = core(run[key], n_core)[i].double()
                late = of[of.shape[0] // 2 :].mean(0)
                r, p = mirroring(late, reference[i].double(), seed)
                again = correlation(of[1:], of[:-1]).mean()
                for name, value in (("mirroring", r), ("mirroring_p", p), ("repetition", again)):
                    rows.setdefault(f"{kind}{name}", []).append(float(value))
        found[metric] = {name: over_seeds(values) for name, values in rows.items()}
    return found


def by_block(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every metric by block: mean over seeds, least and largest."""
    found = torch.stack([run["stages"] for run in runs])
    return {
        metric: {"mean": of.mean(0), "low": of.amin(0), "high": of.amax(0)}
        for metric, of in zip(METRICS, found.unbind(1), strict=True)
    }


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all seeds of one kind of model say."""
    numbers = list(runs[0]["loss"])
    losses = torch.tensor([list(run["loss"].values()) for run in runs])
    above = losses - losses.amin(1, keepdim=True)
    found: dict[str, Any] = {
        "n_params": runs[0]["n_params"],
        "n_seeds": len(runs),
        "seconds_of_training": [run["seconds"] for run in runs],
        "numbers": numbers,
        "loss": [over_seeds(each) for each in losses.T.tolist()],
        "above_the_best": [over_seeds(each) for each in above.T.tolist()],
        "stages": by_block(runs),
        "largest_sink_rate": over_seeds([float(run["stages"][1].max()) for run in runs]),
        "least_residual_entropy": over_seeds([float(run["stages"][3].min()) for run in runs]),
    }
    for key in ("relative_step", "growth"):
        if key in runs[0]:
            found[key] = over_seeds([float(run[key]) for run in runs])
    return found


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """Train all, then compare."""
    n_steps, fewer, n_seeds = (2, 2, 1) if quick else (800, 300, 3)
    tokenizer = LoopedTransformer.from_pretrained_no_processing("tl-loops-text").tokenizer
    assert tokenizer is not None
    d_vocab = len(tokenizer)
    corpus, held_out = texts(tokenizer.backend_tokenizer, quick)
    sizes = QUICK if quick else {}
    arms = {
        name: {**ARMS[name], **sizes} for name in (("injection", FEEDFORWARD) if quick else ARMS)
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for s in range(seed, seed + n_seeds):
        for name, fields in arms.items():
            runs[name].append(trained(fields, d_vocab, corpus, held_out, n_steps, s))
    references = [run["stages"] for run in runs[FEEDFORWARD]]
    models = {}
    for name, of in runs.items():
        models[name] = summary(of)
        if name != FEEDFORWARD:
            models[name]["compared"] = compared(of, references, 4)
    for name, fields in {} if quick else LARGER.items():
        of = [
            trained(fields, d_vocab, corpus, held_out, fewer, s)
            for s in range(seed, seed + n_seeds)
        ]
        models[name] = {**summary(of), "n_steps": fewer}
        models[name]["compared"] = compared(of, references, fields["n_core"])
    others = [*references[1:], *references[:1]]
    return {
        "n_steps": n_steps,
        "n_seeds": n_seeds,
        "models": models,
        "feedforward_of_another_seed": {
            metric: over_seeds(
                [float(correlation(a[i], b[i])) for a, b in zip(references, others, strict=True)]
            )
            for i, metric in enumerate(METRICS)
        },
    }


def draw(results: dict[str, Any]) -> Any:
    """Held-out loss against the number of iterations at test time."""
    curves, bands, numbers = {}, {}, []
    for name, of in results["models"].items():
        if name == FEEDFORWARD or "n_steps" in of:
            continue
        numbers = of["numbers"]
        curves[name] = torch.tensor([row["mean"] for row in of["loss"]])
        bands[name] = torch.tensor([(row["high"] - row["low"]) / 2 for row in of["loss"]])
    return plot_curves(
        curves,
        f"Trained with 1 to 8 iterations, mean and spread of {results['n_seeds']} seeds",
        x=[float(n) for n in numbers],
        x_label="number of iterations at test time",
        y_label="held-out loss, nats per token",
        std=bands,
        backend="matplotlib",
    )


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    return run_finding("controls", __doc__.splitlines()[0], measure, draw, given)


if __name__ == "__main__":
    main()
