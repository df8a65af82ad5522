"""The loop as a map, its gradients and its geometry: what one prompt, or all, say of iterations."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tl_loops import plots
from tl_loops.attribution import iteration_gradients
from tl_loops.dynamics import (
    iteration_jacobians,
    kernel_alignment,
    key_value_spectra,
    run_exponents,
)
from tl_loops.layout.model import Model
from tl_loops.measurements.profile import LoopProfile
from tl_loops.report.measurements import PATHS
from tl_loops.report.section import Section, answer_token, columns, last_tokens, page_figure
from tl_loops.tasks.prompts import PromptText

_MOST_ITERATIONS = 3
_MOST_GRADIENT_ENTRIES = 400_000_000
_MOST_PROMPTS = 64
_PRODUCTS = 64


def loop_map_section(model: Model, profile: LoopProfile, prompt: PromptText) -> Section:
    """How small changes of the last token's state grow, and how the state moves."""
    T = model.cfg.n_iterations
    tokens = last_tokens(model, prompt.text)[0]
    chosen = sorted({round(i * (T - 1) / (_MOST_ITERATIONS - 1)) for i in range(_MOST_ITERATIONS)})
    found = iteration_jacobians(model, tokens, chosen, pos=-1, krylov_dim=_PRODUCTS, n_probes=8)
    exponent = float(run_exponents(model, tokens).exponents[0])
    last = found.spectra[-1]
    radius = f", at a spectral radius of {last.spectral_radius:.2f} for the last token's state"
    verdict = "grow" if exponent > 0 else "shrink"
    finding = (
        f"Small changes {verdict} along the loop: the largest exponent is {exponent:.2f} nats per "
        f"iteration{radius if last.converged else ''}."
    )
    paragraphs = [
        finding,
        "The Jacobian of an iteration at the state of the last token, the other tokens held: the "
        f"spectral radius (gaps: not found within {_PRODUCTS} products), and its Frobenius norm "
        "over the root of the number of dimensions, which is how much a random small change is "
        "stretched.",
    ]
    if T > 1 and {*PATHS} <= {*profile.metrics}:
        radial, tangential = (float(profile.by_iteration(name)[-1, -1]) for name in PATHS[:2])
        efficiency = float(profile.by_iteration(PATHS[2])[-1, -1])
        paragraphs.append(
            f"In the last step the state moves by {radial:.3g} along itself and by "
            f"{tangential:.3g} across; the whole path is {efficiency:.2f} of a straight line."
        )
    curves = {
        "spectral radius": found.spectral_radius,
        "root-mean-square stretch": torch.tensor([norm.rms_stretch for norm in found.norms]),
    }
    figure = page_figure(
        plots.plot_curves,
        curves,
        "Jacobian of an iteration",
        x=chosen,
        x_label="iteration",
        y_label="factor",
        model=model,
        prompts=prompt.text,
    )
    return Section("loop-map", "The loop as a map", paragraphs, [figure], finding=finding)


def gradients_section(model: Model, prompt: PromptText) -> Section | None:
    """Through which iterations a loss pulls the weights; ``None`` where that takes much memory."""
    layout, T = model.layout, model.cfg.n_iterations
    core = {
        id(p): p.numel()
        for block in model.blocks[layout.core_start : layout.coda_start]
        for p in block.parameters()
    }
    if T < 2 or sum(core.values()) * T > _MOST_GRADIENT_ENTRIES:
        return None
    tokens, answer = last_tokens(model, prompt.text), answer_token(model, prompt.answer)
    if answer is None and tokens.shape[1] < 2:
        return None

    def loss(logits: Tensor) -> Tensor:
        wide = logits[0].float().log_softmax(-1)
        if answer is not None:
            return -wide[-1, answer]
        return -wide[:-1].gather(-1, tokens[0, 1:, None].to(wide.device)).mean()

    found = iteration_gradients(model, tokens, loss)
    norms, cosines = found.norms().cpu(), found.cosines().cpu()
    strongest = int(norms.argmax())
    apart = cosines[~torch.eye(T, dtype=torch.bool)].nanmean()
    what = "of the answer" if answer is not None else "of the next token"
    finding = (
        f"The loss {what} pulls the core's weights most through iteration {strongest}; the "
        f"iterations' gradients have a mean cosine of {float(apart):.2f}."
    )
    figures = [
        page_figure(
            plots.plot_curves,
            {"norm": norms},
            "Gradient of the core's weights through each iteration",
            y_label="L2 norm",
            model=model,
            prompts=prompt.text,
        ),
        page_figure(
            plots.plot_matrix,
            cosines,
            [str(t) for t in range(T)],
            [str(t) for t in range(T)],
            "Cosine between iterations' gradients",
            row_label="iteration",
            column_label="iteration",
            unit="cosine",
            scale="diverging",
            limits=(-1, 1),
            model=model,
            prompts=prompt.text,
        ),
    ]
    text = (
        "The gradient of a shared weight is a sum over its uses; here each iteration's part, from "
        "one backward pass (arXiv 2602.10097)."
    )
    made = columns(figures)
    return Section("gradients", "Gradients by iteration", [finding, text], [made], finding=finding)


def geometry_section(model: Model, texts: Sequence[str]) -> Section | None:
    """How alike the iterations' geometry is, and how many directions keys and values take."""
    T = model.cfg.n_iterations
    if T < 2:
        return None
    some = texts[:_MOST_PROMPTS]
    found = kernel_alignment(model, some)
    spectra = key_value_spectra(model, some)
    ends = float(found.matrix[0, -1])
    ranks = [torch.stack(list(spectra.effective_rank(what).values())).mean() for what in ("k", "v")]
    most = max(values.shape[-1] for values in spectra.singular_values["k"].values())
    finding = (
        f"The first and the last state have a kernel alignment of {ends:.2f}; keys of all "
        f"iterations together take {float(ranks[0]):.1f} of {most} directions per head, values "
        f"{float(ranks[1]):.1f}."
    )
    figure = page_figure(
        plots.plot_matrix,
        found.matrix,
        [str(t) for t in range(T)],
        [str(t) for t in range(T)],
        "Linear kernel alignment of the states",
        row_label="iteration",
        column_label="iteration",
        unit="alignment",
        limits=(_two_digits_below(found.matrix), 1),
        model=model,
        prompts=len(some),
    )
    text = (
        "1 where two iterations' states of all tokens differ by a rotation and a scale at most "
        "(arXiv 1905.00414). Directions: effective rank of a head's keys (or values) of all "
        "iterations side by side."
    )
    return Section(
        "geometry",
        "Geometry between iterations",
        [finding, text],
        [figure],
        finding=finding,
    )


def _two_digits_below(values: Tensor) -> float:
    """Where a scale begins whose values may all be near 1."""
    return min(0.99, max(0.0, math.floor(100 * float(values.min())) / 100))
