"""What a figure is about, in one line."""

from dataclasses import dataclass

from tl_loops.layout.layout import LoopLayout

_LONGEST = 90


@dataclass(frozen=True)
class Subject:
    """What is known of where numbers come from; ``None`` where it is not.

    Attributes:
        model: Name.
        notation: ``(p, k⊗t, c)``.
        n_iterations: How often the core ran.
        prompts: How many, or the text of a single one.
        layout: The unrolled blocks.
        looped: Whether there are iterations.
    """

    model: str | None = None
    notation: str | None = None
    n_iterations: int | None = None
    prompts: str | None = None
    layout: LoopLayout | None = None
    looped: bool = True

    def line(self, complete: bool) -> str:
        """One line of text.

        Args:
            complete: Whether to say also what is not known.
        """
        name = self.model or ("model not named" if complete else "")
        parts = [" ".join(part for part in (name, self.notation) if part)]
        if self.n_iterations is not None:
            parts.append(f"{self.n_iterations} iteration{'s' if self.n_iterations != 1 else ''}")
        elif not self.looped:
            parts.append("feedforward")
        elif complete:
            parts.append("number of iterations not named")
        parts.append(self.prompts or ("prompts not named" if complete else ""))
        return " · ".join(part for part in parts if part)


def shown_text(text: str) -> str:
    """Text on one line: white space that would break it is replaced by signs."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "")
