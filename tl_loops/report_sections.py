"""The sections of the report: each runs the model, says what it found, and draws it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.exit_curves import exit_curve
from tl_loops.lens import coda_lens
from tl_loops.measure import measure
from tl_loops.patching.activation import activation_patch
from tl_loops.patching.grid import axis_labels
from tl_loops.plots.attention import attention_view
from tl_loops.plots.heatmap import Heatmap
from tl_loops.prompts import PromptText

_ATTENTION_BYTES = 2_500_000
_BYTES_A_WEIGHT = 6
_LONGEST_TABLE = 64
_BATCH = 64
_WORTH_NAMING = 0.1

_METRICS = {
    "sink_rate": ("Sink rate", "share of heads whose mean weight on position 0 is at least 0.3"),
    "mixing_score": ("Mixing score", "mean entropy of attention rows, in nats"),
    "colsum_concentration": (
        "ColSum concentration",
        "1 - normalised entropy of the mass that each position receives, 0 to 1",
    ),
}


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes:
        id: Anchor.
        title: Heading.
        paragraphs: Plain text.
        figures: HTML, with all text from prompts escaped.
        code: Preformatted text.
    """

    id: str
    title: str
    paragraphs: list[str]
    figures: list[str] = field(default_factory=list)
    code: str = ""


def overview_section(model: Any, n_prompts: int, what: str) -> Section:
    """What the model is."""
    cfg = model.cfg
    return Section(
        "model",
        "The model",
        [
            f"A looped transformer of {cfg.n_params:,} parameters whose {cfg.n_core} core layers "
            f"run {cfg.n_iterations} times, unrolled to {cfg.n_layers} blocks; looked at on "
            f"{n_prompts} prompts ({what}).",
            "Data flow of one forward pass:",
        ],
        code=cfg.describe(),
    )


def readout_section(model: Any, prompts: Sequence[PromptText], what: str) -> Section:
    """Accuracy per iteration where the answers are single tokens, else loss."""
    answers = [_answer_token(model, p.answer) for p in prompts]
    T = model.cfg.n_iterations
    if all(answer is not None for answer in answers):
        correct = torch.zeros(T)
        for texts, ids in _by_length(model, prompts, answers):
            lens = coda_lens(model, texts, positions="last", batch_size=_BATCH, top_k=1)
            correct += (lens.predictions[..., 0] == ids).float().sum(-1).cpu()
        values, name = correct / len(prompts), "Accuracy"
        text = (
            f"Read out after one iteration the model answers {_percent(values[0])} of "
            f"{len(prompts)} prompts correctly, after {T} {_percent(values[-1])}; "
            f"the most, {_percent(values.max())}, after {int(values.argmax()) + 1}."
        )
        unit = "share of correct answers"
    else:
        curve = exit_curve(model, [p.text for p in prompts], progress=False)
        values, name = torch.as_tensor(curve.loss), "Loss"
        text = (
            f"The next-token loss falls from {values[0]:.3f} nats after one iteration to "
            f"{values[-1]:.3f} after {T}; the least, {values.min():.3f}, is reached after "
            f"{int(values.argmin()) + 1}."
        )
        unit = "nats per token"
    bars = _bars([f"after iteration {t}" for t in range(T)], values, unit)
    title = f"{name} per iteration ({model.cfg.model_name}, {len(prompts)} prompts: {what})"
    return Section("readout", f"{name} per iteration", [text], [_figure(title, bars)])


def answers_section(model: Any, prompts: Sequence[PromptText]) -> Section:
    """The answer that the coda lens reads from the state after each iteration."""
    T = model.cfg.n_iterations
    heads = "".join(f"<th>{t}</th>" for t in range(T))
    rows, settled = [], []
    for prompt in prompts:
        lens = coda_lens(model, prompt.text, positions="last", top_k=1)
        tokens = model.to_str_tokens(lens.predictions.flatten())
        saturation = int(lens.saturation_iteration().flatten()[0])
        settled.append(saturation)
        cells = "".join(
            f'<td class="{"right" if token.strip() == prompt.answer else "other"}" '
            f'title="iteration {t}: p = {float(p):.3f}">{escape(token)}</td>'
            for t, (token, p) in enumerate(
                zip(tokens, lens.top_probabilities.flatten(), strict=True)
            )
        )
        rows.append(
            f'<tr><td class="prompt">{escape(_shortened(prompt.text))}</td>{cells}'
            f"<td>{escape(prompt.answer or '')}</td></tr>"
        )
    table = (
        '<div class="scroll"><table class="plain"><thead><tr><th>prompt</th>'
        f"{heads}<th>answer</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    text = (
        "Each column decodes the state that leaves an iteration through all that the model does "
        "behind the loop (coda lens): it is what the model would answer if it stopped there. "
        f"On these prompts the answer stays the same from iteration {min(settled)} "
        f"to {max(settled)} on, depending on the prompt. Green answers are right."
    )
    title = f"Answer after each iteration ({model.cfg.model_name}, coda lens, last position)"
    return Section("answers", "The answer after each iteration", [text], [_figure(title, table)])


