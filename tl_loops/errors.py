"""The exceptions that tl_loops raises on purpose."""


class LoopedSemanticsError(NotImplementedError):
    """A tool has no exact meaning on this looped model; the message says what to call instead."""


class ConfigError(ValueError):
    """A configuration contradicts itself, lacks a field, or asks for what is not supported."""


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded exactly; the message names file, key, expected and found."""


class UnknownModelError(ValueError):
    """A model name is neither a known looped model nor a local checkpoint directory."""
