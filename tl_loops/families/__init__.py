"""Model families: how released checkpoints map onto the architecture as data."""
