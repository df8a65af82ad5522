"""The exceptions that tl_loops raises on purpose."""

import difflib
from collections.abc import Iterable


class LoopedSemanticsError(NotImplementedError):
    """A tool has no exact meaning on this looped model; the message says what to call instead."""


class ConfigError(ValueError):
    """A configuration contradicts itself, lacks a field, or asks for what is not supported."""


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded exactly; the message names file, key, expected and found."""


class UnknownModelError(ValueError):
    """A model name is neither a known looped model nor a local checkpoint directory."""


def did_you_mean(
    name: str,
    known: Iterable[str],
    otherwise: str | None = None,
    *,
    quoted: bool = False,
    cutoff: float = 0.6,
) -> str:
    """What a message says after a name that is not known.

    Args:
        name: What was given.
        known: The names that there are.
        otherwise: What to say where none is near; ``None``: all names.
        quoted: Whether the names are shown in quotes.
        cutoff: How near a name must be, from 0 to 1.

    Returns:
        ``"did you mean a, b?"``, or ``otherwise``, or ``"known: a, b"``.
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=cutoff)
    show = repr if quoted else str
    if near:
        return f"did you mean {', '.join(map(show, near))}?"
    return f"known: {', '.join(names)}" if otherwise is None else otherwise
