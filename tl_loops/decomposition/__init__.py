"""The residual stream of a cached run as a sum over its components."""
