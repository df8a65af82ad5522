"""What runs cost in memory and time at the width of Ouro, from which docs/scaling.md derives sizes.

One physical layer of Ouro's width (d_model 2048, vocabulary 49,152) is run four times. Each job is
measured in a fresh process: its peak resident memory above the loaded model, and its time in
multiples of the matrix products that it needs, which are timed in the same process.

    python -m tests.benchmarks.scaling
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

from tests.benchmarks.measure_memory import reset_peak, resident

JOBS = ("forward", "measure", "grid, logits everywhere", "grid, last logits", "cache, one name")
PROMPTS, POSITIONS, CELLS = 4, 128, 4


def job(name: str) -> dict[str, float]:
    """Run one job in this process."""
    import torch

    from tl_loops import LoopedTransformer, LoopedTransformerConfig, measure
    from tl_loops.patching import activation_patch

    torch.set_num_threads(1)
    cfg = LoopedTransformerConfig(
        n_core=1, n_iterations=4, d_model=2048, d_head=128, n_heads=16, d_mlp=5632, d_vocab=49152,
        n_ctx=POSITIONS, block_norm="sandwich", norm_between_iterations=True, seed=0, device="cpu",
    )  # fmt: skip
    with torch.no_grad():
        model = LoopedTransformer(cfg).eval()
        tokens = torch.randint(0, cfg.d_vocab, (PROMPTS, POSITIONS))
        model(tokens[:1, :8])
        names = [f"blocks.{i}.hook_resid_pre" for i in range(cfg.n_layers)]
        _, cache = model.run_with_cache(tokens[1:2], names_filter=names)

        def grid(logits_at: str) -> object:
            return activation_patch(
                model, tokens[:1], cache, lambda logits: logits[:, -1, 3].mean(),
                axes=("pos",), where={"block": 0, "pos": range(CELLS)}, batch_size=CELLS,
                progress=False, logits_at=logits_at,
            )  # fmt: skip

        run: Callable[[], object] = {
            "forward": lambda: model(tokens),
            "measure": lambda: measure(model, list(tokens), batch_size=PROMPTS, progress=False),
            "grid, logits everywhere": lambda: grid("all"),
            "grid, last logits": lambda: grid("last"),
            "cache, one name": lambda: model.run_with_cache(
                tokens, names_filter="blocks.0.hook_resid_pre", return_type=None
            ),
        }[name]
        before = resident("VmRSS")
        reset_peak()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        peak = resident("VmHWM") - before

        # The products of one forward pass of as many tokens, logits included.
        a, W = torch.randn(PROMPTS * POSITIONS, 2048), torch.randn(2048, 5632)
        core = sum(p.numel() for p in model.blocks[0].parameters()) * cfg.n_iterations
        products = (core + cfg.d_model * cfg.d_vocab) / W.numel()
        start = time.perf_counter()
        n = 40
        for _ in range(n):
            a @ W
        one = (time.perf_counter() - start) / n
    return {"MB": peak, "forwards": seconds / (one * products), "seconds": seconds}


def main() -> None:
    """Measure all jobs and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", choices=JOBS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(job(options.job)))
        return
    print("| job | MB above the model | times the products of one forward pass |\n|---|---|---|")
    for name in JOBS:
        command = [sys.executable, "-m", "tests.benchmarks.scaling", "--job", name]
        # As in measure_memory.py: freed memory is given back at once.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        print(f"| {name} | {found['MB']:.0f} | {found['forwards']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
