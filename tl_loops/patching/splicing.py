"""Splicing: an autoencoder's reconstruction in the place of an activation, and what that costs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_loops.arguments import checked
from tl_loops.errors import did_you_mean
from tl_loops.layout.model import Model
from tl_loops.layout.names import spec_of
from tl_loops.layout.of_model import layout_of
from tl_loops.printing import prints_short
from tl_loops.runs.batches import check_batch_size, equal_batches, token_prompts
from tl_loops.runs.moments import Moments
from tl_loops.upstream import left_as_it_was

if TYPE_CHECKING:
    import pandas

HookList = list[tuple[str, Callable]]
Names = str | Sequence[str]


@prints_short
@dataclass(frozen=True, eq=False)
class SpliceResult:
    """How well an autoencoder stands in for an activation, at each of some hook points.

    Losses are next-token cross-entropies in nats, means over all tokens that are predicted.

    Attributes:
        names: The hook points, by canonical name.
        labels: Where they are, such as ``"r2.1"``; the name itself between blocks.
        explained_variance: 1 - Σ‖x - x̂‖² / Σ‖x - x̄‖² over all spliced tokens, [name], at most 1;
            NaN where the activation does not vary.
        loss: Of the run as it is.
        spliced_loss: Of the run with x̂ in the place of x, [name].
        zero_loss: Of the run with zeros in the place of x, [name].
        n_tokens: Number of predicted tokens.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    explained_variance: Float[Tensor, "name"]
    loss: float
    spliced_loss: Float[Tensor, "name"]
    zero_loss: Float[Tensor, "name"]
    n_tokens: int

    @property
    def recovered_loss(self) -> Float[Tensor, "name"]:
        """(zero - spliced) / (zero - plain) of the losses, [name].

        1: the reconstruction is as good as the activation; 0: it is as bad as zeros. NaN where
        zeros cost nothing.
        """
        gap = self.zero_loss - self.loss
        return torch.where(gap == 0, torch.nan, (self.zero_loss - self.spliced_loss) / gap)

    def to_frame(self) -> "pandas.DataFrame":
        """One row for each hook point."""
        import pandas

        columns = ("explained_variance", "recovered_loss", "spliced_loss", "zero_loss")
        numbers = {column: getattr(self, column).tolist() for column in columns}
        return pandas.DataFrame({"name": self.names, "label": self.labels, **numbers})


@checked
def splice_hooks(autoencoder: Any, names: Names, first_pos: int = 0) -> HookList:
    """Hooks that put an autoencoder's reconstruction of an activation in its place.

    Args:
        autoencoder: Has ``encode`` and ``decode``, as those of SAELens; ``decode(encode(x))`` is
            of the shape of x. It runs in its own dtype and on its own device.
        names: One or several hook names; with several, all are spliced in one run.
        first_pos: The positions before it stay as they are.

    Returns:
        Pairs for ``run_with_hooks`` or ``model.hooks``. Gradients go through the autoencoder.

    Raises:
        TypeError: The autoencoder lacks ``encode`` or ``decode``.
        ValueError: No name. In the run: a reconstruction of another shape.
    """
    _check_autoencoder(autoencoder, first_pos)
    put = partial(_put_reconstruction, autoencoder, first_pos)
    return [(name, put) for name in _listed(names)]


@checked
@left_as_it_was
def splice(
    model: Model,
    prompts: Iterable[Any],
    autoencoder: Any,
    names: Names,
    *,
    first_pos: int = 0,
    loss_on: Literal["all", "last"] = "all",
    batch_size: int = 8,
    progress: bool = True,
) -> SpliceResult:
    """Explained variance and recovered loss of an autoencoder at some hook points, each alone.

    With ``loop_hooks.every_iteration(model, "resid_post", layer=1)`` as names: of one autoencoder
    at every iteration. Each number is of whole runs, so that a perfect autoencoder has a recovered
    loss of exactly 1, and one that gives zeros exactly 0.

    Args:
        model: A looped model, or a plain HookedTransformer.
        prompts: Texts, or 1-D tensors of token ids, of at least two tokens. Equal lengths run
            together; nothing is padded.
        autoencoder: As in :func:`splice_hooks`.
        names: Hook names, also those by coordinate.
        first_pos: As in :func:`splice_hooks`: 1 leaves out BOS, whose norm is often far from all
            others. Zeros are put in from there, too, and the explained variance is of these tokens.
        loss_on: ``"all"``: every token but the first is predicted; ``"last"``: only the last token
            of each prompt, for prompts that end in their answer.
        batch_size: Prompts in a forward pass at most.
        progress: Whether to show a progress bar.

    Raises:
        TypeError: The autoencoder lacks ``encode`` or ``decode``; prompts of another kind.
        ValueError: No prompt or no name, a hook point that does not exist or does not fire, a
            reconstruction of another shape, no position left.

    Source: "loss recovered" against zeros, as in 2404.16014.
    """
    _check_autoencoder(autoencoder, first_pos)
    check_batch_size(batch_size)
    points, labels = zip(*(_place(model, name) for name in _listed(names)), strict=True)
    tokens = token_prompts(model, prompts, at_least=max(2, first_pos + 1))
    lengths = [len(row) for row in tokens]
    device, loss = next(model.parameters()).device, partial(_loss, model, loss_on == "last")
    plain, spliced, zero = 0.0, [0.0] * len(points), [0.0] * len(points)
    left, spread = [0.0] * len(points), dict[int, Moments]()
    bar = tqdm(total=len(tokens), desc="splice", unit="prompt", disable=not progress)
    with torch.no_grad(), bar:
        for rows in equal_batches(lengths, lengths, batch_size):
            batch = torch.stack([tokens[row] for row in rows]).to(device)
            plain += loss(batch)
            for k, name in enumerate(points):
                seen: list[tuple[float, Moments]] = []
                note = partial(_note_and_put, autoencoder, first_pos, seen)
                spliced[k] += loss(batch, (name, note))
                if len(seen) != 1:
                    raise ValueError(
                        f"{name!r} fired {len(seen)} times in one run, expected once: only then "
                        "is it one activation"
                    )
                left[k] += seen[0][0]
                spread[k] = spread[k].merge(seen[0][1]) if k in spread else seen[0][1]
                zero[k] += loss(batch, (name, partial(_put_zeros, first_pos)))
            bar.update(len(rows))
    n = len(lengths) if loss_on == "last" else sum(lengths) - len(lengths)
    total = torch.stack([spread[k].m2.sum() for k in range(len(points))])
    share = torch.tensor(left, dtype=torch.float64) / total
    return SpliceResult(
        names=points,
        labels=labels,
        explained_variance=torch.where(total == 0, torch.nan, 1 - share),
        loss=plain / n,
        spliced_loss=torch.tensor(spliced, dtype=torch.float64) / n,
        zero_loss=torch.tensor(zero, dtype=torch.float64) / n,
        n_tokens=n,
    )


