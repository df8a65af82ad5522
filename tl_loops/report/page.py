"""One self-contained HTML page about a looped model on some prompts."""

import base64
import gzip
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import torch
from jinja2 import Environment
from markupsafe import Markup, escape

from tl_loops import tasks
from tl_loops.arguments import checked, checked_fields
from tl_loops.drawing.subject import given_name
from tl_loops.drawing.views import circuitsvis_script
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.model import Model
from tl_loops.measurements.measure import available_metrics, measure
from tl_loops.report.answers import answers_section, readout_section
from tl_loops.report.attention import attention_section, floorplan_section
from tl_loops.report.loop_map import geometry_section, gradients_section, loop_map_section
from tl_loops.report.measurements import (
    MEASURED,
    dynamics_section,
    exits_section,
    neurons_section,
    pairs_section,
    stages_section,
)
from tl_loops.report.patching import patching_section
from tl_loops.report.probes import TITLE, probes_section
from tl_loops.report.section import Section, last_tokens, shortened, times
from tl_loops.tasks.prompts import SAMPLE, VERSES, PromptText, from_task
from tl_loops.upstream import left_as_it_was
from tl_loops.version import __version__
from tl_loops.writing import check_writable, write_whole

MOST_BYTES = 6_000_000
"""A page is never larger than this."""

EMBEDDED, EMBEDDED_TEXT = "tl-loops-tiny", "tl-loops-text"
_EVALUATED = 240
_SHOWN = 8


@checked_fields
@dataclass(frozen=True)
class ReportPrompts:
    """What a report looks at.

    Attributes:
        shown: Prompts whose answers are listed one by one.
        evaluated: Prompts that accuracy (or loss) and the attention metrics are averaged over.
        what: A few words that say what they are.
    """

    shown: Sequence[PromptText]
    evaluated: Sequence[PromptText] = field(default=())
    what: str = "the given prompts"

    def __post_init__(self) -> None:
        if not self.shown:
            raise ValueError("a report needs at least one prompt")
        if not self.evaluated:
            object.__setattr__(self, "evaluated", self.shown)


