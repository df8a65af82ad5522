"""Forward pass against the same model in plain torch: bare, and with every hook point cached.

Run ``python -m tests.benchmarks.forward``. Both sides run in turn in one process; the figures are
medians of the ratios of neighbouring runs.
"""

import argparse
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
    parser.add_argument("--compile", action="store_true", help="also by torch.compile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    d, vocab = args.d_model, 4096
    model, plain = ouro(d, args.layers, args.loops, vocab)
    tokens = torch.randint(0, vocab, (1, args.pos), generator=torch.Generator().manual_seed(0))

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


if __name__ == "__main__":
    main()
