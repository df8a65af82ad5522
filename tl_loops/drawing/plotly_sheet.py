"""A figure of plotly as plain data, before plotly checks it.

plotly checks and copies all that it knows of a figure whenever one value is set; here everything is
put together first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Place:
    """Where a panel is drawn.

    Attributes:
        x: Id of its horizontal axis; empty: it is in space.
        y: Id of its vertical axis.
        scene: Id of its scene in space.
    """

    x: str = ""
    y: str = ""
    scene: str = ""

    def trace(self, trace: dict[str, Any]) -> dict[str, Any]:
        """A trace that is drawn here."""
        return trace | ({"scene": self.scene} if self.scene else {"xaxis": self.x, "yaxis": self.y})


@dataclass
class Sheet:
    """Traces, layout and frames, with the axes of panels that stand in rows and columns.

    Args:
        in_space: By row and column whether a panel is in space; ``None``: there is none.
        across: The space between columns as a share of the width.
        between: The space between rows as a share of the height.

    Attributes:
        data: The traces.
        layout: As plotly has it.
        frames: Of an animation.
        places: Of the panels, row by row.
    """

    in_space: Sequence[Sequence[bool | None]]
    across: float
    between: float
    data: list[dict[str, Any]] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=lambda: {"shapes": [], "annotations": []})
    frames: list[dict[str, Any]] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows, columns = len(self.in_space), len(self.in_space[0])
        width = (1 - self.across * (columns - 1)) / columns
        height = (1 - self.between * (rows - 1)) / rows
        n_flat = n_scenes = 0
        for row, panels in enumerate(self.in_space):
            low = (rows - 1 - row) * (height + self.between)
            for column, in_space in enumerate(panels):
                left = column * (width + self.across)
                x = [max(0.0, left), min(1.0, left + width)]
                y = [max(0.0, low), min(1.0, low + height)]
                if in_space is None:
                    continue
                if in_space:
                    n_scenes += 1
                    place = Place(scene=f"scene{n_scenes if n_scenes > 1 else ''}")
                    self.layout[place.scene] = {"domain": {"x": x, "y": y}}
                else:
                    n_flat += 1
                    number = n_flat if n_flat > 1 else ""
                    place = Place(x=f"x{number}", y=f"y{number}")
                    self.layout[f"xaxis{number}"] = {"anchor": place.y, "domain": x}
                    self.layout[f"yaxis{number}"] = {"anchor": place.x, "domain": y}
                self.places.append(place)

    @property
    def subplots(self) -> dict[str, Any]:
        """What ``set_subplots`` of plotly takes, after which rows and columns can be named."""
        names = {True: {"type": "scene"}, False: {"type": "xy"}, None: None}
        return {
            "rows": len(self.in_space),
            "cols": len(self.in_space[0]),
            "specs": [
                [names[panel] and {**names[panel]} for panel in row] for row in self.in_space
            ],
            "horizontal_spacing": self.across,
            "vertical_spacing": self.between,
        }

    def x_axis(self, place: Place) -> dict[str, Any]:
        """The settings of a horizontal axis."""
        return self.layout[place.x.replace("x", "xaxis")]

    def y_axis(self, place: Place) -> dict[str, Any]:
        """The settings of a vertical axis."""
        return self.layout[place.y.replace("y", "yaxis")]

    def annotate(self, text: str, **settings: Any) -> None:
        """Write something, without an arrow."""
        self.layout["annotations"].append({"text": text, "showarrow": False, **settings})

    def shape(self, kind: str, **settings: Any) -> None:
        """Draw a shape, such as a rectangle."""
        self.layout["shapes"].append({"type": kind, **settings})
