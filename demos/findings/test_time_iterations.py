"""Does the loss hold over far more iterations than were trained? (2604.11791, 5.2)

    python demos/findings/test_time_iterations.py [--quick]

``tl-loops-text`` was trained with 1 to 12 iterations, on average about 4. Its loss on prompts of
the King James Bible is read after each of 128 iterations of one run, together with the length of
its state and its step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from finding import bootstrap
from finding import main as run_finding
from torch import Tensor

from tl_loops import LoopedTransformer
from tl_loops.metrics import successive_difference
from tl_loops.plots import plot_curves
from tl_loops.tasks.prompts import VERSES
from tl_loops.training import exit_logits, token_losses, training_pass

N_ITERATIONS = 128


def of_prompt(model: LoopedTransformer, prompt: str, n: int) -> dict[str, Tensor]:
    """Loss, relative step and length of the state after each iteration."""
    tokens = model.to_tokens(prompt)
    run = training_pass(model, tokens, n)
    states = torch.stack(run.states)[:, 0]
    step = successive_difference(states, relative=True)
    losses = [token_losses(logits, tokens).mean() for logits in exit_logits(model, tokens, run)]
    return {
        "loss": torch.stack(losses),
        "relative_step": torch.cat([step.new_full((1,), torch.nan), step]),
        "norm": states.norm(dim=-1).mean(-1),
    }


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """The curves, with bootstrap intervals over prompts."""
    name, texts, n = (
        ("tl-loops-tiny", ["Ann likes Bob . 1 hops from Ann :"] * 2, 16)
        if quick
        else ("tl-loops-text", VERSES, N_ITERATIONS)
    )
    model = LoopedTransformer.from_pretrained_no_processing(name)
    with torch.no_grad(), model.iterations(n):
        found = [of_prompt(model, text, n) for text in texts]
    curves = {
        key: bootstrap(torch.stack([one[key] for one in found]), seed=seed) for key in found[0]
    }
    best = int(curves["loss"]["mean"].argmin())
    differences = torch.stack([one["loss"] - one["loss"][best] for one in found])
    return {
        "model": name,
        "n_prompts": len(texts),
        "n_iterations": n,
        "best_iteration": best + 1,
        "curves": curves,
        "above_the_best": bootstrap(differences, seed=seed),
    }


def draw(results: dict[str, Any]) -> Any:
    """Loss above that of the best number of iterations, on the same prompts."""
    above = results["above_the_best"]
    mean, low, high = (torch.tensor(above[key]) for key in ("mean", "low", "high"))
    return plot_curves(
        {"loss above the best": mean},
        f"{results['model']}: loss minus that after {results['best_iteration']} iterations",
        x=[float(n) for n in range(1, len(mean) + 1)],
        x_label="number of iterations",
        y_label="nats per token",
        std={"loss above the best": (high - low) / 2},
        backend="matplotlib",
    )


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    return run_finding("test_time_iterations", __doc__.splitlines()[0], measure, draw, given)


if __name__ == "__main__":
    main()
