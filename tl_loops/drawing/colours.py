"""Colours of all figures: the conventions of arXiv 2604.11791, and two scales for numbers."""

from collections.abc import Sequence

ITERATIONS = ("#00643c", "#5a9f2a", "#b4bf1c", "#f0c808")
"""Green to yellow, from the first iteration to the last."""

LAYERS = ("#2438c8", "#1b83bd", "#12a86b")
"""Blue to green, from the first layer of the core to the last."""

PRELUDE = "#7b4ea3"
CODA = "#c2542d"
REFERENCE = "#222222"
"""A feedforward model, or what else curves are compared with."""
MUTED = "#8a8f98"
"""Lines that only connect."""

DISTINCT = ("#1f6fb4", "#d1642b", "#2c8c4e", "#b13a77", "#7b5cc4", "#8a6d1d", "#2a9aa5", "#6b6f76")
"""Curves that have no order."""

SCALES = {
    # Perceptually even, from dark to light (values), and red-white-blue (signed effects).
    "sequential": ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725"),
    "diverging": ("#b2182b", "#ef8a62", "#f7f7f7", "#67a9cf", "#2166ac"),
}
"""Scales for numbers by name, as colours at even steps."""


def iteration_colours(n_iterations: int) -> list[str]:
    """One colour per iteration, green to yellow."""
    return ramp(ITERATIONS, n_iterations)


def layer_colours(n_layers: int) -> list[str]:
    """One colour per layer, blue to green."""
    return ramp(LAYERS, n_layers)


def ramp(stops: Sequence[str], n: int) -> list[str]:
    """Colours at ``n`` even steps along a scale; the middle one for a single step."""
    return [colour_at(stops, i / (n - 1) if n > 1 else 0.5) for i in range(n)]


def colour_at(stops: Sequence[str], place: float | int) -> str:
    """Colour at a place from 0 to 1 of a scale."""
    place = min(max(float(place), 0.0), 1.0) * (len(stops) - 1)
    first = min(int(place), len(stops) - 2)
    mixed = [
        round(a + (b - a) * (place - first))
        for a, b in zip(_channels(stops[first]), _channels(stops[first + 1]), strict=True)
    ]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def is_dark(colour: str) -> bool:
    """Whether light text reads better on a colour than dark text."""
    red, green, blue = _channels(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue < 128


def _channels(colour: str) -> list[int]:
    return [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