def measurements_section(
    model: Any, prompts: Sequence[PromptText], what: str, progress: bool
) -> Section:
    """Sink rate, mixing score and ColSum concentration per iteration and layer."""
    profile = measure(model, [p.text for p in prompts], metrics=tuple(_METRICS), progress=progress)
    layout, figures, notes = model.layout, [], []
    for name, (title, unit) in _METRICS.items():
        values = torch.as_tensor(profile.mean(name))
        core = layout.by_iteration(values)
        first, last = float(core[0].nanmean()), float(core[-1].nanmean())
        notes.append(f"{title}: {first:.3f} in iteration 0, {last:.3f} in the last.")
        figures.append(
            Heatmap(
                core,
                [f"iteration {t}" for t in range(layout.n_iterations)],
                [f"layer {layer}" for layer in range(layout.n_core)],
                f"{title} ({model.cfg.model_name}, {len(prompts)} prompts: {what})",
                "iteration",
                "core layer",
                unit,
            ).to_html()
        )
    grid = f'<div class="columns">{"".join(figures)}</div>'
    text = (
        "Definitions of 2604.11791: means over heads, then over prompts, each prompt at its own "
        "length. Core layers by iteration; " + " ".join(notes)
    )
    return Section("attention-metrics", "Attention per iteration and layer", [text], [grid])


def patching_section(model: Any, prompts: Sequence[PromptText], progress: bool) -> Section:
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
    effect, positions, note = _where_it_matters(effect, labels[2])
    figures = [
        Heatmap(
            effect[:, layer],
            labels[0],
            positions,
            f"Residual stream before layer {layer} ({model.cfg.model_name}, "
            f"{model.cfg.n_iterations} iterations, corrupted against clean prompt)",
            "iteration",
            "position",
            "0: as the corrupted prompt, 1: as the clean prompt",
            "diverging",
            (-1.0, 1.0),
            show_values=False,
        ).to_html().replace('class="heatmap"', 'class="heatmap dense tilted"')
        for layer in range(effect.shape[1])
    ]  # fmt: skip
    text = [
        f"The clean prompt “{_text(model, clean)}” is answered {_word(model, right)}, the "
        f"corrupted one ({change}) {_word(model, wrong)}. Each cell runs the corrupted prompt with "
        "one position of the residual stream before one layer of one iteration taken from the "
        "clean run, and gives the share of the logit difference that this restores.",
        _path_in_words(effect[:, 0], positions) + note,
    ]
    return Section("patching", title, text, figures)


