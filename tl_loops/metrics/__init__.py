"""Measurements on tensors: pure functions that know no model."""
