"""Seconds until something happens: the import, the first call, the help of the command line.

Run ``python -m tests.benchmarks.starting``. A figure is the least of several fresh processes, which
differ by what else the machine does.
"""

import argparse
import subprocess
import sys
import time

IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
FIRST = """
import time
import torch, transformer_lens, tl_loops
model = tl_loops.LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny")
tokens = torch.zeros(1, 16, dtype=torch.long)
start = time.perf_counter()
{}
print(time.perf_counter() - start)
"""
FIRST_CALLS = {
    "model(tokens)": "model(tokens)",
    "measure": 'tl_loops.measure(model, [tokens[0]], "sink_rate", progress=False)',
    "coda_lens": "from tl_loops import lens; lens.coda_lens(model, tokens)",
}


def least(code: str, runs: int) -> float:
    """The least number that a program prints in several runs."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    printed = [subprocess.run(command, capture_output=True, text=True, check=True).stdout
               for _ in range(runs)]  # fmt: skip
    return min(float(text.split()[-1]) for text in printed)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    theirs = least(IMPORT.format("transformer_lens"), runs)
    both = least(IMPORT.format("transformer_lens, tl_loops; tl_loops.LoopedTransformer"), runs)
    print(f"import tl_loops, beyond transformer_lens ({theirs:.2f} s): {both - theirs:.2f} s")
    for name, call in FIRST_CALLS.items():
        print(f"first call of {name} after import: {least(FIRST.format(call), runs):.2f} s")
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "tl_loops", "--help"], capture_output=True, check=True
        )
        times.append(time.perf_counter() - start)
    print(f"tl-loops --help: {min(times):.2f} s")


if __name__ == "__main__":
    main()
