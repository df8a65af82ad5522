"""A site: a place in the unrolled computation, by iteration, layer, head and position."""

from collections.abc import Sequence
from dataclasses import dataclass

from tl_loops.arguments import checked, checked_fields
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model
from tl_loops.layout.selection import Selection
from tl_loops.runs.grid import Grid, make_grid


@checked_fields
@dataclass(frozen=True)
class Site:
    """A place in the unrolled computation.

    Attributes:
        activation: As in :func:`tl_loops.patching.activation_patch`.
        iteration: Iteration of a core block; negative counts from the last.
        layer: Layer of the core; left out: all.
        block: Unrolled block, instead of iteration and layer.
        head: One or several heads; left out: all.
        pos: One or several positions; left out: all.
    """

    activation: str
    iteration: Selection | None = None
    layer: Selection | None = None
    block: Selection | None = None
    head: Selection | None = None
    pos: Selection | None = None

    @checked
    def grid(self, model: Model, n_pos: int, layout: LoopLayout | None = None) -> Grid:
        """The single region that the site covers.

        Args:
            model: The model.
            n_pos: Number of positions of the prompt.
            layout: Of the run, where it had another number of iterations than the model has now.

        Raises:
            ValueError: The activation is unknown or has no such axis.
            IndexError: A coordinate is out of range.
        """
        if n_pos < 1:
            raise ValueError(f"n_pos must be at least 1, got {n_pos}")
        names = ("iteration", "layer", "block", "head", "pos")
        where = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return make_grid(model, self.activation, (), n_pos, where=where, layout=layout)


Sites = Site | Sequence[Site]
"""One place, or several that are edited together."""


def group(sites: Sites) -> Sequence[Site]:
    """The sites that are edited together, also where it is one."""
    return [sites] if isinstance(sites, Site) else sites
