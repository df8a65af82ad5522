"""What the model would answer after each iteration."""

from collections.abc import Sequence
from html import escape

import torch

from tl_loops import plots
from tl_loops.layout.model import Model
from tl_loops.lens import coda_lens
from tl_loops.lens.exit_curve import exit_curve
from tl_loops.report.section import (
    Section,
    answer_token,
    by_length,
    html_figure,
    percent,
    plotly_figure,
    shortened,
)
from tl_loops.tasks.prompts import PromptText

_BATCH = 64


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
    if has_answers:
        values = curve.accuracy
        finding = (
            f"Read out after one iteration the model answers {percent(values[0])} of "
            f"{len(prompts)} prompts correctly, after {T} {percent(values[-1])}; the most, "
            f"{percent(values.max())}, after {int(values.argmax()) + 1}."
        )
    else:
        values = curve.loss
        finding = (
            f"The next-token loss goes from {values[0]:.3f} nats after one iteration to "
            f"{values[-1]:.3f} after {T}; the least, {values.min():.3f}, is reached after "
            f"{int(values.argmin()) + 1}."
        )
    paragraphs = [
        finding,
        f"An answer changes {curve.flips:.1f} times along the loop on average. Leaving each "
        "prompt at its best iteration instead of the last would add "
        f"{percent(curve.oracle_headroom)} accuracy; overthinking is the share of answers that "
        "were right and are wrong at the end.",
    ]
    figure = plots.plot_exit_curves(curve, model=model)
    title = "Accuracy per iteration" if has_answers else "Loss per iteration"
    return Section("readout", title, paragraphs, [plotly_figure(figure)], finding=finding)


def answers_section(model: Model, prompts: Sequence[PromptText]) -> Section:
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
            f'<tr><td class="prompt">{escape(shortened(prompt.text))}</td>{cells}'
            f"<td>{escape(prompt.answer or '')}</td></tr>"
        )
    table = (
        '<div class="scroll"><table class="plain"><thead><tr><th>prompt</th>'
        f"{heads}<th>answer</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    when = (
        f"iteration {settled[0]} on"
        if min(settled) == max(settled)
        else f"iteration {min(settled)} to {max(settled)} on, depending on the prompt"
    )
    finding = f"On the {len(prompts)} prompts shown the answer stays the same from {when}."
    text = (
        "Each column decodes the state that leaves an iteration through all that the model does "
        "after the loop (coda lens): it is what the model would answer if it stopped there. "
        f"{finding} Green answers are right."
    )
    title = f"Answer after each iteration ({model.cfg.model_name}, coda lens, last position)"
    figures = [html_figure(title, table), _ranks(model, prompts)]
    return Section("answers", "The answer after each iteration", [text], figures, finding=finding)


def _ranks(model: Model, prompts: Sequence[PromptText]) -> str:
    """Rank of the final answer, and of what was the answer after the first iteration."""
    tokens, _ = by_length(model, prompts, [None] * len(prompts))[0]
    predictions = coda_lens(model, tokens, positions="last", top_k=1).predictions[..., 0]
    track = {"first answer": predictions[0], "last answer": predictions[-1]}
    if torch.equal(predictions[0], predictions[-1]):
        del track["first answer"]
    result = coda_lens(model, tokens, positions="last", top_k=1, track=track)
    return plotly_figure(plots.plot_ranks(result, model=model, prompts=len(tokens)))
