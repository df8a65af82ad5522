"""What the model would answer after each iteration."""

from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

from tl_loops import plots
from tl_loops.drawing.subject import shown_text
from tl_loops.layout.model import Model
from tl_loops.lens import coda_lens
from tl_loops.lens.exit_curve import exit_curve
from tl_loops.report.section import (
    Section,
    answer_token,
    by_length,
    html_figure,
    last_tokens,
    page_figure,
    percent,
    shortened,
)
from tl_loops.tasks.prompts import PromptText

_BATCH = 64
_HOVERED = 5
"""How many tokens a cell of the lens tells."""


def readout_section(model: Model, prompts: Sequence[PromptText], progress: bool) -> Section:
    """Accuracy per iteration where the answers are single tokens, else loss."""
    answers = [answer_token(model, p.answer) for p in prompts]
    known = [a for a in answers if a is not None]
    has_answers = len(known) == len(prompts)
    curve = exit_curve(
        model,
        [p.text for p in prompts],
        known if has_answers else None,
        batch_size=_BATCH,
        progress=progress,
    )
    T = model.cfg.n_iterations
    what = curve.accuracy if has_answers else curve.loss
    finding = _change(what, "Accuracy" if has_answers else "The loss per token", has_answers)
    paragraphs = [f"{finding}."]
    if T > 1:
        prediction = "answer" if has_answers else "prediction of the next token"
        paragraphs.append(
            f"The {prediction} changes {curve.flips:.1f} times along the loop on average."
        )
    if T > 1 and has_answers:
        paragraphs.append(
            "Leaving each prompt at its best iteration instead of the last would add "
            f"{percent(curve.oracle_headroom)} accuracy; overthinking is the share of answers that "
            "were right and are wrong at the end."
        )
    figure = page_figure(plots.plot_exit_curves, curve, model=model)
    title = "Accuracy per iteration" if has_answers else "Loss per iteration"
    return Section("readout", title, paragraphs, [figure], finding=f"{finding}.")


def _change(values: Tensor, name: str, is_share: bool) -> str:
    """How an accuracy, or a loss in nats, changes with the number of iterations, in words."""
    told = [percent(value) if is_share else _nats(value) for value in values]
    T, best = len(told), int(values.argmax() if is_share else values.argmin()) + 1
    if len(set(told)) == 1:
        return f"{name} is {told[0]} after {_iterations(T) if T == 1 else 'every iteration'}"
    if best == 1:
        return f"{name} is best after 1 iteration, {told[0]}, and {told[-1]} after {T}"
    verb = "rises" if is_share else "falls"
    change = f"{name} {verb} from {told[0]} after 1 iteration to {told[best - 1]} after {best}"
    if best == T:
        return change
    stays = len(set(told[best - 1 :])) == 1
    return f"{change} and stays there" if stays else f"{change}; after {T} it is {told[-1]}"


def answers_section(model: Model, prompts: Sequence[PromptText]) -> Section:
    """The answer that the coda lens reads from the state after each iteration."""
    T = model.cfg.n_iterations
    rows, settled = [], []
    for prompt in prompts:
        lens = coda_lens(model, prompt.text, positions="last", top_k=1)
        tokens = [str(token) for token in model.to_str_tokens(lens.predictions.flatten())]
        settled.append(int(lens.saturation_iteration().flatten()[0]))
        answer = f" <span>answer: {escape(prompt.answer)}</span>" if prompt.answer else ""
        rows.append(
            f'<li><p class="prompt">{escape(shortened(prompt.text))}{answer}</p>'
            f'<ol class="runs">{_runs(tokens, lens.top_probabilities.flatten(), prompt.answer)}'
            "</ol></li>"
        )
    text = (
        "What the model would answer if it stopped after an iteration: its state decoded through "
        "all that the model does after the loop (coda lens). Each box names the iterations that "
        "give the same answer."
    )
    if any(prompt.answer for prompt in prompts):
        text += " Green answers are right."
    finding = ""
    if T > 1:
        first, last = min(settled), max(settled)
        when = f"iteration {first}" if first == last else f"iteration {first} to {last}"
        depends = "" if first == last else ", depending on the prompt"
        finding = (
            f"The answer to the {len(prompts)} prompts shown stays the same from {when} "
            f"on{depends}."
        )
    figures = [
        html_figure("Answer after each iteration", f'<ul class="answers">{"".join(rows)}</ul>')
    ]
    if T > 1:
        read = coda_lens(model, last_tokens(model, prompts[0].text), top_k=_HOVERED)
        figures.append(page_figure(plots.plot_lens, read, model=model))
        figures.append(_ranks(model, prompts))
    return Section(
        "answers", "The answer after each iteration", [text, finding] if finding else [text],
        figures, finding=finding,
    )  # fmt: skip


def _runs(tokens: Sequence[str], probabilities: Tensor, answer: str | None) -> str:
    """Boxes with an answer each and the iterations in a row that give it."""
    starts = [t for t in range(len(tokens)) if t == 0 or tokens[t] != tokens[t - 1]]
    boxes = []
    for first, after in zip(starts, [*starts[1:], len(tokens)], strict=True):
        when = f"{first}" if after - first == 1 else f"{first} to {after - 1}"
        p = ", ".join(f"{float(x):.3f}" for x in probabilities[[first, after - 1]].unique())
        right = ' class="right"' if answer is not None and tokens[first].strip() == answer else ""
        boxes.append(
            f'<li{right} title="iteration {when}: p = {p}"><small>{when}</small> '
            f"{escape(shown_text(tokens[first]).strip()) or '␣'}</li>"
        )
    return "".join(boxes)


def _iterations(n: int) -> str:
    return f"{n} iteration{'s' if n != 1 else ''}"


def _nats(loss: Tensor) -> str:
    return f"{float(loss):.3f} nats"


def _ranks(model: Model, prompts: Sequence[PromptText]) -> str:
    """Rank of the final answer, and of what was the answer after the first iteration."""
    tokens, _ = by_length(model, prompts, [None] * len(prompts))[0]
    predictions = coda_lens(model, tokens, positions="last", top_k=1).predictions[..., 0]
    track = {"first answer": predictions[0], "last answer": predictions[-1]}
    if torch.equal(predictions[0], predictions[-1]):
        del track["first answer"]
    result = coda_lens(model, tokens, positions="last", top_k=1, track=track)
    return page_figure(plots.plot_ranks, result, model=model, prompts=len(tokens))
