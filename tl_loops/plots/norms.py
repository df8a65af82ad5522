"""Residual magnitudes along the unrolled depth."""

from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.drawing.colours import DISTINCT
from tl_loops.drawing.depth import block_values, depth_axis, iteration_rules, phase_spans
from tl_loops.drawing.draw import draw
from tl_loops.drawing.figure import Figure, Line, Mark, Panel, as_array
from tl_loops.drawing.quantities import LENGTH
from tl_loops.drawing.subject import subject_of
from tl_loops.errors import shortened
from tl_loops.layout.model import Model
from tl_loops.measurements.figure import profile_panel
from tl_loops.measurements.profile import LoopProfile
from tl_loops.upstream import PromptsShown

_CURVES = ("first token", "largest of the others", "mean of the others")


@checked
def plot_residual_norms(
    source: LoopProfile | Float[Tensor, "block *batch pos d_model"] | Any,
    *,
    std: bool = False,
    model: Model | str | None = None,
    prompts: PromptsShown | None = None,
    title: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    """Length of the residual stream after each block (arXiv 2604.11791, Fig. 9).

    Of a cache or a tensor the first token stands apart, on which massive activations sit, from the
    mean and the largest of the others; of a profile there is the mean over tokens
    (``residual_norm``).

    Args:
        source: A profile; an activation cache with ``resid_post`` of all blocks; or the residual
            stream [block, ..., pos, d_model]. Prompts must not be padded; they are averaged.
        std: Whether a band shows one standard deviation over prompts (of a profile).
        model: Model or its name, where the source is a tensor.
        prompts: Their number or text.
        title: In place of the general one.
        backend: See :func:`tl_loops.plots.draw`.
        **options: ``width``, ``height``, and what the library takes.

    Returns:
        A figure of the library, with a logarithmic axis.

    Raises:
        ValueError: The profile lacks ``residual_norm``, or the cache the stream.
        ImportError: The library is missing.
    """
    subject = subject_of(source, model=model, prompts=prompts)
    legend = ""
    if isinstance(source, LoopProfile):
        panel = profile_panel(source, "residual_norm", "unrolled", std, log=True)
    else:
        if hasattr(source, "cache_dict"):
            source = block_values(source, "resid_post")
        panel = _of_streams(source, subject.layout)
        legend = "token"
    figure = Figure(
        title or "Length of the residual stream after each block",
        subject.line(complete=title is None),
        (panel,),
        legend=legend,
    )
    return draw(figure, backend, **options)


def _of_streams(resid: Tensor, layout: Any) -> Panel:
    if not isinstance(resid, Tensor):
        raise TypeError(
            "source must be a profile, a cache or a tensor [block, ..., pos, d_model], got "
            f"{shortened(resid)}"
        )
    if resid.ndim < 3:
        raise ValueError(
            f"source has shape {list(resid.shape)}, expected [block, ..., pos, d_model]"
        )
    n_blocks, n_pos = resid.shape[0], resid.shape[-2]
    layout = layout if layout is not None and layout.n_layers == n_blocks else None
    norms = as_array(resid.detach().float().norm(dim=-1).unsqueeze(1).flatten(1, -2))
    x = np.arange(n_blocks, dtype=np.float64)
    marks: list[Mark] = [*phase_spans(layout), *iteration_rules(layout)]
    if n_pos and norms.shape[1]:
        others = norms[..., 1:]
        curves = [norms[..., 0].mean(1)]
        if n_pos > 1:
            curves += [others.max(-1).mean(1), others.mean((-2, -1))]
        for name, colour, values in zip(_CURVES, DISTINCT, curves, strict=False):
            marks.append(Line(x, values, name, colour))
    return Panel(tuple(marks), depth_axis(layout, n_blocks), LENGTH)
