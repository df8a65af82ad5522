"""Sides of a comparison that run in turn in one process, and the medians of their ratios."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def compare(
    sides: Mapping[str, Callable[[], object]], baseline: str, repeats: int, warm_up: int = 2
) -> dict[str, float]:
    """Run all sides in turn, print a line for each, and give their ratios to the baseline.

    A figure is the median of the ratios of neighbouring runs. With one thread the time is that of
    the processor, which other processes of the machine do not stretch.
    """
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    clock = time.process_time if torch.get_num_threads() == 1 and not on_gpu else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + warm_up):
        for name, run in sides.items():
            start = clock()
            run()
            if on_gpu:
                torch.cuda.synchronize()
            if repeat >= warm_up:
                times[name].append(clock() - start)
    ratios = {}
    for name, seconds in times.items():
        pairs = [a / b for a, b in zip(seconds, times[baseline], strict=True)]
        ratios[name] = statistics.median(pairs)
        print(
            f"{name:32s} median {1e3 * statistics.median(seconds):9.1f} ms, "
            f"{ratios[name]:6.3f} x {baseline}",
            flush=True,
        )
    return ratios
