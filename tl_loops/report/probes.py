"""What probes read of the prompts' labels, at each iteration and layer."""

from collections import Counter
from collections.abc import Sequence

from tl_loops import plots
from tl_loops.layout.model import Model
from tl_loops.probes import TaskProbes, gather_states, task_probes
from tl_loops.report.section import Section, page_figure, percent
from tl_loops.tasks.prompts import PromptText

TITLE = "What is read of the labels"
_SHUFFLES = 10


def probes_section(model: Model, prompts: Sequence[PromptText], progress: bool) -> Section | None:
    """Probes for the labels at the last token; ``None`` where no prompt has a label."""
    labelled = [(p.text, p.label) for p in prompts if p.label is not None]
    if not labelled:
        return None
    counts = Counter(label for _, label in labelled)
    used = [(text, label) for text, label in labelled if counts[label] > 1]
    classes = {label for _, label in used}
    if len(classes) < 2:
        told = f"{len(labelled)} prompts have a label, of {len(counts)} kind(s)"
        need = "probes need two kinds at least, with two prompts each"
        return Section("probes", TITLE, [f"Not shown: {told}; {need}."])
    several_loops = model.layout.segments is not None
    activation = "state_out" if several_loops else "resid_post"
    states = gather_states(model, [text for text, _ in used], activation, progress=progress)
    found = task_probes(states, [label for _, label in used], n_shuffles=_SHUFFLES)
    finding = _finding(found)
    note = ""
    if len(used) < len(prompts):
        left_out = len(prompts) - len(used)
        note = f" {left_out} prompt(s) without a label, or with one of their own, are left out."
    paragraphs = [
        finding,
        f"A linear probe (ridge regression) for {len(found.classes)} labels reads the last token's "
        f"state at each place, fitted on {found.n_train} prompts and tested on "
        f"{len(found.labels)} others. The most frequent label alone would be right for "
        f"{percent(found.majority)}, probes for shuffled labels for "
        f"{percent(float(found.control.mean()))}.{note}",
    ]
    figures = [page_figure(plots.plot_probes, found, model=model)]
    if len(found.iterations) > 1:
        paragraphs.append(
            "The second figure tests the probe of one iteration on the states of another: a probe "
            "that keeps its accuracy says that both write the label in the same way."
        )
        figures.append(page_figure(plots.plot_probes, found, "transfer", model=model))
    return Section("probes", TITLE, paragraphs, figures, finding=finding)


def _finding(found: TaskProbes) -> str:
    """Where the label is read best, and what the first and the last iteration give."""
    accuracy = found.accuracy
    best = int(accuracy.flatten().argmax())
    t, layer = divmod(best, len(found.layers))
    low, high = found.interval()[t, layer].tolist()
    where = f"iteration {found.iterations[t]}"
    if len(found.layers) > 1:
        where += f", layer {found.layers[layer]}"
    finding = (
        f"The label is read best at {where}: {percent(accuracy[t, layer])} of held-out prompts "
        f"(95% interval {percent(low)} to {percent(high)})"
    )
    if len(found.iterations) > 1:
        first, last = accuracy[0, layer], accuracy[-1, layer]
        finding += f"; {percent(first)} at the first iteration and {percent(last)} at the last"
    return f"{finding}."
