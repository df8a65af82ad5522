"""Forced-exit curves: what the model would have said had it left the loop at each iteration."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import require_layout, with_iterations
from tl_loops.lens.decode import CodaLens
from tl_loops.lens.points import LensPoint, select_points
from tl_loops.lens.tracked_tokens import check_known
from tl_loops.metrics.answers import oracle_headroom, overthinking
from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.readout import kl_divergence, predicted_tokens
from tl_loops.printing import prints_short
from tl_loops.runs.batch_file import SavedRun
from tl_loops.runs.batches import (
    check_batch_size,
    equal_batches,
    token_prompts,
    tokens_alone,
)
from tl_loops.runs.identity import identity_of, prompts_fingerprint
from tl_loops.runs.in_batches import Batch, Run, Split, run_in_batches
from tl_loops.runs.inputs import LensInputs
from tl_loops.runs.merge import merge_runs
from tl_loops.runs.moments import Moments
from tl_loops.runs.running_moments import RunningMoments, batch_moments
from tl_loops.runs.shards import Shards
from tl_loops.upstream import Prompts, left_as_it_was

if TYPE_CHECKING:
    import pandas

_CURVES = ("loss", "accuracy", "kl_to_last", "flip_rate", "overthinking")


@prints_short
@dataclass(frozen=True, eq=False)
class ExitCurve:
    """Quality of the readout at each iteration of one trajectory, over prompts.

    One prompt is one sample: its targets are averaged first. A prompt's *answers* are its targets
    one by one, or with answers given the whole answer, which is right when all of its tokens are.

    Attributes:
        moments: Moments [iteration] of the curves below by name, and [] of ``"oracle_headroom"``.
        n_prompts: Number of prompts.
        n_targets: Number of predicted tokens.
        shard: The shard of a run that this is, with the numbers of each of its batches; ``None``
            for a whole one.
        has_answers: Whether answers were given, and not every next token predicted.
    """

    moments: Mapping[str, Moments]
    n_prompts: int
    n_targets: int
    shard: SavedRun | None = None
    has_answers: bool = True

    @property
    def loss(self) -> Float[Tensor, "iteration"]:
        """Cross entropy of the targets in nats over the whole vocabulary, as the model's own."""
        return self.moments["loss"].mean

    @property
    def accuracy(self) -> Float[Tensor, "iteration"]:
        """Share of right answers."""
        return self.moments["accuracy"].mean

    @property
    def kl_to_last(self) -> Float[Tensor, "iteration"]:
        """KL(last || t) in nats at the targets; 0 at the last iteration by construction."""
        return self.moments["kl_to_last"].mean

    @property
    def flip_rate(self) -> Float[Tensor, "iteration"]:
        """Share of answers that differ from those one iteration before; NaN at the first."""
        return self.moments["flip_rate"].mean

    @property
    def overthinking(self) -> Float[Tensor, "iteration"]:
        """Share of answers that are right here and wrong at the last (arXiv 2511.08577)."""
        return self.moments["overthinking"].mean

    @property
    def flips(self) -> float:
        """How often an answer changes along the trajectory, on average."""
        return float(self.flip_rate[1:].sum())

    @property
    def oracle_headroom(self) -> float:
        """Accuracy that a perfect choice of the exit would add to the last iteration's."""
        return float(self.moments["oracle_headroom"].mean)

    def std(self, curve: str, ddof: int = 1) -> Float[Tensor, "iteration"]:
        """Standard deviation over prompts of one of the curves."""
        return self.moments[curve].std(ddof)

    def to_frame(self) -> "pandas.DataFrame":
        """A tidy table with columns curve, iteration, mean, std, count and undefined."""
        import pandas

        rows = []
        for curve in _CURVES:
            m = self.moments[curve]
            for t in (m.count + m.undefined).nonzero().flatten().tolist():
                at = (m.mean[t], m.std()[t], m.count[t], m.undefined[t])
                rows.append((curve, t, *(value.item() for value in at)))
        columns = ["curve", "iteration", "mean", "std", "count", "undefined"]
        return pandas.DataFrame(rows, columns=columns)

    def merge(self, *others: "ExitCurve") -> "ExitCurve":
        """The curve of the whole run that shards make up, to the bits of one process.

        Raises:
            ValueError: One of them is no shard.
            CheckpointError: A shard is missing, unfinished, given twice, or of another run; the
                message names it.
        """
        shards = []
        for curve in (self, *others):
            if curve.shard is None:
                raise ValueError(
                    "a whole exit curve cannot be merged: pass exit_curve(shard=(k, n))"
                )
            shards.append(curve.shard)
        whole = merge_runs(shards)
        n_points = whole.run.about["n_points"]
        added = _empty_sums(n_points)
        for number, batch in whole.batches.items():
            added.add(number, batch)
        return _curve(added, n_points, self.has_answers)


