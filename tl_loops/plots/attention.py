"""circuitsvis attention views that need no network and hold the script once a page.

circuitsvis itself asks a public host whether it is online whenever a notebook shows a figure, and
then either links to a content network or puts its whole script into every single figure.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from uuid import uuid4

from jaxtyping import Float
from torch import Tensor


@lru_cache(maxsize=1)
def circuitsvis_script() -> str:
    """The circuitsvis bundle as the text of a script element; defines ``CircuitsVis``."""
    bundle = resources.files("circuitsvis") / "dist" / "cdn" / "iife.js"
    # Inside of a script element only its end tag must not occur.
    return bundle.read_text(encoding="utf-8").replace("</script", "<\\/script")


@dataclass(frozen=True)
class AttentionView:
    """Attention patterns of some heads of one prompt; small multiples, one enlarged on click.

    Attributes:
        tokens: The prompt's tokens as text.
        attention: [head, dest, src], rounded.
        head_names: One name a head.
        height: Height in CSS pixels that the view scrolls within, so that it never collapses.
        element_id: Id of the element that it is drawn into, different for every view.
    """

    tokens: tuple[str, ...]
    attention: tuple[tuple[tuple[float, ...], ...], ...]
    head_names: tuple[str, ...]
    height: int = 420
    element_id: str = field(default_factory=lambda: f"attention-{uuid4().hex[:12]}")

    def element(self) -> str:
        """HTML of the view, for a page that holds :func:`circuitsvis_script` once before it."""
        props = {
            "tokens": self.tokens,
            "attention": self.attention,
            "attentionHeadNames": self.head_names,
        }
        # Text from prompts must not end the script element it stands in.
        data = json.dumps(props, separators=(",", ":")).replace("<", "\\u003c")
        return (
            f'<div class="attention-view" style="height:{self.height}px;overflow:auto">'
            f'<div id="{self.element_id}"></div></div>'
            f'<script>CircuitsVis.render("{self.element_id}",CircuitsVis.AttentionHeads,{data})'
            "</script>"
        )

    def _repr_html_(self) -> str:
        """HTML for a notebook cell, complete in itself."""
        load = f"<script>if(!window.CircuitsVis){{{circuitsvis_script()};"
        return f"{load}window.CircuitsVis=CircuitsVis}}</script>{self.element()}"


def attention_view(
    tokens: Sequence[str],
    attention: Float[Tensor, "head dest src"],
    head_names: Sequence[str] | None = None,
    height: int = 420,
    digits: int = 3,
) -> AttentionView:
    """Show attention patterns with circuitsvis, offline.

    Args:
        tokens: The prompt's tokens as text (``model.to_str_tokens``).
        attention: Patterns of one prompt, e.g. ``cache["pattern", 3, 0][0]``; values in [0, 1].
        head_names: One name a head; ``None``: H0, H1, ...
        height: Height in CSS pixels.
        digits: Decimals that are kept.

    Returns:
        A view that a notebook shows.

    Raises:
        ValueError: Numbers of tokens, names and rows do not agree.
    """
    heads, dest, src = attention.shape
    if (dest, src) != (len(tokens), len(tokens)):
        raise ValueError(
            f"attention must be [head, dest, src] with dest = src = {len(tokens)} tokens, "
            f"got {tuple(attention.shape)}"
        )
    names = [f"H{h}" for h in range(heads)] if head_names is None else list(head_names)
    if len(names) != heads:
        raise ValueError(f"got {len(names)} head names for {heads} heads")
    rows = attention.detach().float().cpu().tolist()
    rounded = tuple(tuple(tuple(round(x, digits) for x in row) for row in head) for head in rows)
    return AttentionView(tuple(tokens), rounded, tuple(names), height)
