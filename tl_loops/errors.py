"""The exceptions that tl_loops raises on purpose, and the names that a message suggests."""

import difflib
from collections.abc import Iterable


class LoopedSemanticsError(NotImplementedError):
    """A tool has no exact meaning on this looped model; the message says what to call instead."""


class ConfigError(ValueError):
    """A configuration contradicts itself, lacks a field, or asks for what is not supported."""


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded exactly; the message names file, key, expected and found."""


class NoLoopError(TypeError, ValueError):
    """What was asked for needs a loop, and the model has none."""


class UnknownModelError(ValueError):
    """A model name is neither a known looped model nor a local checkpoint directory."""


def did_you_mean(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """The end of a message about an unknown name: near matches, or what is known.

    Args:
        name: What was given; letters' case does not matter.
        known: The names that exist.
        otherwise: Said where nothing is near; ``None``: all known names.

    Returns:
        ``"did you mean resid_pre, resid_post?"`` or ``"known: resid_pre, ..."``.
    """
    names = list(known)
    by_lower = {other.lower(): other for other in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(by_lower[match] for match in near)}?"
    return f"known: {', '.join(names) or 'none'}" if otherwise is None else otherwise
