"""Colours of all figures, and scales for numbers.

A curve is read on a white page as on a dark one, so every colour of a curve has a contrast (WCAG 2)
of at least 3 with both; and by readers who lack red or green cones, so colours of one figure also
differ in what such eyes see. Tests hold both.
"""

from collections.abc import Sequence

ITERATIONS = ("#227a80", "#177844", "#a88713")
"""Green to yellow as in arXiv 2604.11791, from the first iteration to the last."""

LAYERS = ("#5a55e8", "#1f7fc4", "#12a068")
"""Blue to green as there, from the first layer of the core to the last."""

PRELUDE = "#8f63c9"
CODA = "#cf5a2b"
REFERENCE = "#6b727c"
"""A feedforward model, or what else curves are compared with."""
MUTED = "#848a93"
"""Lines that only connect or part, and small text."""

DISTINCT = ("#1e6eb4", "#d26428", "#32a064", "#be3278", "#6478e6", "#a05a3c", "#3c96a0", "#fa5064")
"""Curves that have no order."""

SCALES = {
    # Perceptually even (values); red-white-blue (signed effects); and one whose colours change most
    # near 0, where most attention weights are.
    "sequential": ((0, "#440154"), (0.25, "#3b528b"), (0.5, "#21918c"), (0.75, "#5ec962"),
                   (1, "#fde725")),
    "diverging": ((0, "#b2182b"), (0.25, "#ef8a62"), (0.5, "#f7f7f7"), (0.75, "#67a9cf"),
                  (1, "#2166ac")),
    "weights": ((0, "#f7f8fa"), (0.04, "#cfe0ee"), (0.2, "#7fb3d8"), (0.5, "#2f7ab8"),
                (1, "#0a2f5c")),
}  # fmt: skip
"""Scales for numbers by name: places from 0 to 1 and their colours."""

ON_DARK = {
    "sequential": SCALES["sequential"],
    "diverging": ((0, "#ff8a80"), (0.25, "#a8443c"), (0.5, "#20262e"), (0.75, "#2f6c9e"),
                  (1, "#7cc4f5")),
    "weights": ((0, "#1b212a"), (0.04, "#24405a"), (0.2, "#2f74a6"), (0.5, "#63b0e3"),
                (1, "#e6f4ff")),
}  # fmt: skip
"""The same on a dark page, where the colour that says "nothing" is dark."""


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
    """Whether white text reads better on a colour than black; one has a contrast above 4.5."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (channel / 255 for channel in _channels(colour))
    ]
    luminance = sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return (1 + 0.05) / (luminance + 0.05) > (luminance + 0.05) / 0.05


def ink_on(stops: Sequence[tuple[float | int, str]], place: float) -> str:
    """Black or white: what is read on the colour at a place from 0 to 1 of one of the scales."""
    place = min(max(place, 0.0), 1.0)
    places = [at for at, _ in stops]
    after = next(i for i in range(1, len(stops)) if place <= places[i])
    (low, start), (high, stop) = stops[after - 1 : after + 1]
    return (
        "#ffffff" if is_dark(colour_at((start, stop), (place - low) / (high - low))) else "#000000"
    )


def _channels(colour: str) -> list[int]:
    return [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
