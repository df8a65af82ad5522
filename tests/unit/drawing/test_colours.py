"""Colours are read on light and on dark pages, and by eyes without red or green cones."""

import itertools

import numpy as np
import pytest

from tl_loops.drawing import colours

PAGES = {
    "white": "#ffffff",
    "light card": "#f6f8fa",
    "dark page": "#0d1117",
    "dark card": "#161b22",
    "plotly_dark": "#111111",
}

# Machado, Oliveira and Fernandes 2009 (doi 10.1109/TVCG.2009.113), severity 1, on linear RGB.
EYES = {
    "three cones": np.eye(3),
    "no red cones": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]]
    ),
    "no green cones": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
         [-0.011820, 0.042940, 0.968881]]
    ),
}  # fmt: skip
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(first: str, second: str) -> float:
    """Of WCAG 2, from 1 to 21."""
    low, high = sorted(float(linear(c) @ TO_XYZ[1]) for c in (first, second))
    return (high + 0.05) / (low + 0.05)


def distance(first: str, second: str, eyes: np.ndarray) -> float:
    """CIE 1976 distance of two colours as such eyes see them; about 2 is just noticed."""

    def lab(colour: str) -> np.ndarray:
        xyz = TO_XYZ @ np.clip(eyes @ linear(colour), 0, 1) / np.array([0.9505, 1.0, 1.089])
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    return float(np.linalg.norm(lab(first) - lab(second)))


def test_the_measures_are_those_of_their_standards():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#f0c808", "#ffffff") == pytest.approx(1.62, abs=0.01)  # a yellow curve
    assert distance("#ffffff", "#000000", EYES["three cones"]) == pytest.approx(100, abs=0.1)
    red, green = "#b02020", "#2e6b00"  # which eyes without green cones mix up
    near, far = (distance(red, green, EYES[e]) for e in ("no green cones", "three cones"))
    assert near < far / 3


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())
def test_every_colour_of_a_curve_has_contrast_on_every_page(page):
    single = [colours.PRELUDE, colours.CODA, colours.REFERENCE, colours.MUTED, *colours.DISTINCT]
    for n in (1, 2, 3, 8, 64, 128):
        single += colours.iteration_colours(n) + colours.layer_colours(n)
    assert {c: contrast(c, page) for c in single if contrast(c, page) < 3} == {}


@pytest.mark.parametrize("eyes", EYES.values(), ids=EYES.keys())
def test_colours_of_one_figure_differ_for_all_eyes(eyes):
    def nearest(chosen):
        return min(distance(a, b, eyes) for a, b in itertools.combinations(chosen, 2))

    assert nearest(colours.DISTINCT) > 12
    assert nearest(colours.iteration_colours(8)) > 5
    assert nearest(colours.layer_colours(8)) > 5
    for ramp in (colours.iteration_colours(8), colours.layer_colours(8)):
        # Farther along the ramp is farther in colour.
        from_first = [distance(ramp[0], c, eyes) for c in ramp]
        assert all(np.diff(from_first) > 0)
        assert from_first[-1] > 35


@pytest.mark.parametrize("scales", [colours.SCALES, colours.ON_DARK])
@pytest.mark.parametrize("eyes", EYES.values(), ids=EYES.keys())
def test_numbers_of_a_scale_differ_for_all_eyes(scales, eyes):
    for stops in scales.values():
        places = [place for place, _ in stops]
        assert places[0] == 0 and places[-1] == 1 and places == sorted(places)
        assert min(
            distance(a, b, eyes) for (_, a), (_, b) in itertools.combinations(stops, 2)
        ) > 10  # fmt: skip


def test_nothing_is_the_colour_of_the_page():
    for scales, page in ((colours.SCALES, "#ffffff"), (colours.ON_DARK, "#161b22")):
        nothing, most = scales["weights"][0][1], scales["weights"][-1][1]
        assert contrast(nothing, page) < 1.2 and contrast(most, page) > 7
        assert contrast(scales["diverging"][2][1], page) < 1.2


@pytest.mark.parametrize("scales", [colours.SCALES, colours.ON_DARK], ids=["light", "dark"])
@pytest.mark.parametrize("name", colours.SCALES)
def test_words_on_every_colour_of_a_scale_can_be_read(scales, name):
    stops = scales[name]
    assert [place for place, _ in stops][:: len(stops) - 1] == [0, 1]
    for place in np.linspace(0, 1, 301):
        after = max(1, int(np.searchsorted([at for at, _ in stops], place)))
        (low, first), (high, last) = stops[after - 1 : after + 1]
        ground = colours.colour_at((first, last), (place - low) / (high - low))
        assert contrast(colours.ink_on(stops, float(place)), ground) >= 4.5, (place, ground)
    assert colours.ink_on(stops, -3.0) == colours.ink_on(stops, 0.0)
    assert colours.ink_on(stops, 3.0) == colours.ink_on(stops, 1.0)
