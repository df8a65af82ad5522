"""A loop over the blocks of a looped transformer that runs each of them once."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tl_loops.config.config import LoopedTransformerConfig, with_layout
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.layout import LoopLayout
from tl_loops.model.looped import LoopedTransformer


def loop_over_own_blocks(model: LoopedTransformer, layout: LoopLayout) -> LoopedTransformer:
    """A looped transformer over the very Parameters of one that runs no block twice.

    Args:
        model: Of one iteration.
        layout: Of one loop or several over all of its blocks.

    Raises:
        LoopedSemanticsError: It runs blocks several times already, or something stands between its
            prelude, core and coda, which another cut of the blocks would move.
    """
    cfg = model.cfg
    if cfg.segments is not None:
        raise LoopedSemanticsError(
            f"this model repeats blocks already ({cfg.notation}): loop the original with other "
            "arguments, which copies no weight"
        )
    if cfg.n_iterations != 1:
        raise LoopedSemanticsError(
            f"this model is looped already ({cfg.notation}): change its number of iterations with "
            "model.set_iterations(n), or load it with n_iterations=1 to loop other blocks"
        )
    between = cfg.between_blocks
    if between:
        raise LoopedSemanticsError(
            f"between prelude, core and coda of this model there is more than its blocks "
            f"({', '.join(between)}), which a loop over other blocks would move: build it from a "
            "LoopedTransformerConfig with the loop that you want"
        )
    looped = LoopedTransformer(
        LoopedTransformerConfig.from_dict(with_layout(cfg.to_dict(), layout)),
        model.tokenizer,
        weights=_renamed(model, layout),
    )
    return looped.train(model.training)


def _renamed(model: LoopedTransformer, layout: LoopLayout) -> Iterator[tuple[str, Tensor]]:
    """The Parameters under the names that they have with another layout."""
    names: dict[str, Any] = dict(
        zip(model.layout.physical_names(), layout.physical_names(), strict=True)
    )
    for name, parameter in model.physical_named_parameters():
        parts = name.split(".")
        owner = ".".join(parts[:2])
        yield (".".join([names[owner], *parts[2:]]) if owner in names else name), parameter
