"""Peak memory of measuring: many iterations against few, and many prompts against few.

Each side measures every metric in a fresh process of its own; all sides run in one call.

    python -m tests.benchmarks.measure_memory [--iterations 4 128] [--prompts 8 64]

A side's figure is its peak resident memory; what the model and its hook points take is what the
process held once the model was built with all its iterations and had run once. Exit code 1 if a
larger side takes more than 5 % more memory than the smaller one, hook points aside.

glibc keeps freed blocks for later, by chance more or fewer of them (some 30 MB here). The processes
give them back at once, so that the figure is what is held; --default-allocator leaves that out.
"""

import argparse
import json
import os
import subprocess
import sys
import time

LIMIT = 1.05


def resident(field: str) -> float:
    """Resident memory in MB: ``VmRSS`` now, ``VmHWM`` at the peak since the last reset."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) / 1024


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def side(n_iterations: int, n_prompts: int, args: argparse.Namespace) -> dict[str, float]:
    """Measure in this process."""
    import torch

    from tl_loops import LoopedTransformer, LoopedTransformerConfig
    from tl_loops.measurements.measure import measure

    torch.set_num_threads(1)
    bare = resident("VmRSS")
    cfg = LoopedTransformerConfig(
        n_prelude=1,
        n_core=args.layers,
        n_coda=1,
        n_iterations=n_iterations,
        injection="concat",
        initial_state="normal",
        d_model=args.d_model,
        d_head=args.d_model // 4,
        n_heads=4,
        d_mlp=4 * args.d_model,
        d_vocab=1000,
        n_ctx=args.pos,
        seed=0,
        device="cpu",
    )
    model = LoopedTransformer(cfg).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(0, cfg.d_vocab, (args.pos,), generator=generator) for _ in range(n_prompts)
    ]
    # Libraries that are loaded at their first use do not count.
    measure(model, prompts[:1], "all", n_iterations=3, progress=False)
    built = resident("VmRSS")
    reset_peak()
    start = time.perf_counter()
    measure(model, prompts, "all", batch_size=args.batch_size, progress=False)
    seconds = time.perf_counter() - start
    return {"bare": bare, "built": built, "peak": resident("VmHWM"), "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, nargs=2, default=(4, 128))
    parser.add_argument("--prompts", type=int, nargs=2, default=(8, 64))
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--pos", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--default-allocator", action="store_true")
    parser.add_argument("--side", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(side(*args.side, args)))
        return 0

    few, many = args.iterations
    sides = {
        f"{few} iterations": (few, args.prompts[0]),
        f"{many} iterations": (many, args.prompts[0]),
        f"{few} iterations, {args.prompts[1]} prompts": (few, args.prompts[1]),
    }
    give_back = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536")
    environment = {**os.environ, **({} if args.default_allocator else give_back)}
    results = {}
    for name, (n_iterations, n_prompts) in sides.items():
        command = [sys.executable, "-m", "tests.benchmarks.measure_memory", *sys.argv[1:]]
        command += ["--side", str(n_iterations), str(n_prompts)]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        r = results[name] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name:26s} model and hook points {r['built'] - r['bare']:7.1f} MB, peak above them "
            f"{r['peak'] - r['built']:7.1f} MB, in all {r['peak']:7.1f} MB, {r['seconds']:6.1f} s"
        )
    first, *others = results
    base, exit_code = results[first], 0
    for name in others:
        r = results[name]
        hook_points = r["built"] - base["built"]
        ratio = (r["peak"] - hook_points) / base["peak"]
        own = (r["peak"] - r["built"]) / (base["peak"] - base["built"])
        print(
            f"{name} against {first}: {ratio:.3f} x the peak without hook points, "
            f"{own:.3f} x what measuring itself takes (limit {LIMIT} on the former)"
        )
        exit_code |= ratio > LIMIT
    return int(exit_code)


if __name__ == "__main__":
    sys.exit(main())
