"""Forward pass against the same model in plain torch: bare, and with every hook point cached.

Run ``python -m tests.benchmarks.forward``. Both sides run in turn in one process; the figures are
medians of the ratios of neighbouring runs.
"""

import argparse
import warnings
from collections.abc import Callable

import torch

from tests.benchmarks.plain_ouro import ouro
from tests.benchmarks.turns import compare


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--loops", type=int, default=4)
    parser.add_argument("--pos", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="also by torch.compile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here, so nothing was measured on one")
        return
    d, vocab = args.d_model, 4096
    model, plain = ouro(d, args.layers, args.loops, vocab, args.device)
    tokens = torch.randint(0, vocab, (1, args.pos), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(args.device)

    print(f"{model.cfg.notation} d_model={d} pos={args.pos} threads={args.threads}")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-4, atol=1e-4)
        sides: dict[str, Callable[[], object]] = {
            "plain": lambda: plain(tokens),
            "no hooks": lambda: model(tokens),
            "all cached": lambda: model.run_with_cache(tokens),
        }
        if args.compile:
            ours, theirs = torch.compile(model), torch.compile(plain)
            torch.testing.assert_close(ours(tokens), plain(tokens), rtol=1e-4, atol=1e-4)
            sides["plain, compiled"] = lambda: theirs(tokens)
            sides["no hooks, compiled"] = lambda: ours(tokens)
        compare(sides, "plain", args.repeats)
        if args.device == "cuda":
            for name, run in sides.items():
                print(f"{name:32s} waits for the GPU {waits(run)} times in a forward pass")


def waits(run: Callable[[], object]) -> int:
    """How often a call makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


if __name__ == "__main__":
    main()
