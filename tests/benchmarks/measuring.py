"""What ``measure`` costs in forward passes: four streamed metrics, and one prompt of a wide model.

Run ``python -m tests.benchmarks.measuring``.
"""

import argparse

import torch

from tests.benchmarks.plain_ouro import ouro
from tests.benchmarks.turns import compare
from tl_loops import measure

FOUR = ("sink_rate", "mixing_score", "residual_norm", "successive_difference")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    for what, d, layers, vocab, prompts in (
        ("four metrics, 8 prompts", 512, 6, 4096, 8),
        ("four metrics, 1 prompt", 2048, 1, 49152, 1),
    ):
        model, _ = ouro(d, layers, 4, vocab)
        tokens = torch.randint(0, vocab, (prompts, 128), generator=generator)

        def run(model=model, tokens=tokens, prompts=prompts) -> object:
            return measure(model, list(tokens), FOUR, batch_size=prompts, progress=False)

        print(f"{what}: {model.cfg.notation} d_model={d} vocabulary {vocab}")
        with torch.no_grad():
            compare({"forward": lambda m=model, x=tokens: m(x), "measure": run}, "forward",
                    args.repeats)  # fmt: skip


if __name__ == "__main__":
    main()
