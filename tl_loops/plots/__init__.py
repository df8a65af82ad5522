"""Figures from results; nothing here runs a model, shows a figure or writes a file."""

from tl_loops.plots.attention import AttentionView, attention_view
from tl_loops.plots.heatmap import Heatmap

__all__ = ["AttentionView", "Heatmap", "attention_view"]
