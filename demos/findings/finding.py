"""What every finding has in common: its command line, its file of results, its intervals."""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_loops import LoopedTransformer, LoopedTransformerConfig

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PICTURES = HERE.parents[1] / "docs" / "images" / "findings"


class SkippedError(RuntimeError):
    """A finding needs what is not installed; the message says what."""


Measure = Callable[[bool, int], dict[str, Any]]
Draw = Callable[[dict[str, Any]], Any]


def main(name: str, about: str, measure: Measure, draw: Draw, given: Sequence[str] | None) -> dict:
    """Measure a finding, write its results, and draw it.

    Args:
        name: Of the script; its results are ``results/NAME.json``, its picture ``NAME.png``.
        about: One line for ``--help``.
        measure: Takes whether the run is quick, and the seed.
        draw: Takes the results, and gives a matplotlib figure.
        given: Arguments of the command line; ``None``: those of the process.

    Returns:
        The results.

    Raises:
        SkippedError: Something that it needs is not installed; nothing is written. On the command
            line the reason is printed.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="seconds, on fewer cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    parser.add_argument("--redraw", action="store_true", help="draw the results that are there")
    options = parser.parse_args(given)
    path = options.out / f"{name}.json"
    if options.redraw:
        results = json.loads(path.read_text())
    else:
        torch.set_num_threads(1)
        began = time.monotonic()
        try:
            found = measure(options.quick, options.seed)
        except SkippedError as reason:
            if given is not None:
                raise
            parser.exit(0, f"skipped: {reason}\n")
        results = {
            "command": f"python demos/findings/{name}.py" + (" --quick" if options.quick else ""),
            "seed": options.seed,
            "seconds": round(time.monotonic() - began, 1),
            "torch": torch.__version__,
            "machine": platform.machine(),
            **rounded(found),
        }
        options.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    options.pictures.mkdir(parents=True, exist_ok=True)
    figure = draw(results)
    figure.savefig(options.pictures / f"{name}.png", dpi=110, bbox_inches="tight")
    return results


def rounded(value: Any, digits: int = 5) -> Any:
    """Numbers of a result to some significant digits, in JSON's types; NaN becomes ``None``."""
    if isinstance(value, Tensor):
        return rounded(value.tolist(), digits)
    if isinstance(value, dict):
        return {str(key): rounded(one, digits) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(one, digits) for one in value]
    if isinstance(value, float):
        return None if value != value else float(f"{value:.{digits}g}")
    return value


def bootstrap(values: Tensor, n_resamples: int = 1000, seed: int = 0) -> dict[str, Tensor]:
    """Mean over the first axis with a 95 % interval, by resampling that axis.

    Args:
        values: [sample, ...]; NaN is left out.
        n_resamples: Samples of the samples.
        seed: Of the draws.

    Returns:
        ``mean``, ``low`` and ``high``, each of the other axes.
    """
    generator = torch.Generator().manual_seed(seed)
    values = values.double()
    drawn = torch.randint(len(values), (n_resamples, len(values)), generator=generator)
    means = torch.stack([values[rows].nanmean(0) for rows in drawn])
    return {
        "mean": values.nanmean(0),
        "low": means.nanquantile(0.025, dim=0),
        "high": means.nanquantile(0.975, dim=0),
    }


def random_like(model: LoopedTransformer, seed: int) -> LoopedTransformer:
    """A model of the same architecture and tokenizer, with random weights."""
    cfg = LoopedTransformerConfig.from_dict({**model.cfg.to_dict(), "seed": seed})
    return LoopedTransformer(cfg, model.tokenizer)


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds, with the least and the largest."""
    found = [float(v) for v in values]
    return {"mean": sum(found) / len(found), "low": min(found), "high": max(found)}


def merged(runs: Sequence[Any]) -> Any:
    """Results of one shape from several seeds, as one: intervals become those over the seeds.

    Args:
        runs: One for each seed. Of an interval (``mean``, ``low`` and ``high``) the mean counts.

    Returns:
        The mean over seeds of every number; of an interval also the least and the largest. Lists
        and texts are those of the first seed.
    """
    first = runs[0]
    if isinstance(first, dict) and set(first) == {"mean", "low", "high"}:
        means = torch.stack([torch.as_tensor(run["mean"]).double() for run in runs])
        return {"mean": means.mean(0), "low": means.amin(0), "high": means.amax(0)}
    if isinstance(first, dict):
        return {key: merged([run[key] for run in runs]) for key in first}
    return sum(runs) / len(runs) if isinstance(first, float) else first
