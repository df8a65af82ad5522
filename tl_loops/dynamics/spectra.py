"""Keys and values of all iterations in one matrix: how many directions the loop needs of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_loops.arguments import checked
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import require_layout, with_iterations
from tl_loops.metrics.geometry import rank_for_share, rank_of_spectrum
from tl_loops.metrics.precision import without_autocast
from tl_loops.runs.activations import find_activation
from tl_loops.runs.batches import batches, check_batch_size, longest_first, token_prompts
from tl_loops.runs.cells import hooked, named_hooks
from tl_loops.upstream import Prompts, left_as_it_was

if TYPE_CHECKING:
    import pandas

Stacked = Literal["iterations", "tokens"]
KeyOrValue = Literal["k", "v"]
KEYS_AND_VALUES: tuple[KeyOrValue, ...] = ("k", "v")


@dataclass(frozen=True, eq=False)
class KeyValueSpectra:
    """Singular values of keys and values stacked over iterations.

    Attributes:
        singular_values: By ``"k"`` and ``"v"``, then by physical name of the layer: [kv_head,
            value], largest first; as many values as the matrix can have.
        n_calls: How many iterations call each layer.
        stacked: How the matrices were stacked.
        n_tokens: How many tokens of all prompts are in them.
    """

    singular_values: dict[str, dict[str, Float[Tensor, "kv_head value"]]]
    n_calls: dict[str, int]
    stacked: Stacked
    n_tokens: int

    @checked
    def effective_rank(self, what: KeyOrValue) -> dict[str, Float[Tensor, "kv_head"]]:
        """By layer: exp of the entropy of σ² / Σ σ², from 1 to the number of values."""
        found = self.singular_values[what]
        return {layer: rank_of_spectrum(values) for layer, values in found.items()}

    @checked
    def rank_for_share(
        self, what: KeyOrValue, share: float | int = 0.99
    ) -> dict[str, Float[Tensor, "kv_head"]]:
        """By layer: the fewest directions that hold a share of the squared length."""
        found = self.singular_values[what]
        return {layer: rank_for_share(values, share) for layer, values in found.items()}

    @checked
    def to_frame(self, share: float | int = 0.99) -> "pandas.DataFrame":
        """One row for each layer, head, and keys or values: both ranks, and the largest."""
        import pandas

        rows = []
        for what in KEYS_AND_VALUES:
            effective, needed = self.effective_rank(what), self.rank_for_share(what, share)
            for layer, values in self.singular_values[what].items():
                for head, most in enumerate([values.shape[-1]] * values.shape[0]):
                    ranks = float(effective[layer][head]), float(needed[layer][head])
                    rows.append((layer, self.n_calls[layer], head, what, *ranks, most))
        ranks = ["effective_rank", f"rank_{share:g}", "most"]
        return pandas.DataFrame(rows, columns=["layer", "iterations", "kv_head", "what", *ranks])

    def __repr__(self) -> str:
        return (
            f"KeyValueSpectra({len(self.n_calls)} layers stacked over {self.stacked}, "
            f"{self.n_tokens} tokens)"
        )


@checked
@left_as_it_was
def key_value_spectra(
    model: Model,
    prompts: Prompts,
    *,
    stacked: Stacked = "iterations",
    keys: Literal["k", "rot_k"] = "k",
    n_iterations: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> KeyValueSpectra:
    """Spectra of the keys and values that a layer makes in all its iterations.

    With ``"iterations"`` a row is a token and holds its keys of all iterations side by side,
    [token, iteration · d_head]: a rank r far below the largest says that r numbers a token would do
    for the keys of all iterations, so that a cache of the loop is compressible. With ``"tokens"`` a
    row is a token at one iteration, [iteration · token, d_head]: whether all iterations share one
    subspace. Nothing is centred. Products are summed in float64 over prompts, so that their number
    costs no memory.

    Args:
        model: A looped model.
        prompts: Strings, or 1-D tensors of tokens.
        stacked: How the matrix of a layer and head is stacked.
        keys: ``"k"``: before the rotation; ``"rot_k"``: after it, as a cache holds them.
        n_iterations: Number of iterations.
        batch_size: Prompts of equal length in one pass at most.
        progress: Whether to show a progress bar.

    Returns:
        The singular values; values that are 0 up to rounding are of the order of 1e-8 of the
        largest.

    Raises:
        NoLoopError: The model has no loop.
        ValueError: A prompt cannot be fed, the model has no such keys, or an option is unknown.

    Source: cross-loop low rank, 2607.15456.
    """
    check_batch_size(batch_size)
    if stacked not in ("iterations", "tokens") or keys not in ("k", "rot_k"):
        raise ValueError(
            f"stacked must be 'iterations' or 'tokens' and keys 'k' or 'rot_k', got {stacked!r} "
            f"and {keys!r}"
        )
    require_layout(model)
    tokens = token_prompts(model, prompts)
    lengths = [len(t) for t in tokens]
    with with_iterations(model, n_iterations):
        calls = _calls(require_layout(model))
        points = {"k": find_activation(model, keys), "v": find_activation(model, "v")}
        grams: dict[tuple[str, str], Tensor] = {}
        order = longest_first(lengths, lengths)
        bar = tqdm(total=len(tokens), desc="spectra", disable=not progress)
        with bar, torch.no_grad(), without_autocast():
            for members in batches(order, lengths.__getitem__, batch_size):
                batch = torch.stack([tokens[i] for i in members])
                names = [p.hook_name(b) for p in points.values() for c in calls.values() for b in c]
                found = _read(model, batch, names)
                for layer, called in calls.items():
                    for what, point in points.items():
                        every = torch.stack([found[point.hook_name(b)] for b in called])
                        gram = _gram(every, stacked)
                        before = grams.get((what, layer))
                        grams[what, layer] = gram if before is None else before + gram
                bar.update(len(members))
    n_tokens, n_calls = sum(lengths), {layer: len(called) for layer, called in calls.items()}
    values = {
        what: {
            layer: _spectrum(
                grams[what, layer], n_tokens * (1 if stacked == "iterations" else n_calls[layer])
            )
            for layer in calls
        }
        for what in points
    }
    return KeyValueSpectra(values, n_calls, stacked, n_tokens)


def _calls(layout: LoopLayout) -> dict[str, list[int]]:
    """The blocks that call each physical layer of the core."""
    calls: dict[str, list[int]] = {}
    for block in range(layout.core_start, layout.coda_start):
        calls.setdefault(layout.physical_name(block), []).append(block)
    return calls


def _read(
    model: Model, tokens: Int[Tensor, "batch pos"], names: list[str]
) -> dict[str, Float[Tensor, "token kv_head d_head"]]:
    """Keys and values of one pass."""
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        # Some devices have no float64.
        found[name] = value.flatten(0, 1).to("cpu" if device.type == "mps" else device)

    with hooked(model, named_hooks(names, keep)):
        model(tokens, return_type=None, attention_mask=torch.ones_like(tokens))
    return found


def _gram(
    every: Float[Tensor, "iteration token kv_head d_head"], stacked: Stacked
) -> Float[Tensor, "kv_head column column"]:
    """MᵀM of each head's matrix, in float64."""
    per_head = every.double().permute(2, 1, 0, 3)  # [kv_head, token, iteration, d_head]
    matrix = per_head.flatten(2) if stacked == "iterations" else per_head.flatten(1, 2)
    return matrix.mT @ matrix


def _spectrum(
    gram: Float[Tensor, "kv_head column column"], n_rows: int
) -> Float[Tensor, "kv_head value"]:
    """Singular values, largest first; as many as the matrix can have."""
    values = torch.linalg.eigvalsh(gram).flip(-1).clamp(min=0).sqrt()
    return values[..., :n_rows].cpu()
