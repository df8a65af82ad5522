"""What a figure is about, in one line: the model, its iterations and the prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tl_loops.arguments import is_index
from tl_loops.errors import shortened
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model

_LONGEST = 90
_UNNAMED = "custom"  # what TransformerLens calls a config that got no name


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


def given_name(name: str | None) -> str | None:
    """A model's name; ``None`` for what a config is called that got none."""
    return None if name == _UNNAMED else name


def line_of(model: Model | str | None, prompts: Any) -> str:
    """The line under a title; empty where neither model nor prompts are given."""
    known = model is not None or prompts is not None
    return subject_of(model=model, prompts=prompts).line(complete=False) if known else ""


def subject_of(
    source: Any = None,
    *,
    model: Model | str | None = None,
    prompts: Any = None,
    n_iterations: int | None = None,
) -> Subject:
    """Find out what numbers are about.

    Args:
        source: A profile, known by its provenance, or an activation cache; anything else is asked
            for nothing.
        model: A model, or its name.
        prompts: Their number, one text, several texts or prompts, or tokens [batch, pos].
        n_iterations: Where neither source nor model knows; they come first.
    """
    known = Subject()
    if hasattr(source, "provenance"):
        p = source.provenance
        known = Subject(
            given_name(p.model),
            p.notation,
            p.n_iterations,
            _count(p.n_prompts),
            source.layout,
            source.layout is not None,
        )
    elif hasattr(source, "cache_dict"):
        known = replace(_of_model(source.model, getattr(source, "layout", None)))
        if source.has_batch_dim and source.cache_dict:
            rows = {value.shape[0] for value in source.cache_dict.values() if value.ndim > 1}
            known = replace(known, prompts=_count(max(rows, default=1)))
        else:
            known = replace(known, prompts=_count(1))
    if isinstance(model, str):
        known = replace(known, model=model)
    elif model is not None:
        given = _of_model(model, known.layout)
        known = replace(given, prompts=known.prompts)
    if prompts is not None:
        known = replace(known, prompts=_prompts(prompts, model))
    if known.n_iterations is None and known.looped:
        known = replace(known, n_iterations=n_iterations)
    return known


def _of_model(model: Model, layout: LoopLayout | None) -> Subject:
    cfg = model.cfg
    layout = getattr(model, "layout", None) if layout is None else layout
    notation = None
    if layout is not None:
        notation = layout.notation(injected=getattr(cfg, "injection", None) is not None)
    return Subject(
        given_name(cfg.model_name),
        notation,
        None if layout is None else layout.n_iterations,
        None,
        layout,
        layout is not None,
    )


def _prompts(prompts: Any, model: Any) -> str:
    wrong = TypeError(f"prompts must be their number, text or tokens, got {shortened(prompts)}")
    if is_index(prompts):
        if int(prompts) < 0:
            raise wrong
        return _count(int(prompts))
    if isinstance(prompts, Tensor):
        if not prompts.ndim or prompts.is_floating_point() or prompts.is_complex():
            raise wrong
        rows = prompts[None] if prompts.ndim == 1 else prompts.flatten(0, -2)
        if len(rows) == 1 and getattr(model, "tokenizer", None) is not None:
            return _quoted(model.to_string(rows[0]))
        return _count(len(rows))
    if isinstance(prompts, str):
        return _quoted(prompts)
    if hasattr(prompts, "text"):
        return _quoted(prompts.text)
    if not isinstance(prompts, Sequence):
        raise wrong
    return _prompts(prompts[0], model) if len(prompts) == 1 else _count(len(prompts))


def _quoted(text: str) -> str:
    text = shown_text(text)
    return f"“{text if len(text) <= _LONGEST else '… ' + text[-_LONGEST:]}”"


def _count(n: int) -> str:
    return f"{n} prompt{'s' if n != 1 else ''}"