def _empty_sums(n_points: int) -> RunningMoments:
    """Moments of no batch yet; counts are prompts and targets."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_CURVES, (n_points,))
    return RunningMoments(
        {**shapes, "flip_rate": (n_points - 1,), "oracle_headroom": ()},  # one flip a step
        n_counts=2,
    )


def _curve(
    added: RunningMoments, n_points: int, has_answers: bool, shard: SavedRun | None = None
) -> ExitCurve:
    flips = added.moments["flip_rate"].scattered(range(1, n_points), n_points)
    n_prompts, n_targets = added.counts
    moments = {**added.moments, "flip_rate": flips}
    return ExitCurve(moments, n_prompts, n_targets, shard, has_answers)


@checked
@left_as_it_was
@torch.no_grad()
def exit_curve(
    model: Model,
    prompts: Prompts,
    answers: Sequence[Any] | None = None,
    n_iterations: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
) -> ExitCurve:
    """Loss, accuracy, KL to the last iteration, flips and overthinking at each iteration.

    All from one trajectory: the state that leaves each iteration goes through all that the model
    does after the loop (:class:`tl_loops.lens.CodaLens`), which is what ``model(tokens,
    n_iterations=t + 1)`` gives. Separates the trajectory from the readout as in arXiv 2607.20519.
    One state an iteration is held for a batch, and the logits of two iterations. Padding of the
    vocabulary is never an answer and has no part in the KL.

    Args:
        model: A looped model.
        prompts: Strings, or lists or 1-D tensors of token ids, each measured at its own length.
        answers: One for each prompt: text (tokenised as it stands, without BOS), a token or a 1-D
            tensor of tokens, which follows the prompt and is predicted token by token. ``None``:
            every token of a prompt after its first is predicted.
        n_iterations: Number of iterations; ``None``: the model's.
        batch_size: Prompts of equal length in one pass at most.
        progress: Whether to show a progress bar.
        checkpoint: A file to which every batch is added, as for :func:`tl_loops.measure`.
        shard: Which part of the prompts, as for :func:`tl_loops.measure`; shards merge with
            :meth:`ExitCurve.merge`.

    Returns:
        The curves over prompts.

    Raises:
        TypeError: The model has no loop; prompts are neither text nor tensors, or both.
        ValueError: A bad prompt or answer; the message names it.
        CheckpointError: The checkpoint is damaged or of another run, or the run can be neither
            resumed nor cut into shards.
    """
    require_layout(model)
    _check_exits(model.cfg)
    check_batch_size(batch_size)
    tokens, n_targets = _with_answers(model, prompts, answers)
    keys = [(t.shape[0], n) for t, n in zip(tokens, n_targets, strict=True)]
    members = equal_batches(keys, [length for length, _ in keys], batch_size)
    device = next(model.parameters()).device
    split = Split(shard, checkpoint)
    split.check(model, merges=True)
    with with_iterations(model, n_iterations):
        points = select_points(model, "states")

        def compute(number: int) -> Batch:
            batch = torch.stack([tokens[i] for i in members[number]]).to(device)
            n = n_targets[members[number][0]]
            values = _batch(model, batch, n, answers is not None, points)
            return batch_moments(values, (batch.shape[0], n * batch.shape[0]))

        def identify() -> dict[str, Any]:
            return identity_of(
                model,
                prompts=prompts_fingerprint(tokens),
                n_targets=prompts_fingerprint([torch.tensor(n_targets)]),
                answers=answers is not None,
                batch_size=batch_size,
            )

        added = _empty_sums(len(points))
        sizes = [len(batch) for batch in members]
        run = Run("exit curve", sizes, identify, {"n_points": len(points)})
        part = run_in_batches(run, compute, added.add, split, progress)
        return _curve(added, len(points), answers is not None, part)


def _check_exits(cfg: Any) -> None:
    """Raise on loops whose states are not what fewer iterations would leave."""
    if getattr(cfg, "time_conditioning", False) is True:
        raise LoopedSemanticsError(
            "the blocks of this model know how many iterations there are, so a state on the way is "
            "not what fewer iterations leave: run the model with each n_iterations"
        )
    if getattr(cfg, "stacks", None) is not None:
        raise LoopedSemanticsError(
            "the iterations of this model are calls of two stacks, of which one is read out: run "
            "the model with each n_iterations"
        )


def _with_answers(
    model: Model, prompts: Prompts, answers: Sequence[Any] | None
) -> tuple[list[Int[Tensor, "_"]], list[int]]:
    """Prompts with their answers after them, and how many of the last tokens are targets."""
    if answers is None:
        tokens = token_prompts(model, prompts, at_least=2)
        return tokens, [prompt.shape[0] - 1 for prompt in tokens]
    tokens = token_prompts(model, prompts)
    if len(answers) != len(tokens):
        raise ValueError(f"got {len(tokens)} prompts but {len(answers)} answers")
    joined, n_targets = [], []
    for number, (prompt, answer) in enumerate(zip(tokens, answers, strict=True)):
        if isinstance(answer, str):
            text = answer
            answer = tokens_alone(model, f"answer {number}", answer, prepend_bos=False)
            check_known(model, f"answer {number}", text, answer.tolist())
        ids = torch.as_tensor(answer).reshape(-1).cpu()
        if not ids.numel() or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"answer {number} is {answer!r}, expected text or integer token ids")
        d_vocab = model.cfg.d_vocab
        if not 0 <= int(ids.min()) <= int(ids.max()) < d_vocab:
            raise ValueError(f"answer {number} is {ids.tolist()}, expected ids below {d_vocab}")
        whole = torch.cat([prompt, ids.long()])
        if whole.shape[0] - 1 > model.cfg.n_ctx:
            raise ValueError(
                f"prompt {number} and its answer have {whole.shape[0]} tokens, but the context is "
                f"cfg.n_ctx={model.cfg.n_ctx}"
            )
        joined.append(whole)
        n_targets.append(ids.shape[0])
    return joined, n_targets


def _batch(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    n_targets: int,
    one_answer: bool,
    points: Sequence[LensPoint],
) -> dict[str, Float[Tensor, "*iteration batch"]]:
    """The curves of each prompt, whose last tokens are targets."""
    batch, n_tokens = tokens.shape
    targets = tokens[:, -n_targets:]
    # An answer's last token is only predicted, while a prompt is read as the model's loss reads it.
    seen = tokens[:, :-1] if one_answer else tokens
    read = torch.arange(n_tokens - 1 - n_targets, n_tokens - 1, device=tokens.device)
    read = read.expand(batch, -1)
    mask = torch.ones_like(seen, dtype=torch.bool)  # no token is padding
    inputs = LensInputs(seen, mask, read)
    states: list[Tensor] = []
    hooks = [(point.name, lambda x, hook: states.append(x)) for point in points]
    model.run_with_hooks(seen, fwd_hooks=hooks, return_type=None, attention_mask=mask)

    vocabulary = model.cfg.padded_vocab
    lens, last = CodaLens(), None
    loss, kl, predictions = [], [], []
    for point, state in reversed(list(zip(points, states, strict=True))):
        logits = lens.logits(model, state, point, inputs)
        logits = logits.to(statistic_dtype(logits))
        last = logits if last is None else last
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss.append(cross_entropy.view(batch, n_targets).mean(-1))
        kl.append(kl_divergence(last, logits, vocabulary).mean(-1))
        predictions.append(predicted_tokens(logits, vocabulary))

    predicted = torch.stack(predictions[::-1])  # [iteration, batch, target]
    right, same = predicted == targets, predicted[1:] == predicted[:-1]
    if one_answer:
        right, same = right.all(-1, keepdim=True), same.all(-1, keepdim=True)
    by_prompt = right.unbind(1)
    return {
        "loss": torch.stack(loss[::-1]),
        "accuracy": right.float().mean(-1),
        "kl_to_last": torch.stack(kl[::-1]),
        "flip_rate": (~same).float().mean(-1),
        "overthinking": torch.stack([overthinking(prompt) for prompt in by_prompt], dim=-1),
        "oracle_headroom": torch.stack([oracle_headroom(prompt) for prompt in by_prompt]),
    }
