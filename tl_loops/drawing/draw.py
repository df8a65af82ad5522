"""From a figure as data to one of plotly or of matplotlib; neither is needed to import this."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

from tl_loops.arguments import checked
from tl_loops.drawing.explained import explained
from tl_loops.drawing.figure import Figure
from tl_loops.drawing.limits import with_limits
from tl_loops.drawing.sizes import size_in_pixels

Backend = Literal["plotly", "matplotlib"]
# "page" is the report's own: data that its script draws.
_RENDERERS = {
    "plotly": "tl_loops.drawing.plotly_figure",
    "matplotlib": "tl_loops.drawing.matplotlib_figure",
    "page": "tl_loops.drawing.page_figure",
}


@checked
def draw(figure: Figure, backend: str | None = None, **options: Any) -> Any:
    """Draw a figure; nothing is shown or written.

    Args:
        figure: What to draw.
        backend: ``"plotly"`` (interactive) or ``"matplotlib"`` (static, for papers and for pages
            that run no script); ``None``: plotly where it is installed.
        **options: ``width`` and ``height`` of the whole figure in pixels (a narrow one has fewer
            panels in a row), and ``dark=True`` for a dark page. Everything else goes on: to
            ``update_layout`` of plotly, to ``matplotlib.figure.Figure`` of matplotlib.

    Returns:
        A ``plotly.graph_objects.Figure`` or a ``matplotlib.figure.Figure``.

    Raises:
        ValueError: Unknown backend, or a size that is none.
        ImportError: The library is missing.
    """
    for name in ("width", "height"):
        if options.get(name) is not None:
            options[name] = size_in_pixels(name, options[name])
    if backend is None:
        backend = "plotly" if find_spec("plotly") else "matplotlib"
    if backend not in _RENDERERS:
        raise ValueError(f"backend={backend!r}, expected 'plotly', 'matplotlib' or None")
    try:
        renderer = import_module(_RENDERERS[backend])
    except ImportError as error:
        raise ImportError(
            f"backend={backend!r} needs a library that is missing ({error}): "
            "pip install 'tl-loops[plots]'"
        ) from error
    return renderer.render(with_limits(explained(figure)), **options)
