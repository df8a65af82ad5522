"""Do the stages go when massive activations are taken away? (2604.11791, appendix E.3)

    python demos/findings/massive.py [--quick]

Massive activations are found by the published criterion (above 100, and 1,000 times the median;
2402.17762), and the blocks that make them. Then the MLP of one block at a time adds nothing, as the
paper does it: what becomes of the sinks and of the low entropy? All other blocks are the control. A
model without massive activations gives up its own largest entries. SmolLM2 is measured where it is
installed.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from finding import bootstrap
from finding import main as run_finding
from stages import METRICS, of_prompt
from subjects import Subject, subjects, zero
from torch import Tensor

from tl_loops.patching import ablate_massive, find_massive_sites
from tl_loops.patching.ablation import MassiveSite
from tl_loops.plots import plot_curves

CRITERION = dict(magnitude=100, ratio=1000)
METHODS = ("zero", "mlp_pos", "mlp")


def largest_entry(subject: Subject, tokens: Tensor) -> tuple[float, MassiveSite]:
    """The entry of any block's output that is largest beside the median there, and its ratio."""
    model = subject.model
    _, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("resid_post"))
    streams = torch.stack([cache["resid_post", block][0] for block in range(model.cfg.n_layers)])
    size = streams.abs()
    ratio = size / size.flatten(1).median(-1).values[:, None, None]
    block, pos, dim = (int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
    value = float(streams[block, pos, dim])
    return float(ratio.max()), MassiveSite(block, model.layout.label(block), 0, pos, dim, value)


def sites_of(subject: Subject) -> tuple[bool, list[list[MassiveSite]]]:
    """Whether there are massive activations, and the sites of each prompt; else its largest entry.

    Sites of the embedding are left out, since no block makes them.
    """
    found = [
        [site for site in find_massive_sites(subject.model, tokens, **CRITERION) if site.block >= 0]
        for tokens in subject.prompts
    ]
    if any(found):
        return True, found
    return False, [[largest_entry(subject, tokens)[1]] for tokens in subject.prompts]


def measured(subject: Subject, block: int | None) -> Tensor:
    """Stages, averaged over blocks, and the loss of each prompt, [prompt, metric].

    Args:
        subject: The model.
        block: Whose MLP adds nothing; ``None``: the plain model.
    """
    model = subject.model
    hooks = [] if block is None else [(f"blocks.{block}.hook_mlp_out", zero)]
    rows = []
    with model.hooks(fwd_hooks=hooks) if hooks else nullcontext():
        for i, tokens in enumerate(subject.prompts):
            found, logits = of_prompt(model, tokens)
            rows.append(torch.cat([found.mean(1), subject.loss(logits, i)[None]]))
    return torch.stack(rows)


def by_block(subject: Subject, block: int | None, seed: int) -> dict[str, dict[str, Tensor]]:
    """The stages of every block with intervals over prompts."""
    model = subject.model
    hooks = [] if block is None else [(f"blocks.{block}.hook_mlp_out", zero)]
    with model.hooks(fwd_hooks=hooks) if hooks else nullcontext():
        found = torch.stack([of_prompt(model, tokens)[0] for tokens in subject.prompts])
    return {name: bootstrap(found[:, i], seed=seed) for i, name in enumerate(METRICS)}


def of_model(subject: Subject, most: int | None, seed: int) -> dict[str, Any]:
    """Sites, losses without them, and the stages without each of the first ``most`` MLPs."""
    massive, sites = sites_of(subject)
    blocks = sorted({site.block for of in sites for site in of})
    plain = measured(subject, None)
    losses = {}
    for method in METHODS:
        rows = []
        for i, (tokens, of) in enumerate(zip(subject.prompts, sites, strict=True)):
            if of:
                loss = partial(subject.loss, prompt=i)
                without = ablate_massive(
                    subject.model, tokens, loss, of, method, together=True, progress=False
                )
                rows.append(without[0] - plain[i, -1])
        losses[method] = bootstrap(torch.stack(rows), seed=seed)
    names = (*METRICS, "loss")
    every = {}
    for block in range(subject.model.cfg.n_layers)[:most]:
        change = bootstrap(measured(subject, block) - plain, seed=seed)
        every[block] = {
            name: {key: value[i] for key, value in change.items()} for i, name in enumerate(names)
        }
    maker = max(blocks, key=lambda b: sum(site.block == b for of in sites for site in of))
    layout = subject.model.layout
    return {
        "massive": massive,
        "n_sites": sum(map(len, sites)),
        "n_prompts": len(sites),
        "largest_ratio": max(largest_entry(subject, tokens)[0] for tokens in subject.prompts),
        "made_by": [layout.label(block) for block in blocks],
        "most_are_made_by": maker,
        "positions": sorted({site.pos for of in sites for site in of}),
        "dimensions": sorted({site.dim for of in sites for site in of}),
        "plain": {name: bootstrap(plain[:, i], seed=seed) for i, name in enumerate(names)},
        "change_of_loss_by_method": losses,
        "change_by_block": every,
        "stages": {
            "plain": by_block(subject, None, seed),
            "without": by_block(subject, maker, seed),
        },
    }


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """Every model."""
    models, skipped = subjects(quick, 2 if quick else 8, seed)
    with torch.no_grad():
        found = {
            name: of_model(subject, 2 if quick else None, seed) for name, subject in models.items()
        }
    return {"criterion": CRITERION, "models": found, "skipped": skipped}


def draw(results: dict[str, Any]) -> Any:
    """Sink rate and residual entropy by block, with and without, in the last of the models."""
    name, of = list(results["models"].items())[-1]
    curves, bands = {}, {}
    for which, stages in of["stages"].items():
        for metric in ("sink_rate", "residual_entropy"):
            label = f"{metric.replace('_', ' ')}, {which}"
            curves[label] = torch.tensor(stages[metric]["mean"])
            high, low = (torch.tensor(stages[metric][key]) for key in ("high", "low"))
            bands[label] = (high - low) / 2
    return plot_curves(
        curves,
        f"{name} with and without the MLP of block {of['most_are_made_by']}",
        x=list(range(len(next(iter(curves.values()))))),
        x_label="block",
        y_label="value",
        std=bands,
        bounds=(0, 1),
        backend="matplotlib",
    )


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    return run_finding("massive", __doc__.splitlines()[0], measure, draw, given)


if __name__ == "__main__":
    main()
