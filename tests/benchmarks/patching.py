"""Activation patching against transformer_lens.patching on the same grids.

Run ``python -m tests.benchmarks.patching``. Both sides run in turn in one process and must agree;
the figures are medians of the ratios of neighbouring runs. ``--differ one``: clean and corrupted
prompt differ in one token in the middle, as prompt pairs usually do; ``--differ all``: in every
token, so that no position can be left out.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformer_lens.patching as upstream
from torch import Tensor

from tl_loops import LoopedTransformer, LoopedTransformerConfig
from tl_loops.patching import activation_patch

GRIDS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "resid_pre, block x pos": (upstream.get_act_patch_resid_pre, "resid_pre", ("block", "pos")),
    "attn_out, block x pos": (upstream.get_act_patch_attn_out, "attn_out", ("block", "pos")),
    "z, block x head": (upstream.get_act_patch_attn_head_out_all_pos, "z", ("block", "head")),
    "pattern, block x head": (
        upstream.get_act_patch_attn_head_pattern_all_pos,
        "pattern",
        ("block", "head"),
    ),
    "z, block x pos x head": (
        upstream.get_act_patch_attn_head_out_by_pos,
        "z",
        ("block", "pos", "head"),
    ),
}


def random_model(d_model: int) -> LoopedTransformer:
    """A (1, 2⊗8, 1)_I model whose activations have the size of a trained model's."""
    cfg = LoopedTransformerConfig(
        n_prelude=1,
        n_core=2,
        n_coda=1,
        n_iterations=8,
        injection="concat",
        initial_state="normal",
        d_model=d_model,
        d_head=d_model // 4,
        n_heads=4,
        d_mlp=3 * d_model,
        d_vocab=256,
        n_ctx=256,
        initializer_range=d_model**-0.5,
        seed=0,
        device="cpu",
    )
    return LoopedTransformer(cfg).eval()


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--pos", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--differ", choices=("one", "all"), default="one")
    parser.add_argument("--grids", nargs="*", choices=tuple(GRIDS), default=list(GRIDS)[:4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    upstream.tqdm = lambda rows: rows  # type: ignore[attr-defined]

    model = random_model(args.d_model)
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch, args.pos)
    clean = torch.randint(0, model.cfg.d_vocab, shape, generator=generator)
    corrupted = (clean + torch.randint(1, model.cfg.d_vocab, shape, generator=generator)) % 256
    if args.differ == "one":
        changed = corrupted[:, args.pos // 2].clone()
        corrupted = clean.clone()
        corrupted[:, args.pos // 2] = changed
    _, cache = model.run_with_cache(clean)

    def metric(logits: Tensor) -> Tensor:
        return (logits[:, -1, 3] - logits[:, -1, 5]).mean()

    print(
        f"{model.cfg.notation} d_model={args.d_model} prompts={list(shape)} "
        f"differ={args.differ} threads={args.threads}"
    )
    for name in args.grids:
        function, activation, axes = GRIDS[name]
        ratios, seconds = [], []
        for _ in range(args.repeats):
            theirs, expected = timed(lambda f=function: f(model, corrupted, cache, metric))
            ours, found = timed(
                lambda a=activation, x=axes: activation_patch(
                    model, corrupted, cache, metric, a, x, progress=False
                )
            )
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            ratios.append(theirs / ours)
            seconds.append((theirs, ours))
        theirs, ours = (statistics.median(side) for side in zip(*seconds, strict=True))
        print(
            f"{name:24s} {expected.numel():5d} cells, transformer_lens {1e3 * theirs:8.1f} ms, "
            f"tl_loops {1e3 * ours:7.1f} ms, {statistics.median(ratios):6.1f} x faster",
            flush=True,
        )


if __name__ == "__main__":
    main()
