"""Attention patterns: all of them on one page, and the core's in detail."""

from jaxtyping import Int
from torch import Tensor

from tl_loops import plots
from tl_loops.cache.cache import LoopedActivationCache
from tl_loops.layout.model import Model
from tl_loops.report.section import Section, as_text, html_figure, page_figure

_ATTENTION_BYTES = 1_200_000
_BYTES_A_WEIGHT = 6
_FLOORPLAN_WEIGHTS = 160_000
_MOST_VIEWS = 4


def floorplan_section(model: Model, cache: LoopedActivationCache, prompt: str) -> Section:
    """Every pattern of the model at once."""
    layout = model.layout
    n_pos = cache["pattern", 0].shape[-1]
    n_tiles = layout.n_layers * model.cfg.n_heads
    heads = "all" if n_tiles * min(n_pos, 24) ** 2 <= _FLOORPLAN_WEIGHTS else "mean"
    n_tiles = n_tiles if heads == "all" else layout.n_layers
    tile = min(n_pos, max(2, int((_FLOORPLAN_WEIGHTS / n_tiles) ** 0.5)))
    figure = page_figure(plots.plot_floorplan, cache, heads=heads, tile=tile, prompts=prompt)
    text = (
        "Each square is one attention pattern, queries from top to bottom and keys from left to "
        "right; a column is an unrolled block"
        + (", a row per head." if heads == "all" else ", averaged over its heads.")
        + (
            f" {n_pos} tokens are shown in {tile} pixels by the largest weight in each."
            if tile < n_pos
            else ""
        )
    )
    return Section("floorplan", "The looped floorplan", [text], [figure])


def attention_section(
    model: Model, tokens: Int[Tensor, "1 pos"], cache: LoopedActivationCache
) -> Section:
    """Attention patterns of the core, drawn by circuitsvis, one view per iteration."""
    words, cfg = model.to_str_tokens(tokens[0]), model.cfg
    weights = cfg.n_core * cfg.n_heads * len(words) ** 2
    room = max(1, _ATTENTION_BYTES // _BYTES_A_WEIGHT)
    n_views = min(cfg.n_iterations, max(2, min(_MOST_VIEWS, room // weights)))
    chosen = sorted(
        {round(i * (cfg.n_iterations - 1) / max(1, n_views - 1)) for i in range(n_views)}
    )
    n_heads = max(1, min(cfg.n_heads, room // (len(chosen) * cfg.n_core * len(words) ** 2)))
    view = plots.attention_heads(cache, words, iterations=chosen, heads=range(n_heads), width=500)
    left_out = []
    if len(chosen) < cfg.n_iterations:
        left_out.append(f"iterations {', '.join(map(str, chosen))} of {cfg.n_iterations}")
    if n_heads < cfg.n_heads:
        left_out.append(f"the first {n_heads} of {cfg.n_heads} heads per layer")
    text = [
        f"The prompt is “{as_text(model, tokens)}”. r3.0H2 is iteration 3, layer 0, head 2. Click "
        "a head to enlarge it; point at a token to see where it looks."
    ]
    if left_out:
        text.append("To keep the page small it shows " + " and ".join(left_out) + ".")
    return Section(
        "attention",
        "Attention patterns",
        text,
        [html_figure("Attention heads by iteration", view.element())],
    )
