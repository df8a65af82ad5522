"""Running a model for an analysis: inputs, batches, cells, and files that survive a kill."""
