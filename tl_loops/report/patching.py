"""Where patching the residual stream of a clean prompt restores its answer."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_loops import plots
from tl_loops.drawing.subject import shown_text
from tl_loops.layout.model import Model
from tl_loops.patching.activation import activation_patch
from tl_loops.report.section import Section, as_text, last_tokens, page_figure
from tl_loops.runs.grid import axis_labels
from tl_loops.tasks.prompts import PromptText

_WORTH_NAMING = 0.1
_NOWHERE = "no position"


def patching_section(model: Model, prompts: Sequence[PromptText], progress: bool) -> Section:
    """Where patching the residual stream of a clean prompt restores its answer."""
    pair = _pair(model, prompts)
    title = "Patching over iteration, layer and position"
    if pair is None:
        return Section(
            "patching",
            title,
            [
                "No corrupted counterpart of a prompt changes the model's answer, so there is "
                "nothing to restore. Give prompts with a 'corrupted' field."
            ],
        )
    clean, corrupted, right, wrong, change = pair
    names = lambda name: name.endswith("hook_resid_pre")  # noqa: E731
    clean_logits, cache = model.run_with_cache(clean, names_filter=names)

    def difference(logits: Tensor) -> Tensor:
        return (logits[:, -1, right] - logits[:, -1, wrong]).float().mean()

    high, low = difference(clean_logits), difference(model(corrupted))
    axes = ("iteration", "layer", "pos")
    effect = activation_patch(
        model, corrupted, cache, lambda x: (difference(x) - low) / (high - low), "resid_pre", axes,
        progress=progress,
    )  # fmt: skip
    labels = axis_labels(model, axes, corrupted)
    kept, note = _where_it_matters(effect)
    effect, positions = effect[:, :, kept], [labels[2][i] for i in kept]
    words = [f"position {i} ({_quoted(word)})" for i, word in enumerate(_texts(model, corrupted))]
    figure = page_figure(
        plots.plot_patching,
        effect,
        axes,
        labels=[*labels[:2], positions],
        facet="layer",
        model=model,
        prompts="corrupted against clean prompt",
        unit="share of the clean logit difference",
        limits=(-1.0, 1.0),
        title="Residual stream before each core layer, patched from the clean run",
    )
    path = _path_in_words(effect[:, 0], [words[i] for i in kept])
    text = [
        f"The clean prompt “{as_text(model, clean)}” is answered {_word(model, right)}, the "
        f"corrupted one ({change}) {_word(model, wrong)}. Each cell runs the corrupted prompt with "
        "one position of the residual stream before one layer of one iteration taken from the "
        "clean run, and gives the share of the logit difference that this restores.",
        path + note,
    ]
    return Section("patching", title, text, [figure], finding=path)


def _word(model: Model, token: int) -> str:
    return _quoted(model.to_single_str_token(token))


def _texts(model: Model, tokens: Tensor) -> list[str]:
    return [str(word) for word in model.to_str_tokens(tokens[0])]


def _quoted(word: str) -> str:
    """A token in prose; white space that would be lost is shown by a sign."""
    return f"“{shown_text(word).strip() or word.replace(' ', '␣')}”"


def _pair(
    model: Model, prompts: Sequence[PromptText]
) -> tuple[Tensor, Tensor, int, int, str] | None:
    """A clean and a corrupted prompt of one length whose answers differ."""
    tokens = [last_tokens(model, p.text) for p in prompts]
    for prompt, clean in zip(prompts, tokens, strict=True):
        right = int(model(clean)[0, -1].argmax())
        for corrupted in _corruptions(model, prompt, clean, tokens):
            wrong = int(model(corrupted)[0, -1].argmax())
            if wrong == right:
                continue
            at = (corrupted != clean)[0].nonzero().flatten().tolist()
            words = _texts(model, corrupted)
            change = ", ".join(f"position {p} is {_quoted(words[p])}" for p in at)
            return clean, corrupted, right, wrong, change
    return None


def _corruptions(
    model: Model, prompt: PromptText, clean: Tensor, others: Sequence[Tensor]
) -> list[Tensor]:
    """The given counterpart, or else one token replaced by one of another prompt."""
    if prompt.corrupted is not None:
        corrupted = last_tokens(model, prompt.corrupted)
        return [corrupted] if corrupted.shape == clean.shape else []
    candidates = []
    for position in range(clean.shape[1] - 2, 0, -1):
        for other in others:
            if position < other.shape[1] and other[0, position] != clean[0, position]:
                swapped = clean.clone()
                swapped[0, position] = other[0, position]
                candidates.append(swapped)
                break
    return candidates[:16]


def _path_in_words(effect: Float[Tensor, "iteration pos"], positions: Sequence[str]) -> str:
    """Which position restores the most, as a run of iterations after the other."""
    runs: list[list[Any]] = []
    for t, row in enumerate(effect):
        share, place = float(row.max()), positions[int(row.argmax())]
        if share < _WORTH_NAMING:
            place = _NOWHERE
        if runs and runs[-1][2] == place:
            runs[-1][1], runs[-1][3] = t, max(runs[-1][3], share)
        else:
            runs.append([t, t, place, share])
    told = []
    for first, last, place, share in runs:
        when = f"iteration {first}" if first == last else f"iterations {first} to {last}"
        much = f", up to {share:.2f}" if place != _NOWHERE else ""
        told.append(f"in {when} {place}{much}")
    return "Before layer 0, what restores the most is " + "; ".join(told) + "."


def _where_it_matters(
    effect: Float[Tensor, "iteration layer pos"], most: int = 48
) -> tuple[list[int], str]:
    """The positions with the largest effect, in order, when there are too many to show."""
    n_pos = effect.shape[-1]
    if n_pos <= most:
        return list(range(n_pos)), ""
    strength = effect.abs().amax(dim=(0, 1))
    kept = sorted(int(i) for i in strength.topk(most).indices)
    left = float(strength[[i for i in range(n_pos) if i not in kept]].max())
    note = (
        f" Of {n_pos} positions the {most} with the largest effects are shown; "
        f"no other exceeds {left:.3f} in magnitude."
    )
    return kept, note
