"""Fitted lenses as safetensors files that say what they were fitted on."""

from typing import Any

from torch import Tensor

_SIZES = ("n_prelude", "n_core", "n_coda", "d_model", "d_vocab_out")


def model_sizes(cfg: Any) -> dict[str, int]:
    """The sizes of a model that a fitted lens depends on; iterations are not among them."""
    return {name: int(getattr(cfg, name)) for name in _SIZES}


def check_sizes(kind: str, fitted: dict[str, int], cfg: Any) -> None:
    """Raise on a lens that was fitted on a model of other sizes.

    Raises:
        ValueError: A size differs; the message names it.
    """
    for name, here in model_sizes(cfg).items():
        if fitted.get(name) != here:
            raise ValueError(
                f"this {kind} lens was fitted on a model with {name}={fitted.get(name)}, but this "
                f"model has {name}={here}"
            )


def check_width(resid: Tensor, d_model: int) -> None:
    """Raise on a residual of another width than the lens was fitted on.

    Raises:
        ValueError: It is.
    """
    if resid.shape[-1] != d_model:
        raise ValueError(f"resid must be [..., d_model={d_model}], got shape {list(resid.shape)}")
