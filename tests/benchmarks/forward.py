"""Forward pass against the same model in plain torch: bare, and with every hook point cached.

Run ``python -m tests.benchmarks.forward``. Both sides run in turn in one process; the figures are
medians of the ratios of neighbouring runs.
"""

import argparse
import statistics
import time

import torch

from tests.benchmarks.plain_ouro import PlainOuro
from tl_loops import LoopedTransformer, LoopedTransformerConfig


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--loops", type=int, default=4)
    parser.add_argument("--pos", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    d, heads, d_mlp, vocab = args.d_model, args.d_model // 64, args.d_model * 11 // 4, 4096

    cfg = LoopedTransformerConfig(
        n_core=args.layers,
        n_iterations=args.loops,
        d_model=d,
        d_head=64,
        n_heads=heads,
        d_mlp=d_mlp,
        d_vocab=vocab,
        n_ctx=2048,
        block_norm="sandwich",
        norm_between_iterations=True,
        exit_gate=True,
        rotary_base=1e6,
        seed=0,
        device="cpu",
    )
    model = LoopedTransformer(cfg)
    plain = PlainOuro(d, heads, d_mlp, args.layers, args.loops, vocab)
    plain.load(model.physical_state_dict())
    tokens = torch.randint(0, vocab, (1, args.pos), generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-4, atol=1e-4)
        sides = {
            "plain": lambda: plain(tokens),
            "no hooks": lambda: model(tokens),
            "all cached": lambda: model.run_with_cache(tokens),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(args.repeats + 2):
            for name, run in sides.items():
                start = time.perf_counter()
                run()
                if repeat >= 2:
                    times[name].append(time.perf_counter() - start)
    print(f"{cfg.notation} d_model={d} pos={args.pos} threads={args.threads}")
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times["plain"], strict=True)]
        print(
            f"{name:12s} median {1e3 * statistics.median(seconds):8.1f} ms, "
            f"{statistics.median(ratios):.3f} x plain"
        )


if __name__ == "__main__":
    main()
