"""Greedy decoding with the key-value cache, against the same model in plain torch.

Run ``python -m tests.benchmarks.decoding``.
"""

import argparse

import torch

from tests.benchmarks.plain_ouro import ouro
from tests.benchmarks.turns import compare


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--loops", type=int, default=4)
    parser.add_argument("--pos", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, plain = ouro(args.d_model, args.layers, args.loops, 4096)
    tokens = torch.randint(0, 4096, (1, args.pos), generator=torch.Generator().manual_seed(0))

    def generate() -> torch.Tensor:
        made = model.generate(tokens, args.new, stop_at_eos=False, do_sample=False, verbose=False)
        assert isinstance(made, torch.Tensor)
        return made

    print(f"{model.cfg.notation} d_model={args.d_model} {args.pos} + {args.new} tokens")
    with torch.no_grad():
        assert torch.equal(generate(), plain.decode(tokens, args.new))
        compare({"plain": lambda: plain.decode(tokens, args.new), "generate": generate}, "plain",
                args.repeats)  # fmt: skip


if __name__ == "__main__":
    main()