@checked
def default_prompts(model: Model) -> ReportPrompts:
    """What an embedded model was trained on, for others a few general sentences."""
    if model.cfg.model_name == EMBEDDED_TEXT:
        texts = [PromptText(verse) for verse in VERSES]
        return ReportPrompts(texts[:_SHOWN], texts, "well-known verses of the King James Bible")
    if model.cfg.model_name != EMBEDDED:
        return ReportPrompts([PromptText(text) for text in SAMPLE], what="the built-in sample")
    sample = [p for p in tasks.sample_prompts() if p.n_hops > 1]
    longest = sorted(sample, key=lambda p: -p.n_hops)
    # From many hops to few, so that the iterations are seen to do the work.
    shown = [longest[i * (len(longest) - 1) // (_SHOWN - 1)] for i in range(_SHOWN)]
    corrupted = [tasks.corrupt(prompt) for prompt in shown]
    evaluated = tasks.fact_chain_prompts(_EVALUATED, seed=1)
    return ReportPrompts(
        from_task(shown, corrupted), from_task(evaluated), "held-out prompts of the model's task"
    )


@checked
@left_as_it_was
def report_html(
    model: Model,
    prompts: ReportPrompts | Sequence[PromptText | str] | None = None,
    *,
    n_iterations: int | None = None,
    progress: bool = True,
) -> str:
    """The page as text.

    It shows accuracy (or loss) and the answer after each iteration, attention, entropy and dynamics
    by iteration and layer, Jacobians and gradients of iterations, likeness of all pairs of blocks
    and of the states' geometry, neurons, an activation-patching grid over iteration, layer and
    position, probes for the prompts' labels where they have some, the halting gate where there is
    one, and attention patterns. It loads nothing from anywhere when it is opened.

    Args:
        model: A looped model with a tokenizer.
        prompts: What to look at; ``None``: :func:`default_prompts`.
        n_iterations: Number of iterations; ``None``: the model's.
        progress: Show progress bars.

    Raises:
        ValueError: The model has no tokenizer, there are no prompts, or the page would pass 6 MB.
    """
    if model.tokenizer is None:
        name = given_name(model.cfg.model_name) or "the model"
        raise ValueError(
            f"{name} has no tokenizer, so a report cannot read prompts: call "
            "model.set_tokenizer(...), or put the tokenizer's files beside the checkpoint"
        )
    if prompts is None:
        prompts = default_prompts(model)
    elif not isinstance(prompts, ReportPrompts):
        prompts = ReportPrompts([PromptText(p) if isinstance(p, str) else p for p in prompts])
    with torch.no_grad(), model.iterations(n_iterations or model.cfg.n_iterations):
        page = _render(model, _lead(model, prompts), _sections(model, prompts, progress))
    if len(page.encode()) > MOST_BYTES:
        raise ValueError(
            f"the page would have {len(page.encode()):,} bytes, more than {MOST_BYTES:,}: "
            "give shorter prompts or fewer iterations"
        )
    return page


@checked
def write_report(
    model: Model,
    out: str | os.PathLike[str],
    prompts: ReportPrompts | Sequence[PromptText | str] | None = None,
    *,
    n_iterations: int | None = None,
    progress: bool = True,
) -> Path:
    """Write :func:`report_html` to a file; a failure leaves no half-written page.

    Args:
        model: As :func:`report_html`.
        out: The file.
        prompts: As :func:`report_html`.
        n_iterations: As :func:`report_html`.
        progress: As :func:`report_html`.

    Returns:
        The file's absolute path.

    Raises:
        ValueError: As :func:`report_html`.
        OSError: The file cannot be written.
    """
    check_writable(out)  # before the work
    page = report_html(model, prompts, n_iterations=n_iterations, progress=progress)
    write_whole(out, page.encode("utf-8"))
    return Path(out).resolve()


def _sections(model: Model, prompts: ReportPrompts, progress: bool) -> list[Section]:
    """Every section that applies to the model."""
    texts = [p.text for p in prompts.evaluated]
    available = available_metrics(model)
    metrics = [metric for metric in MEASURED if metric in available]
    profile = measure(model, texts, metrics, progress=progress)
    first = prompts.shown[0].text
    tokens, text = last_tokens(model, first), shortened(first, 80)
    _, cache = model.run_with_cache(tokens, names_filter=_is_pictured)
    made: dict[tuple[str, str], Callable[[], Section | None]] = {
        ("model", "The model"): lambda: _model_section(model),
        ("readout", "Readout per iteration"): lambda: readout_section(
            model, prompts.evaluated, progress
        ),
        ("answers", "The answer after each iteration"): lambda: answers_section(
            model, prompts.shown[:_SHOWN]
        ),
        ("patching", "Patching"): lambda: patching_section(model, prompts.shown, progress),
        ("probes", TITLE): lambda: probes_section(model, prompts.evaluated, progress),
        ("dynamics", "Fixed points and trajectories"): lambda: dynamics_section(
            model, profile, cache, text
        ),
        ("loop-map", "The loop as a map"): lambda: loop_map_section(
            model, profile, prompts.shown[0]
        ),
        ("gradients", "Gradients by iteration"): lambda: gradients_section(model, prompts.shown[0]),
        ("geometry", "Geometry between iterations"): lambda: geometry_section(model, texts),
        ("attention-metrics", "Attention and entropy"): lambda: stages_section(profile),
        ("pairs", "All pairs of blocks"): lambda: pairs_section(cache, text),
        ("exits", "When the model would stop"): lambda: exits_section(model, profile),
        ("neurons", "Neurons"): lambda: neurons_section(model),
        ("floorplan", "The looped floorplan"): lambda: floorplan_section(model, cache, text),
        ("attention", "Attention patterns"): lambda: attention_section(model, tokens, cache),
    }
    sections = [_made_or_refused(*name, make) for name, make in made.items()]
    return [section for section in sections if section is not None]


def _made_or_refused(name: str, title: str, make: Callable[[], Section | None]) -> Section | None:
    """A section, or in its place the reason why this model has no such numbers."""
    try:
        return make()
    except LoopedSemanticsError as error:
        return Section(name, title, [f"Not shown for this model: {error}."])


def _is_pictured(name: str) -> bool:
    return name.endswith(("hook_pattern", "hook_resid_post", "hook_state_out"))


def _model_section(model: Model) -> Section:
    """What the model is."""
    return Section(
        "model", "The model", ["Data flow of one forward pass:"], code=model.cfg.describe()
    )


def _lead(model: Model, prompts: ReportPrompts) -> str:
    """What the page is about."""
    cfg, n_prompts = model.cfg, len(prompts.evaluated)
    return (
        f"A looped transformer of {cfg.n_params:,} parameters whose {cfg.n_core} core "
        f"layer{'s run' if cfg.n_core != 1 else ' runs'} {times(cfg.n_iterations)}, unrolled "
        f"to {cfg.n_layers} blocks; looked at on {n_prompts} "
        f"prompt{'s' if n_prompts != 1 else ''} ({prompts.what})."
    )


def _with_links(text: str) -> Markup:
    """A paragraph whose arXiv numbers are links."""
    link = r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>'
    return Markup(re.sub(r"arXiv (\d{4}\.\d{4,5})", link, str(escape(text))))


def _render(model: Model, lead: str, sections: Sequence[Section]) -> str:
    folder = resources.files("tl_loops.report") / "templates"
    source = (folder / "report.html").read_text("utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["with_links"] = _with_links
    template = environment.from_string(source)
    return template.render(
        name=given_name(model.cfg.model_name) or "Looped transformer",
        notation=model.cfg.notation,
        lead=lead,
        sections=sections,
        summary=[section for section in sections if section.finding],
        style=(folder / "report.css").read_text("utf-8"),
        script=(folder / "report.js").read_text("utf-8"),
        libraries=[_packed(_plotly_script()), _packed(circuitsvis_script())],
        version=__version__,
    )


def _plotly_script() -> str:
    return (resources.files("plotly") / "package_data" / "plotly.min.js").read_text("utf-8")


def _packed(script: str) -> str:
    """A script as gzip in base64: a quarter of its size, and nothing that could end an element."""
    return base64.b64encode(gzip.compress(script.encode("utf-8"), mtime=0)).decode("ascii")
