"""Arguments of ``from_pretrained`` that have another name here, or none."""

from collections.abc import Mapping
from typing import Any

from tl_loops.errors import did_you_mean

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")

_INSTEAD = {
    "torch_dtype": "pass dtype=...",
    "iterations": "pass n_iterations=...",
    "num_steps": "pass n_iterations=...",
    "n_loops": "pass n_iterations=...",
    "device_map": "pass device=...; tied blocks share one device",
    "trust_remote_code": "no remote code runs here, so leave it out",
    "load_in_4bit": "quantised weights are not supported; pass dtype=torch.bfloat16 to save memory",
    "load_in_8bit": "quantised weights are not supported; pass dtype=torch.bfloat16 to save memory",
    "hf_config": "config.json is read; pass n_iterations, n_ctx or dtype to differ from it",
}
"""Arguments of neighbouring libraries, and what to do here."""


def check_arguments(given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise for arguments that ``from_pretrained`` does not take.

    Args:
        given: Keyword arguments beside those of its signature.
        known: The names of its signature, for near matches.

    Raises:
        TypeError: There is one; the message says what to pass instead.
    """
    for name in given:
        if name not in HUB_ARGUMENTS:
            instead = _INSTEAD.get(name) or did_you_mean(
                name, [*known, *HUB_ARGUMENTS], f"it takes {', '.join([*known, *HUB_ARGUMENTS])}"
            )
            raise TypeError(f"from_pretrained() has no argument {name!r}: {instead}")