def attention_section(model: Any, prompt: PromptText) -> Section:
    """Attention patterns of the core, drawn by circuitsvis, one view an iteration."""
    tokens = model.to_tokens(prompt.text)[:1, -_LONGEST_TABLE:]
    words, cfg, layout = model.to_str_tokens(tokens[0]), model.cfg, model.layout
    _, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("hook_pattern"))
    weights = cfg.n_core * cfg.n_heads * len(words) ** 2
    room = max(1, _ATTENTION_BYTES // _BYTES_A_WEIGHT)
    n_views = min(cfg.n_iterations, max(2, room // weights))
    chosen = sorted(
        {round(i * (cfg.n_iterations - 1) / max(1, n_views - 1)) for i in range(n_views)}
    )
    n_heads = max(1, min(cfg.n_heads, room // (len(chosen) * cfg.n_core * len(words) ** 2)))
    figures = []
    for t in chosen:
        patterns = [cache["pattern", layout.index(iteration=t, layer=x)] for x in range(cfg.n_core)]
        shown = torch.cat([p[0, :n_heads] for p in patterns])
        names = [f"r{t}.L{x}H{h}" for x in range(cfg.n_core) for h in range(n_heads)]
        view = attention_view(words, shown, names).element()
        figures.append(_figure(f"Iteration {t} ({cfg.model_name}, prompt 0)", view))
    left_out = []
    if len(chosen) < cfg.n_iterations:
        left_out.append(f"iterations {', '.join(map(str, chosen))} of {cfg.n_iterations}")
    if n_heads < cfg.n_heads:
        left_out.append(f"the first {n_heads} of {cfg.n_heads} heads a layer")
    text = [
        f"The prompt is “{_text(model, tokens)}”. Names read r(iteration).L(layer)H(head). Click a "
        "head to enlarge it; point at a token to see where it looks."
    ]
    if left_out:
        text.append("To keep the page small it shows " + " and ".join(left_out) + ".")
    return Section("attention", "Attention patterns", text, figures)


def _figure(title: str, body: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{body}</figure>"


def _bars(names: Sequence[str], values: Float[Tensor, "row"], unit: str) -> str:
    top = max(float(values.max()), 1e-9)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="bar">'
        f'<i style="width:{100 * float(v) / top:.1f}%"></i></td><td>{float(v):.3f}</td></tr>'
        for name, v in zip(names, values, strict=True)
    )
    return (
        f'<table class="plain bars"><tbody>{rows}</tbody></table><p class="legend">{escape(unit)}'
        "</p>"
    )


def _percent(share: Tensor) -> str:
    return f"{100 * float(share):.1f}%"


def _shortened(text: str, most: int = 160) -> str:
    return text if len(text) <= most else f"… {text[-most:]}"


def _text(model: Any, tokens: Int[Tensor, "1 pos"]) -> str:
    return _shortened(model.to_string(tokens[0]), 240)


def _word(model: Any, token: int) -> str:
    return repr(model.to_single_str_token(token))


def _answer_token(model: Any, answer: str | None) -> int | None:
    """The single token of an answer, with or without a space before it."""
    for text in () if answer is None else (f" {answer.strip()}", answer.strip()):
        tokens = model.to_tokens(text, prepend_bos=False)[0]
        if tokens.numel() == 1 and int(tokens[0]) != model.tokenizer.unk_token_id:
            return int(tokens[0])
    return None


def _by_length(
    model: Any, prompts: Sequence[PromptText], answers: Sequence[int | None]
) -> list[tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch"]]]:
    """Prompts of one length together, so that nothing is padded."""
    groups: dict[int, list[tuple[Tensor, int]]] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = model.to_tokens(prompt.text)[0]
        groups.setdefault(len(tokens), []).append((tokens, int(answer or 0)))
    return [
        (torch.stack([t for t, _ in group]), torch.tensor([a for _, a in group]))
        for group in groups.values()
    ]


def _pair(model: Any, prompts: Sequence[PromptText]) -> tuple[Tensor, Tensor, int, int, str] | None:
    """A clean and a corrupted prompt of one length whose answers differ."""
    tokens = [model.to_tokens(p.text)[:1, -_LONGEST_TABLE:] for p in prompts]
    for prompt, clean in zip(prompts, tokens, strict=True):
        right = int(model(clean)[0, -1].argmax())
        for corrupted in _corruptions(model, prompt, clean, tokens):
            wrong = int(model(corrupted)[0, -1].argmax())
            if wrong == right:
                continue
            at = (corrupted != clean)[0].nonzero().flatten().tolist()
            words = model.to_str_tokens(corrupted[0])
            change = ", ".join(f"position {p} is {words[p]!r}" for p in at)
            return clean, corrupted, right, wrong, change
    return None


def _corruptions(
    model: Any, prompt: PromptText, clean: Tensor, others: Sequence[Tensor]
) -> list[Tensor]:
    """The given counterpart, or else one token replaced by one of another prompt."""
    if prompt.corrupted is not None:
        corrupted = model.to_tokens(prompt.corrupted)[:1, -_LONGEST_TABLE:]
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
            place = "no position"
        if runs and runs[-1][2] == place:
            runs[-1][1], runs[-1][3] = t, max(runs[-1][3], share)
        else:
            runs.append([t, t, place, share])
    told = []
    for first, last, place, share in runs:
        when = f"iteration {first}" if first == last else f"iterations {first} to {last}"
        much = f" (up to {share:.2f})" if place != "no position" else ""
        told.append(f"in {when} {place}{much}")
    return "The position that restores the most before layer 0: " + "; ".join(told) + "."


def _where_it_matters(
    effect: Float[Tensor, "iteration layer pos"], positions: Sequence[str], most: int = 48
) -> tuple[Tensor, list[str], str]:
    """The positions with the largest effect, in order, when there are too many to show."""
    if len(positions) <= most:
        return effect, list(positions), ""
    strength = effect.abs().amax(dim=(0, 1))
    kept = sorted(int(i) for i in strength.topk(most).indices)
    left = float(strength[[i for i in range(len(positions)) if i not in kept]].max())
    note = (
        f" Of {len(positions)} positions the {most} with the largest effects are shown; "
        f"no other exceeds {left:.3f} in magnitude."
    )
    return effect[:, :, kept], [positions[i] for i in kept], note
