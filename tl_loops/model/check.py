"""Checks of a checkpoint: what holds of the model it gives, tried on random tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tl_loops.config.config import dtype_name
from tl_loops.errors import LoopedSemanticsError
from tl_loops.loading import open as loading
from tl_loops.model.looped import LoopedTransformer
from tl_loops.upstream import KeyValueCache

Status = Literal["ok", "failed", "not applicable"]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Largest difference, relative to the largest number, that counts as rounding."""

_BATCH, _PAD = 3, 3
_MOST_NAMED = 4


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: What was checked.
        status: ``"ok"``, ``"failed"`` or ``"not applicable"``.
        detail: What was seen, in one line.
    """

    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class CheckReport:
    """What is known of a checkpoint after all checks.

    Attributes:
        source: The directory or name.
        family: The family that it was recognised as.
        description: The data flow of the model.
        findings: One for each check, in order.
        limits: What is not guaranteed, one line each.
    """

    source: str
    family: str
    description: str
    findings: tuple[Finding, ...]
    limits: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(finding.status != "failed" for finding in self.findings)

    def __str__(self) -> str:
        width = max(len(finding.name) for finding in self.findings)
        lines = [f"{self.source}: family {self.family}", "", self.description, "", "checked"]
        lines += [
            f"  {finding.name:<{width}}  {finding.status}: {finding.detail}"
            for finding in self.findings
        ]
        lines += ["", "not guaranteed", *(f"  {limit}" for limit in self.limits), ""]
        failed = [finding.name for finding in self.findings if finding.status == "failed"]
        lines.append(f"failed: {', '.join(failed)}" if failed else "all checks passed")
        return "\n".join(lines)


class _Fails(Exception):
    """A check does not hold; the text says what was seen."""


class _DoesNotApply(Exception):
    """A check has no meaning for this model; the text says why."""


def check(
    name_or_directory: str | Path,
    n_iterations: int | None = None,
    dtype: str | torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> CheckReport:
    """Load a checkpoint and try what every looped model promises.

    Files, family, flags, tensor names and shapes are verified by loading. The model then runs on a
    few random tokens; see :func:`check_model`.

    Args:
        name_or_directory: A checkpoint directory, or a name that loads.
        n_iterations: Passes through the core; ``None``: what the checkpoint says.
        dtype: Type of the weights in memory.
        device: Where to; ``None``: TransformerLens's choice.

    Raises:
        CheckpointError: The checkpoint cannot be loaded exactly; the message names file, key,
            expected and found.
        UnknownModelError: Neither a directory nor a known name.
    """
    source = loading.resolve(name_or_directory)
    family = loading.family_of(source)
    model = LoopedTransformer.from_pretrained_no_processing(
        name_or_directory,
        n_iterations=n_iterations,
        dtype=dtype,
        allow_non_finite=True,
        **({} if device is None else {"device": device}),
    )
    n_tensors = len(source.headers.tensors)
    stored = Finding("stored tensors", "ok", f"{n_tensors} tensors, names and shapes as expected")
    findings = (stored, _tokenizer(model), *check_model(model))
    return CheckReport(
        str(name_or_directory), family.name, model.cfg.describe(), findings, _limits(model)
    )


def check_model(model: Any) -> Iterator[Finding]:
    """Try what every looped model promises, on random tokens.

    In order: finite weights; finite activations; causality (a later token changes no earlier
    logit); batch independence; left padding; decoding with a key-value cache; a restart at every
    iteration; the decomposition of the residual stream; gradients to every weight.

    Args:
        model: A looped model.

    Yields:
        One finding a check.
    """
    checks: Sequence[tuple[str, Callable[[Any, Tensor], str]]] = (
        ("finite weights", _finite_weights),
        ("finite activations", _finite_activations),
        ("causality", _causality),
        ("batch independence", _batch_independence),
        ("left padding", _left_padding),
        ("cached decoding", _cached_decoding),
        ("restart at each iteration", _restarts),
        ("decomposition", _decomposition),
        ("gradients", _gradients),
    )
    generator = torch.Generator().manual_seed(0)
    n_vocab = model.cfg.padded_vocab or model.cfg.d_vocab
    n_pos = max(2, min(10, model.cfg.n_ctx - _PAD))
    tokens = torch.randint(0, n_vocab, (_BATCH, n_pos), generator=generator)
    tokens = tokens.to(model.embed.W_E.device)
    model.eval()
    for name, function in checks:
        try:
            yield Finding(name, "ok", function(model, tokens))
        except _Fails as failure:
            yield Finding(name, "failed", str(failure))
        except _DoesNotApply as reason:
            yield Finding(name, "not applicable", str(reason))
        except LoopedSemanticsError as refused:
            yield Finding(name, "not applicable", f"refused: {refused}")


def _run(model: Any, input: Tensor, **arguments: Any) -> Tensor:
    """Logits; the mask is explicit, so that a random token is never taken for padding."""
    arguments.setdefault("attention_mask", torch.ones_like(input))
    with torch.no_grad():
        return model(input, **arguments)


def _agree(found: Tensor, expected: Tensor, what: str) -> str:
    """The largest relative difference.

    Raises:
        _Fails: It is more than rounding.
    """
    scale = expected.float().abs().max().clamp(min=1e-30)
    error = float((found.float() - expected.float()).abs().max() / scale)
    tolerance = TOLERANCES.get(expected.dtype, 5e-2)
    if not error <= tolerance:
        raise _Fails(f"{what} differ by {error:.2g} of the largest, allowed {tolerance:.0e}")
    return f"{what} agree within {error:.1g} of the largest"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _finite_weights(model: Any, tokens: Tensor) -> str:
    weights = list(model.physical_named_parameters())
    broken = [name for name, weight in weights if not bool(weight.isfinite().all())]
    if broken:
        raise _Fails(f"not finite: {_named(broken)}")
    return f"{len(weights)} weights"


def _finite_activations(model: Any, tokens: Tensor) -> str:
    broken: list[str] = []

    def watch(value: Tensor, hook: Any) -> None:
        if not bool(value.isfinite().all()):
            broken.append(hook.name)

    streams = ("hook_embed", "hook_resid_post", "hook_state_out", "unembed.hook_out")
    with model.hooks([(lambda name: name.endswith(streams), watch)]):
        logits = _run(model, tokens)
    if broken:
        raise _Fails(f"first not finite at {model.layout.alias(broken[0])}")
    return f"embedding to logits, largest logit {float(logits.abs().max()):.3g}"


def _causality(model: Any, tokens: Tensor) -> str:
    if model.cfg.attention_dir != "causal":
        raise _DoesNotApply(f"attention is {model.cfg.attention_dir} by the config")
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % (model.cfg.padded_vocab or model.cfg.d_vocab)
    before, after = _run(model, tokens)[:, :-1], _run(model, changed)[:, :-1]
    return _agree(after, before, "earlier logits under another last token")


def _batch_independence(model: Any, tokens: Tensor) -> str:
    together = _run(model, tokens)
    alone = torch.cat([_run(model, row[None]) for row in tokens])
    return _agree(alone, together, "logits of each row alone and in a batch")


def _left_padding(model: Any, tokens: Tensor) -> str:
    padding = torch.zeros_like(tokens[:, :1]).expand(-1, _PAD)
    mask = torch.cat([padding, torch.ones_like(tokens)], dim=1)
    padded = _run(model, torch.cat([padding, tokens], dim=1), attention_mask=mask)
    return _agree(padded[:, _PAD:], _run(model, tokens), "logits with and without padding")


def _cached_decoding(model: Any, tokens: Tensor) -> str:
    if model.cfg.attention_dir != "causal":
        raise _DoesNotApply(f"attention is {model.cfg.attention_dir} by the config")
    if model.cfg.kv_sharing is not None:
        raise _DoesNotApply(f"iterations share keys and values: {model.cfg.kv_sharing}")
    past = KeyValueCache.init_cache(model.cfg, tokens.device, tokens.shape[0])
    half = tokens.shape[1] // 2
    pieces = [tokens[:, :half], *tokens[:, half:].split(1, dim=1)]
    logits = torch.cat([_run(model, piece, past_kv_cache=past) for piece in pieces], dim=1)
    return _agree(logits, _run(model, tokens), "logits token by token and at once")


def _restarts(model: Any, tokens: Tensor) -> str:
    iterations = range(model.layout.n_iterations)
    mask = torch.ones_like(tokens)
    states: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        states[hook.name] = value

    points = ("hook_state_in", "hook_other_in")
    wanted = {f"iter.{t}.{point}" for t in iterations for point in points} | {"hook_injection"}
    with model.hooks([(lambda name: name in wanted, keep)]):
        logits = _run(model, tokens)
    again = [
        _run(
            model,
            states[f"iter.{t}.hook_state_in"],
            attention_mask=mask,
            start_at_iteration=t,
            injection=states.get("hook_injection"),
            other_state=states.get(f"iter.{t}.hook_other_in"),
            tokens=tokens,
        )
        for t in iterations
    ]
    return _agree(torch.stack(again), logits.expand(len(again), *logits.shape), "logits")


def _decomposition(model: Any, tokens: Tensor) -> str:
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, attention_mask=torch.ones_like(tokens))
        parts, labels = cache.decompose_resid(return_labels=True)
        whole = cache.decompose_resid(return_labels=True, incl_remainder=True)[0].sum(0)
    return _agree(parts.sum(0), whole, f"the last residual stream and its {len(labels)} parts")


def _gradients(model: Any, tokens: Tensor) -> str:
    weights = dict(model.physical_named_parameters())
    gates: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> None:
        gates.append(value)

    heads = ("hook_exit_gate", "hook_halt_logit")
    with model.hooks([(lambda name: name.endswith(heads), keep)]), torch.enable_grad():
        logits = model(tokens, attention_mask=torch.ones_like(tokens))
        loss = sum((gate.float().square().mean() for gate in gates), logits.float().square().mean())
        # Padded rows of the vocabulary get none, which is right: a weight counts as a whole.
        grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    cut, zero, broken = [], [], []
    for name, grad in zip(weights, grads, strict=True):
        if grad is None:
            cut.append(name)
        elif not bool(grad.isfinite().all()):
            broken.append(name)
        elif not bool(grad.any()):
            zero.append(name)
    for names, what in (
        (cut, "the logits do not depend on"),
        (broken, "the gradient is not finite at"),
        (zero, "the gradient is zero (is a weight after it zero?) at"),
    ):
        if names:
            raise _Fails(f"{what} {_named(names)}")
    return f"reach all {len(weights)} weights through {model.layout.n_iterations} iterations"


def _tokenizer(model: Any) -> Finding:
    tokenizer = model.tokenizer
    if tokenizer is None:
        return Finding("tokenizer", "not applicable", "none stored: the model takes tokens only")
    size = len(tokenizer)
    if size > model.cfg.d_vocab:
        detail = f"{size} tokens, but the embedding has {model.cfg.d_vocab} rows"
        return Finding("tokenizer", "failed", detail)
    return Finding("tokenizer", "ok", f"{size} tokens for {model.cfg.d_vocab} rows")


def _limits(model: Any) -> tuple[str, ...]:
    """What the checks do not show, one line each."""
    cfg = model.cfg
    limits = [
        "equal numbers in the code that trained the model: nothing was compared with it",
        f"another number of iterations than {cfg.n_iterations}: it runs, trained for it or not",
        f"other types than {dtype_name(cfg.dtype)}: rounding grows with every iteration",
    ]
    if cfg.initial_state == "normal":
        limits.append(
            "the random initial state of the code that trained it: here it is drawn by "
            f"state_seed={cfg.state_seed} and the position"
        )
    if cfg.attention_dir != "causal":
        limits.append("causality and decoding with a cache: attention sees later tokens")
    if model.tokenizer is None:
        limits.append("text: there is no tokenizer")
    return tuple(limits)