def _loss(
    model: Model, last: bool, tokens: Tensor, edit: tuple[str, Callable] | None = None
) -> float:
    """Sum of the next-token cross-entropies of a run."""
    logits = model.run_with_hooks(tokens, fwd_hooks=[] if edit is None else [edit])
    first = tokens.shape[1] - 2 if last else 0
    predicted, true = logits[:, first:-1].flatten(0, 1), tokens[:, first + 1 :].flatten()
    return float(F.cross_entropy(predicted.cpu().double(), true.cpu(), reduction="sum"))


def _reconstruction(autoencoder: Any, x: Tensor, name: str) -> Tensor:
    """decode(encode(x)), computed where and as the autoencoder is."""
    own, code = x, autoencoder  # isinstance narrows the type of one name alone
    if isinstance(autoencoder, nn.Module):
        own = next((p for p in autoencoder.parameters() if p.is_floating_point()), x)
    given = x.to(own.device, own.dtype)
    found = code.decode(code.encode(given))
    if not isinstance(found, Tensor) or found.shape != x.shape:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"decode(encode(x)) at {name!r} must be {list(x.shape)}, got {got}")
    return found.to(x.device, x.dtype)


def _put_reconstruction(autoencoder: Any, first_pos: int, x: Tensor, hook: Any) -> Tensor:
    new = _reconstruction(autoencoder, x[:, first_pos:], hook.name)
    return torch.cat([x[:, :first_pos], new], dim=1)


def _note_and_put(
    autoencoder: Any, first_pos: int, seen: list[tuple[float, Moments]], x: Tensor, hook: Any
) -> Tensor:
    """The same, and what is left of x there, and how x varies."""
    new = _put_reconstruction(autoencoder, first_pos, x, hook)
    old, found = (y[:, first_pos:].flatten(0, 1).cpu().double() for y in (x, new))
    seen.append((float((old - found).square().sum()), Moments.of(old.movedim(0, -1))))
    return new


def _put_zeros(first_pos: int, x: Tensor, hook: Any) -> Tensor:
    return torch.cat([x[:, :first_pos], torch.zeros_like(x[:, first_pos:])], dim=1)


def _check_autoencoder(autoencoder: Any, first_pos: int) -> None:
    for name in ("encode", "decode"):
        if not callable(getattr(autoencoder, name, None)):
            raise TypeError(
                f"{type(autoencoder).__name__} has no method {name!r}: an autoencoder has encode "
                "and decode, as those of SAELens"
            )
    if first_pos < 0:
        raise ValueError(f"first_pos counts positions from 0, got {first_pos}")


def _listed(names: Names) -> list[str]:
    listed = [names] if isinstance(names, str) else list(names)
    if not listed:
        raise ValueError("names is empty: name at least one hook point")
    return listed


def _place(model: Model, name: str) -> tuple[str, str]:
    """The canonical name of a hook point with positions, and its label."""
    layout = layout_of(model)
    canonical = name if layout is None else layout.canonical_name(name)
    if canonical not in model.hook_dict:
        hint = did_you_mean(name, model.hook_dict, "see model.hook_dict", quoted=True)
        raise ValueError(f"no hook point is called {name!r}: {hint}")
    spec = spec_of(canonical)
    if spec is not None and spec.axes[:2] != ("batch", "pos"):
        raise ValueError(
            f"{name!r} is {list(spec.axes)}: an autoencoder is spliced in where axis 1 is pos"
        )
    kind, _, rest = canonical.partition(".")
    if layout is None or kind != "blocks":
        return canonical, canonical
    return canonical, layout.label(int(rest.split(".")[0]))
