"""Does a trained exit gate let harder prompts leave later? (Ouro, 2510.25741)

    python demos/findings/exits.py [--quick]

``tl-loops-tiny`` gets an exit gate and is trained on, with Ouro's expected loss and its entropy
term, to give the answer after k hops at every exit. Nothing tells the gate how many hops a prompt
asks for but the prompt itself. When do held-out prompts leave, by their number of hops? What does
leaving early save at equal accuracy? Without the entropy term the gate should fall onto one
iteration, which is measured as well. Intervals are over three seeds of gate and training.
"""

from collections.abc import Sequence
from typing import Any

import torch
from fact_chains import FactChains, asked
from finding import bootstrap, merged
from finding import main as run_finding
from torch import Tensor

from tl_loops import LoopedTransformer, LoopedTransformerConfig
from tl_loops.metrics import exit_distribution, exit_iteration, expected_exit_iteration
from tl_loops.plots import plot_curves
from tl_loops.tasks import FactChainTask, fact_chain_prompts
from tl_loops.training import (
    ConstantIterations,
    TrainingSettings,
    exit_logits,
    train,
    training_pass,
)

N_ITERATIONS = 8
BATCH = 32
LEARNING_RATE = 1e-3
ENTROPY = (0.1, 0.0)
"""Weights of the entropy of the exits, β."""
THRESHOLDS = (0.1, 0.25, 0.5, 0.75, 0.9)
HOPS = range(1, FactChainTask().max_hops + 1)


def with_gate(seed: int) -> LoopedTransformer:
    """``tl-loops-tiny`` with a gate that leaves nowhere in particular."""
    trained = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny")
    fields = {**trained.cfg.to_dict(), "exit_gate": True, "seed": seed}
    model = LoopedTransformer(LoopedTransformerConfig.from_dict(fields), trained.tokenizer)
    own = dict(model.physical_named_parameters())
    with torch.no_grad():
        for name, weight in trained.physical_named_parameters():
            own.pop(name).copy_(weight)
        for weight in own.values():  # of the gate
            weight.zero_()
    return model


def at_the_end(model: LoopedTransformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and gates of the last position after each iteration, [iteration, prompt, ...]."""
    run = training_pass(model, tokens, model.cfg.n_iterations)
    logits = torch.stack([each[:, -1] for each in exit_logits(model, tokens, run)])
    return logits, torch.stack(run.gates)[:, :, -1, 0]


def trained_on(n_steps: int, entropy: float, seed: int) -> tuple[LoopedTransformer, list[float]]:
    """A model trained with Ouro's expected loss, all weights of it, and the loss of each step."""
    model = with_gate(seed)
    model.cfg.state_seed = None  # a new initial state at every step
    settings = TrainingSettings(
        n_steps=n_steps,
        batch_size=BATCH,
        iterations=ConstantIterations(N_ITERATIONS),
        exit_loss="expected",
        entropy_weight=entropy,
        learning_rate=LEARNING_RATE,
        warmup_steps=20,
        decay=0.5,
        betas=(0.9, 0.999),
        seed=seed,
    )
    log = train(model, FactChains(model, hop_by_hop=False), settings, progress=False)
    model.cfg.state_seed = 0
    return model, log.column("loss")


@torch.no_grad()
def held_out(model: LoopedTransformer, n_prompts: int, seed: int) -> dict[str, Any]:
    """When held-out prompts leave, by hops, and accuracy against the iterations that it takes."""
    rows, accuracy, leave = {}, {q: [] for q in THRESHOLDS}, {q: [] for q in THRESHOLDS}
    fixed, expected = [], []
    for hops in HOPS:
        tokens, answers = asked(model, fact_chain_prompts(n_prompts, n_hops=hops, seed=seed))
        logits, gates = at_the_end(model, tokens)
        right = (logits.argmax(-1) == answers).double()
        when = expected_exit_iteration(gates) + 1
        expected.append(when)
        fixed.append(right)
        rows[hops] = {
            "distribution": bootstrap(exit_distribution(gates).T, seed=seed),
            "expected_exit": bootstrap(when, seed=seed),
            "accuracy_by_exit": bootstrap(right.T, seed=seed),
        }
        for q in THRESHOLDS:
            at = exit_iteration("ouro", gate_logits=gates, threshold=q)
            leave[q].append((at + 1).double())
            accuracy[q].append(right.gather(0, at[None])[0])
    hops = torch.arange(len(expected)).repeat_interleave(n_prompts).double() + 1
    when = torch.cat(expected).double()
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(when), (1000, len(when)), generator=generator)
    slopes = torch.stack([slope(hops[rows_], when[rows_]) for rows_ in draws])
    return {
        "by_hops": rows,
        "iterations_per_hop": {
            "mean": slope(hops, when),
            "low": slopes.quantile(0.025),
            "high": slopes.quantile(0.975),
        },
        "by_threshold": {
            q: {
                "iterations": bootstrap(torch.cat(leave[q]), seed=seed),
                "accuracy": bootstrap(torch.cat(accuracy[q]), seed=seed),
            }
            for q in THRESHOLDS
        },
        "accuracy_at_fixed_exits": bootstrap(torch.cat(fixed, dim=1).T, seed=seed),
    }


def slope(x: Tensor, y: Tensor) -> Tensor:
    """Of the straight line with the least squares."""
    x = x - x.mean()
    return (x * (y - y.mean())).sum() / x.square().sum()


def measured(n_steps: int, n_prompts: int, entropy: float, seed: int) -> dict[str, Any]:
    """Train one model, and look at held-out prompts."""
    model, log = trained_on(n_steps, entropy, seed)
    tenth = max(1, n_steps // 10)
    return {
        "loss_at_first": sum(log[:tenth]) / tenth,
        "loss_at_last": sum(log[-tenth:]) / tenth,
        **held_out(model, n_prompts, seed + 1),
    }


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """With and without the entropy term, for each seed."""
    n_steps, n_prompts, n_seeds = (2, 3, 1) if quick else (250, 100, 3)
    seeds = range(seed, seed + n_seeds)
    return {
        "n_steps": n_steps,
        "n_prompts_per_hop": n_prompts,
        "n_seeds": n_seeds,
        "trained": {
            f"beta {entropy}": merged([measured(n_steps, n_prompts, entropy, s) for s in seeds])
            for entropy in (ENTROPY[:1] if quick else ENTROPY)
        },
    }


def draw(results: dict[str, Any]) -> Any:
    """Exit distribution by number of hops, of the model with the entropy term."""
    of = next(iter(results["trained"].values()))["by_hops"]
    curves, bands = {}, {}
    for hops, row in of.items():
        found = {key: torch.tensor(value) for key, value in row["distribution"].items()}
        curves[f"{hops} hop{'s' * (int(hops) > 1)}"] = found["mean"]
        bands[f"{hops} hop{'s' * (int(hops) > 1)}"] = (found["high"] - found["low"]) / 2
    return plot_curves(
        curves,
        "tl-loops-tiny with an exit gate: where prompts leave, by hops",
        x=list(range(1, len(next(iter(curves.values()))) + 1)),
        x_label="number of iterations",
        y_label="probability of leaving, mean over prompts",
        colours="iterations",
        std=bands,
        bounds=(0, 1),
        backend="matplotlib",
    )


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    return run_finding("exits", __doc__.splitlines()[0], measure, draw, given)


if __name__ == "__main__":
    main()
