"""Do loops of random weights reach fixed points, and which kind? (2604.11791, section 4.2)

    python demos/findings/random_stacks.py [--quick]

Stacks of 4, 12 and 16 layers without prelude and coda run 128 iterations over random tokens, for
three norm styles, with and without injection, for several scales of the weights. Whether the states
settle is read from the relative step of the last iteration; which kind of fixed point it is from
the lowest cosine between the first layer's state and any other's. The embedding has unit length per
dimension at every scale, so that the scale is that of the maps alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from finding import main as run_finding
from finding import over_seeds
from torch import Tensor

from tl_loops import LoopedTransformer, LoopedTransformerConfig
from tl_loops.metrics import degenerate_fixed_point
from tl_loops.plots import plot_curves

NORMS: dict[str, dict[str, Any]] = {
    "pre": dict(block_norm="pre"),
    "sandwich (Ouro)": dict(block_norm="sandwich", norm_between_iterations=True),
    "post-residual (Huginn)": dict(block_norm="post_residual"),
}
SCALES = {4: (0.02, 0.05, 0.1), 12: (0.02,), 16: (0.02,)}
"""Scales of the weights for each depth."""
N_ITERATIONS = 128
N_TOKENS = 16
SETTLED = 1e-3  # relative step per iteration


def trajectory(norm: str, depth: int, injected: bool, scale: float, seed: int, n: int) -> Tensor:
    """The state after each layer at each iteration, [iteration, layer, pos, d_model]."""
    model = LoopedTransformer(
        LoopedTransformerConfig(
            n_core=depth,
            n_iterations=1,
            injection="concat" if injected else None,
            d_model=48,
            d_head=12,
            n_heads=4,
            d_mlp=96,
            d_vocab=64,
            n_ctx=32,
            initializer_range=scale,
            embed_scale=1.0 / scale,
            seed=seed,
            device="cpu",
            **NORMS[norm],
        )
    )
    tokens = torch.randint(64, (1, N_TOKENS), generator=torch.Generator().manual_seed(seed))
    kept: list[Tensor] = []
    left: list[Tensor] = []
    hooks = [
        (f"blocks.{i}.hook_resid_post", lambda x, hook: kept.append(x[0])) for i in range(depth)
    ]
    hooks.append(("iter.0.hook_state_out", lambda x, hook: left.append(x)))
    rows = []
    with torch.no_grad():
        e = state = model(tokens, stop_at_layer=0)
        for _ in range(n):
            kept.clear()
            arguments = {"injection": e} if injected else {}
            with model.hooks(fwd_hooks=hooks):
                model(state, start_at_iteration=0, return_type=None, **arguments)
            state = left.pop()
            rows.append(torch.stack([*kept[:-1], state[0]]))
    return torch.stack(rows)


def scores(states: Tensor) -> tuple[float, float, float]:
    """Relative step of the last iteration, lowest cosine between layers, growth per iteration."""
    last, before = states[-1].double(), states[-2].double()
    step = ((last - before).norm(dim=-1) / last.norm(dim=-1)).mean()
    cosine = degenerate_fixed_point(states[-1].double()).mean()
    half = states[len(states) // 2, -1].double().norm(dim=-1)
    growth = (last[-1].norm(dim=-1) / half).mean() ** (1 / (len(states) - 1 - len(states) // 2))
    return float(step), float(cosine), float(growth)


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """All cases; in a quick run one depth, norm style and scale, two seeds and 12 iterations."""
    scales = {4: (0.02,)} if quick else SCALES
    norms = ["pre"] if quick else list(NORMS)
    seeds = range(seed, seed + (2 if quick else 3))
    n_iterations = 12 if quick else N_ITERATIONS
    rows = []
    for depth, of_depth in scales.items():
        for norm in norms:
            for injected in (True, False):
                for scale in of_depth:
                    found = [
                        scores(trajectory(norm, depth, injected, scale, s, n_iterations))
                        for s in seeds
                    ]
                    step, cosine, growth = zip(*found, strict=True)
                    rows.append(
                        {
                            "depth": depth,
                            "norm": norm,
                            "injection": injected,
                            "scale": scale,
                            "step": over_seeds(step),
                            "lowest_cosine": over_seeds(cosine),
                            "growth": over_seeds(growth),
                            "settled": sum(s < SETTLED for s in step),
                            "n_seeds": len(seeds),
                        }
                    )
    return {"n_iterations": n_iterations, "settled_below": SETTLED, "rows": rows}


def draw(results: dict[str, Any]) -> Any:
    """Relative step of the last iteration against the scale of the weights."""
    rows = results["rows"]
    depth = min(row["depth"] for row in rows)
    curves = {}
    for norm in dict.fromkeys(row["norm"] for row in rows):
        for injected in (True, False):
            chosen = [
                r
                for r in rows
                if (r["depth"], r["norm"], r["injection"]) == (depth, norm, injected)
            ]
            name = f"{norm}, {'with' if injected else 'no'} injection"
            curves[name] = torch.tensor([max(r["step"]["mean"], 1e-9) for r in chosen])
    scales = sorted({row["scale"] for row in rows if row["depth"] == depth})
    return plot_curves(
        curves,
        f"Random stacks of {depth} layers: relative step at iteration {results['n_iterations']}",
        x=scales,
        x_label="standard deviation of the weights",
        y_label="‖x_T - x_(T-1)‖ / ‖x_T‖",
        log=True,
        backend="matplotlib",
    )


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    return run_finding("random_stacks", __doc__.splitlines()[0], measure, draw, given)


if __name__ == "__main__":
    main()
