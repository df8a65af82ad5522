"""Propositions 4.1 and 4.2 of 2604.11791, checked as inequalities on random and trained models.

    python demos/findings/propositions.py [--quick]

4.1: if X* is a fixed point of the loop of k layers, then what leaves layer l of it is a fixed point
of the loop that begins after layer l. Near X* a step of size r after the last layer is a step of at
most L_l r after layer l, where L_l is the norm of the map from X* to there; both are measured.

4.2: two attention patterns differ by at most a bound times the difference of what they read. The
share of the bound that is used must be at most 1.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from finding import main as run_finding
from torch import Tensor

from tl_loops import LoopedTransformer, LoopedTransformerConfig
from tl_loops.metrics import (
    attention_lipschitz_bound_from_qk,
    attention_lipschitz_ratio,
    operator_norm,
)
from tl_loops.metrics.jacobian import differentiable_attention
from tl_loops.plots import plot_curves
from tl_loops.tasks import sample_pair

N_ITERATIONS = 16  # near the fixed points, and far from the rounding of float64


def models(quick: bool) -> dict[str, tuple[LoopedTransformer, Tensor]]:
    """Models in float64 with one prompt each."""
    sizes: dict[str, Any] = dict(d_model=32, d_head=8, n_heads=4, d_mlp=64, d_vocab=50, n_ctx=128)
    loop: dict[str, Any] = dict(n_core=4, injection="concat", seed=0, device="cpu")
    tokens = torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(0))
    found = {}
    for scale in (0.05,) if quick else (0.02, 0.05, 0.08):
        cfg = LoopedTransformerConfig(
            **sizes, **loop, initializer_range=scale, embed_scale=1.0 / scale
        )
        found[f"random, scale {scale}"] = (LoopedTransformer(cfg).double(), tokens)
    if not quick:
        for name, prompt in (
            ("tl-loops-tiny", sample_pair()[0].text),
            ("tl-loops-text", "In the beginning God created the heaven and the earth."),
        ):
            model = LoopedTransformer.from_pretrained_no_processing(name, dtype=torch.float64)
            found[name] = (model, model.to_tokens(prompt))
    return found


def rotated(model: LoopedTransformer, tokens: Tensor, n: int) -> list[dict[str, Any]]:
    """For each layer: relative step there, at the loop's end, and the bound from the map's norm."""
    layout = model.layout
    n_core = layout.n_core
    with torch.no_grad(), model.iterations(n):
        _, cache = model.run_with_cache(tokens)
        states = [
            torch.stack([cache[f"iter.{t}.{layer}.hook_resid_post"][0] for layer in range(n_core)])
            for t in (n - 2, n - 1)
        ]
        entering = cache[f"iter.{n - 2}.hook_state_out"]
        e = cache["hook_injection"] if model.cfg.injection else None
        before = cache[f"iter.{n - 3}.hook_state_out"]
    injection = {} if e is None else {"injection": e}
    last = (entering - before).norm()
    rows = []

    def to_layer(layer: int, state: Tensor) -> Tensor:
        kept: list[Tensor] = []
        with model.hooks(
            fwd_hooks=[(f"iter.0.{layer}.hook_resid_post", lambda x, hook: kept.append(x))]
        ):
            model(state, start_at_iteration=0, return_type=None, **injection)
        return kept[0]

    for layer in range(n_core):
        step = (states[1][layer] - states[0][layer]).norm()
        with differentiable_attention():
            norm = operator_norm(partial(to_layer, layer), entering, tolerance=1e-3)
        rows.append(
            {
                "layer": layer,
                "step": float(step / states[1][layer].norm()),
                "step_at_the_end": float(last / entering.norm()),
                "step_over_bound": float(step / (norm * last)),
                "norm_of_the_map": norm,
            }
        )
    return rows


def shares(model: LoopedTransformer, tokens: Tensor, n: int) -> Tensor:
    """Share of the bound that patterns use between successive iterations, [step, layer, head]."""
    layout = model.layout
    with torch.no_grad(), model.iterations(n):
        _, cache = model.run_with_cache(tokens)
        found = []
        for t in range(1, n):
            row = []
            for layer in range(layout.n_core):
                now, then = f"iter.{t}.{layer}.attn.", f"iter.{t - 1}.{layer}.attn."
                bound = attention_lipschitz_bound_from_qk(
                    cache[now + "hook_rot_q"],
                    cache[now + "hook_rot_k"],
                    cache[then + "hook_rot_q"],
                    cache[then + "hook_rot_k"],
                )
                patterns = cache[now + "hook_pattern"], cache[then + "hook_pattern"]
                row.append(attention_lipschitz_ratio(*patterns, bound)[0])
            found.append(torch.stack(row))
    return torch.stack(found)


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """Both propositions for every model."""
    n = N_ITERATIONS
    found = {}
    for name, (model, tokens) in models(quick).items():
        used = shares(model, tokens, 12)
        found[name] = {
            "rotated": rotated(model, tokens, n),
            "share_of_the_bound": {
                "largest": float(used.max()),
                "median": float(used.median()),
                "by_step": used.mean((1, 2)),
            },
        }
    return {"n_iterations": n, "models": found}


def draw(results: dict[str, Any]) -> Any:
    """Relative step after each layer, for each model."""
    by_depth = {len(of["rotated"]) for of in results["models"].values()}
    curves = {
        name: torch.tensor(
            [max(row["step"], 1e-17) for row in of["rotated"]]
            + [float("nan")] * (max(by_depth) - len(of["rotated"]))
        )
        for name, of in results["models"].items()
    }
    return plot_curves(
        curves,
        f"Relative step after each layer of the core, iteration {results['n_iterations']}",
        x=list(range(max(by_depth))),
        x_label="layer of the core",
        y_label="relative step",
        log=True,
        backend="matplotlib",
    )


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    return run_finding("propositions", __doc__.splitlines()[0], measure, draw, given)


if __name__ == "__main__":
    main()
