"""circuitsvis views that need no network, hold the script once per page and keep their height.

circuitsvis itself asks a public host whether it is online whenever a notebook shows a figure, and
then either links to a content network or puts its whole script into every single figure.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from html import escape
from importlib import resources
from typing import Any, Literal
from uuid import uuid4

from tl_loops.drawing.sizes import size_in_pixels

Component = Literal["AttentionHeads", "AttentionPattern", "ColoredTokens", "TokenLogProbs"]

_WAITING = "The script of this view is in the output of the notebook's first view: run that cell."
_STYLE = (
    "<style>.circuits-view{font:14px/1.4 system-ui,sans-serif;padding:8px;margin:4px 0}"
    ".circuits-view h4{margin:0 0 2px;font-size:15px}"
    ".circuits-view h5{margin:6px 0 2px;font-size:13px}.circuits-view p{margin:0 0 6px;opacity:.75;"
    "font-size:12px}.circuits-parts{display:flex;flex-wrap:wrap;gap:14px}"
    ".circuits-parts.stacked{display:block}.circuits-part{flex:0 1 auto;max-width:100%}"
    ".circuits-frame{overflow:auto;max-width:100%;box-sizing:border-box;color:#111}"
    ".circuits-frame.whole{overflow:visible}.circuits-frame.tokens{overflow:visible}"
    # circuitsvis draws for a white page: on a dark one light and dark change places, hues do not.
    ".circuits-view.dark .circuits-frame{filter:invert(1) hue-rotate(180deg)}"
    # Room for tooltips is kept once below the view, not within each frame.
    ".circuits-frame.tokens>div>div{padding-bottom:0!important}"
    # A row that is wider than its frame by a margin to both sides.
    ".circuits-frame>div>div>div{margin-left:0!important;margin-right:0!important}"
    # Columns of heads are laid out for the width of a page: four in a row of a narrow view.
    ".narrow>div>div>h3+div>div{flex:0 0 25%!important;max-width:25%!important;"
    "width:25%!important}.narrow h2,.narrow h3{font-size:13px!important;margin:4px 0!important}"
    ".narrow h4{font-size:9px!important}"
    # Names of heads are white on bright colours, which a shade makes dark enough to read them.
    ".circuits-frame h4{box-shadow:inset 0 0 0 99px rgba(0,0,0,.6)}"
    "@media print{.circuits-frame{height:auto!important;overflow:visible}"
    ".circuits-view.dark .circuits-frame{filter:none}}</style>"
)
# The colour of the text around tells a dark page, whatever made it dark.
_FOLLOW = (
    "function follow(id){const at=document.getElementById(id);if(!at)return;"
    "const c=getComputedStyle(at).color.match(/\\d+/g);"
    "at.classList.toggle('dark',0.3*c[0]+0.59*c[1]+0.11*c[2]>140)}"
)
_ON_TOKENS = ("ColoredTokens", "TokenLogProbs")


@lru_cache(maxsize=1)
def circuitsvis_script() -> str:
    """The circuitsvis bundle as the text of a script element; defines ``CircuitsVis``."""
    bundle = resources.files("circuitsvis") / "dist" / "cdn" / "iife.js"
    # Inside of a script element only its end tag must not occur.
    return bundle.read_text(encoding="utf-8").replace("</script", "<\\/script")


@dataclass(frozen=True)
class ViewPart:
    """One circuitsvis component.

    Attributes:
        heading: Above it.
        component: Name of the component.
        props: What it is given; numbers must be finite.
    """

    heading: str
    component: Component
    props: Mapping[str, Any]


@dataclass(frozen=True, repr=False)
class CircuitsView:
    """circuitsvis components beside (or below) each other; a notebook shows it.

    Attributes:
        parts: The components.
        title: What they show.
        subtitle: Of which model and prompt; further notes.
        height: Of each component in CSS pixels, within which attention scrolls, while tokens may
            take more; ``None``: as high as it is.
        width: Of each component in CSS pixels, on a narrower page the page's; ``None``: they stand
            below each other.
        room: Pixels below that are kept for tooltips.
        element_id: Id of the element, different for every view.
    """

    parts: tuple[ViewPart, ...]
    title: str = ""
    subtitle: str = ""
    height: int | None = None
    width: int | None = None
    room: int = 0
    element_id: str = field(default_factory=lambda: f"circuits-{uuid4().hex[:12]}")

    def __post_init__(self) -> None:
        for name, size in (("height", self.height), ("width", self.width)):
            if size is not None:
                size_in_pixels(name, size)

    def element(self) -> str:
        """HTML of the view, for a page that holds :func:`circuitsvis_script` once."""
        frames, calls = [], []
        for i, part in enumerate(self.parts):
            name = f"{self.element_id}-{i}"
            heading = f"<h5>{escape(part.heading)}</h5>" if part.heading else ""
            classes, style = ["circuits-frame"], []
            if part.component in _ON_TOKENS:
                classes.append("tokens")
                style.append(f"min-height:{self.height or 30}px")
            elif self.height is None:
                classes.append("whole")
            else:
                style.append(f"height:{self.height}px")
            if self.width is not None:
                classes.append("narrow")
                style.append(f"width:{self.width}px")
            frames.append(
                f'<div class="circuits-part">{heading}<div class="{" ".join(classes)}" '
                f'style="{";".join(style)}">'
                f'<div id="{name}">{escape(_WAITING)}</div></div></div>'
            )
            data = json.dumps(part.props, separators=(",", ":"), allow_nan=False)
            # Text from prompts must not end the script element it stands in.
            data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028")
            calls.append(f'draw("{name}","{part.component}",{data})')
        head = f"<h4>{escape(self.title)}</h4>" if self.title else ""
        head += f"<p>{escape(self.subtitle)}</p>" if self.subtitle else ""
        stacked = " stacked" if self.width is None else ""
        # In a notebook outputs come in any order: wait for the script and for the element.
        draw = (
            "function draw(id,name,props){const at=document.getElementById(id);"
            "if(at&&window.CircuitsVis){at.textContent='';"
            "CircuitsVis.render(id,CircuitsVis[name],props)}"
            "else setTimeout(()=>draw(id,name,props),100)}"
        )
        follow = (
            f"follow('{self.element_id}');matchMedia('(prefers-color-scheme: dark)')"
            f".addEventListener('change',()=>setTimeout(()=>follow('{self.element_id}'),50))"
        )
        body = f"{_FOLLOW}{follow};{draw}{';'.join(calls)}"
        script = f"<script>(()=>{{{body}}})()</script>" if calls else ""
        room = f' style="padding-bottom:{self.room}px"' if self.room else ""
        return (
            f'{_STYLE}<div class="circuits-view attention-view" id="{self.element_id}"{room}>{head}'
            f'<div class="circuits-parts{stacked}">{"".join(frames)}</div></div>{script}'
        )

    def to_html(self) -> str:
        """HTML that is complete in itself: the view with the script in front."""
        return f"{_loading()}{self.element()}"

    def __repr__(self) -> str:
        shown = ", ".join(part.heading or part.component for part in self.parts)
        return f"CircuitsView({self.title!r}: {shown})"

    def _repr_html_(self) -> str:
        """HTML for a notebook cell; the first view of a notebook brings the script for all."""
        if _brings_script():
            return self.to_html()
        return self.element()


def as_text(token: str) -> str:
    """A token that circuitsvis shows as text, though it puts tokens into the page as HTML.

    A space of no width after ``<`` and ``&`` keeps them from beginning a tag or an entity.
    """
    return token.replace("&", "&\u200b").replace("<", "<\u200b")


def _loading() -> str:
    """A script element that defines ``window.CircuitsVis`` unless the page has it already."""
    load = f"if(!window.CircuitsVis){{{circuitsvis_script()};window.CircuitsVis=CircuitsVis}}"
    return f"<script>{load}</script>"


def _brings_script() -> bool:
    """Whether the output that is being made must hold the script.

    Outside of a notebook every output does. In a notebook the first cell that shows a view does,
    also when it runs again; what it is called is kept on the shell, which is the notebook's.
    """
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if shell is None:
        return True
    cell, run = _cell(shell), shell.execution_count
    carrier, last_run = getattr(shell, "_tl_loops_view_cell", (cell, None))
    if carrier != cell:
        return False
    shell._tl_loops_view_cell = (cell, run)
    return last_run != run  # a cell that shows two views needs the script once


def _cell(shell: Any) -> str:
    """What tells the running cell from the others: its id, or where none is sent its text."""
    try:
        cell = shell.kernel.get_parent()["metadata"]["cellId"]
    except (AttributeError, KeyError, TypeError):
        cell = None
    if cell:
        return str(cell)
    inputs = shell.user_ns.get("In") or [""]
    return str(inputs[-1])
