"""Heatmaps: every cell has its number, NaN is said, text is escaped."""

import re

import pytest
import torch

from tl_loops.plots import Heatmap


def heatmap(values, **changes):
    values = torch.as_tensor(values)
    rows, columns = ([f"{a}{i}" for i in range(n)] for a, n in zip("rc", values.shape, strict=True))
    return Heatmap(values, rows, columns, "title", "rows", "columns", **changes)


def colours(html: str) -> list[str]:
    return re.findall(r"background:(#[0-9a-f]{6});", html)


def test_every_cell_says_where_it_is_and_what_it_holds():
    html = heatmap([[0.0, 0.25], [0.5, 1.0]], unit="nats").to_html()
    for text in ("r0, c1: 0.25", "r1, c0: 0.5", "r1, c1: 1", "nats", ">0.25<"):
        assert text in html
    assert colours(html)[0] == "#440154"
    assert colours(html)[-1] == "#fde725"


def test_a_diverging_scale_is_white_at_zero():
    html = heatmap([[-2.0, 0.0, 1.0]], scale="diverging").to_html()
    first, middle, last = colours(html)
    assert middle == "#f7f7f7"
    assert first == "#b2182b"
    assert last not in (middle, "#2166ac")  # 1 is half of the way to 2


def test_undefined_cells_and_constant_or_empty_data():
    html = heatmap([[float("nan"), 1.0]]).to_html()
    assert "r0, c0: undefined" in html
    assert heatmap([[3.0, 3.0]]).bounds() == (3.0, 4.0)
    assert heatmap([[float("nan")]]).bounds() == (0.0, 1.0)
    assert "undefined" in heatmap([[float("nan")]]).to_html()


def test_text_is_escaped():
    figure = Heatmap(torch.zeros(1, 1), ["<r>"], ['"c"'], "<script>alert(1)</script>", "a", "b")
    html = figure.to_html()
    assert "<script>" not in html
    assert "&lt;r&gt;" in html
    assert 'title="&lt;r&gt;, &quot;c&quot;: 0"' in html


def test_shapes_and_scales_are_checked():
    with pytest.raises(ValueError, match="do not fit 1 rows and 1 columns"):
        Heatmap(torch.zeros(2, 1), ["r"], ["c"], "t", "a", "b")
    with pytest.raises(ValueError, match="scale must be one of sequential, diverging"):
        heatmap([[1.0]], scale="rainbow")
