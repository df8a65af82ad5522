"""A figure as data, the two renderers that draw it, and what all figures share."""
