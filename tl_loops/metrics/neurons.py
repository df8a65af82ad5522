"""Prediction, suppression and partition neurons, from the weights alone (arXiv 2401.12181).

A neuron's output direction, read by the unembedding, gives one cosine per vocabulary entry. Skew
and kurtosis of these cosines say whether the neuron promotes or suppresses few tokens. A looped
model has these statistics once per physical layer: they are the same in every iteration.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_loops.errors import ArgumentError, shortened
from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.precision import full_precision
from tl_loops.printing import prints_short

# Scores (neurons times vocabulary) held at a time, and unembedding columns converted at a time.
_SCORES_PER_CHUNK = 2**24
_COLUMNS_PER_BLOCK = 8192


@prints_short
@dataclass(frozen=True)
class NeuronStatistics:
    """Moments of the cosines between a neuron's output direction and the unembedding columns.

    Population moments over the vocabulary; a Gaussian has kurtosis 3 (not excess). A neuron without
    a direction (zero weights) is NaN throughout; where all cosines are equal up to rounding the
    variance is 0, skew and kurtosis are NaN.

    Attributes:
        variance: mean squared deviation, >= 0.
        skew: mean cubed z-score.
        kurtosis: mean fourth power of the z-score, >= 1.
    """

    variance: Float[Tensor, "*layers d_mlp"]
    skew: Float[Tensor, "*layers d_mlp"]
    kurtosis: Float[Tensor, "*layers d_mlp"]


@prints_short
@dataclass(frozen=True)
class NeuronClasses:
    """Masks of three kinds of neurons; the third overlaps with the first two.

    Attributes:
        prediction: kurtosis above the threshold and positive skew.
        suppression: kurtosis above the threshold and negative skew.
        partition: variance above the threshold.
    """

    prediction: Bool[Tensor, "*layers d_mlp"]
    suppression: Bool[Tensor, "*layers d_mlp"]
    partition: Bool[Tensor, "*layers d_mlp"]


@prints_short
@dataclass(frozen=True)
class PredictionSuppression:
    """Prediction and suppression neurons of a model, counted per physical layer.

    Attributes:
        statistics: per neuron, `[physical_layer, d_mlp]`.
        classes: per neuron, `[physical_layer, d_mlp]`.
        prediction_count: neurons per physical layer.
        suppression_count: neurons per physical layer.
        partition_count: neurons per physical layer.
        prediction_fraction: count / d_mlp.
        suppression_fraction: count / d_mlp.
        partition_fraction: count / d_mlp.
        options: how it was measured: thresholds, what was folded and centred, number of vocabulary
            entries.
    """

    statistics: NeuronStatistics
    classes: NeuronClasses
    prediction_count: Int[Tensor, "physical_layer"]
    suppression_count: Int[Tensor, "physical_layer"]
    partition_count: Int[Tensor, "physical_layer"]
    prediction_fraction: Float[Tensor, "physical_layer"]
    suppression_fraction: Float[Tensor, "physical_layer"]
    partition_fraction: Float[Tensor, "physical_layer"]
    options: dict[str, Any]


@full_precision
def neuron_vocabulary_statistics(
    W_out: Float[Tensor, "*layers d_mlp d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    gamma_final: Float[Tensor, "d_model"] | None = None,
    gamma_post: Float[Tensor, "d_model"] | Float[Tensor, "*layers d_model"] | None = None,
    vocab_mask: Bool[Tensor, "d_vocab"] | None = None,
    center: bool = False,
    chunk_size: int | None = None,
    token_scale: Float[Tensor, "d_vocab"] | None = None,
) -> NeuronStatistics:
    """Moments over the vocabulary of cos(w_out, W_U[:, v]) per neuron (arXiv 2401.12181).

    With unit vectors w = w_out / ||w_out|| and u_v = W_U[:, v] / ||W_U[:, v]||: c_v = w . u_v,
    variance = mean (c - mean c)^2, skew = mean z^3, kurtosis = mean z^4 with z = (c - mean c) /
    std. Scaling a neuron or an unembedding column changes nothing; flipping the sign of a neuron
    flips its skew. The scores are made for some neurons at a time: memory beyond the weights does
    not grow with their number.

    Args:
        W_out: MLP output weights, one row per neuron (the down projection of a gated MLP).
        W_U: unembedding.
        gamma_final: weight of the final norm, folded into `W_U`; None where it is folded already or
            absent.
        gamma_post: weight of a norm on the MLP output (sandwich norm), folded into `W_out`; one for
            all layers or one per layer.
        vocab_mask: True at the entries that count. Exclude padding: its columns are nearly constant
            and shift the kurtosis.
        center: remove from `W_U` the mean over the counted vocabulary and from both weights the
            mean over d_model, as TransformerLens's processing of LayerNorm models does; no change
            for weights processed so. Wrong for RMSNorm.
        chunk_size: neurons at a time; None keeps the scores of a chunk near 64 MB.
        token_scale: what each token's logit is multiplied by, folded into the columns of `W_U`; a
            negative one turns its column round. None where logits are not scaled.

    Returns:
        Statistics `[*layers, d_mlp]`, float32 (float64 for float64 weights).

    Raises:
        ValueError: shapes that do not fit, non-finite weights, no counted vocabulary entry, or a
            counted column of zeros, which has no direction.
    """
    dtype = torch.promote_types(statistic_dtype(W_out), statistic_dtype(W_U))
    W_out, W_U = W_out.detach(), W_U.detach()
    d_model, d_vocab = W_U.shape
    if W_out.shape[-1] != d_model:
        raise ValueError(
            f"W_out has shape {list(W_out.shape)}, expected [..., d_mlp, d_model] with "
            f"d_model={d_model} as in W_U"
        )
    columns = torch.arange(d_vocab, device=W_U.device)
    if vocab_mask is not None:
        columns = columns[vocab_mask.to(W_U.device)]
    if len(columns) == 0:
        raise ValueError("no vocabulary entry is left to count, expected at least one")
    unembedding = _Unembedding(W_U, columns, gamma_final, center, dtype, token_scale)

    neurons = W_out.reshape(-1, d_model)
    post = None
    if gamma_post is not None:
        per_neuron = gamma_post.detach()[..., None, :].expand(*W_out.shape)
        post = per_neuron.reshape(-1, d_model)
    if chunk_size is None:
        chunk_size = max(1, _SCORES_PER_CHUNK // len(columns))
    elif chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}, expected at least 1")

    moments = torch.empty(3, len(neurons), dtype=dtype, device=W_U.device)
    for start in range(0, len(neurons), chunk_size):
        chunk = slice(start, start + chunk_size)
        directions = neurons[chunk].to(W_U.device, dtype)
        if post is not None:
            directions = directions * post[chunk].to(W_U.device, dtype)
        if not directions.isfinite().all():
            raise ValueError(f"W_out has NaN or infinite weights in neurons {start} and following")
        if center:
            directions = directions - directions.mean(-1, keepdim=True)
        moments[:, chunk] = _moments(unembedding.cosines(_unit(directions)))
    variance, skew, kurtosis = moments.reshape(3, *W_out.shape[:-1])
    return NeuronStatistics(variance, skew, kurtosis)


@full_precision
def classify_neurons(
    statistics: NeuronStatistics,
    kurtosis_threshold: float | int = 10.0,
    variance_threshold: float | int = 0.005,
) -> NeuronClasses:
    """Prediction, suppression and partition neurons by the thresholds of arXiv 2401.12181.

    Args:
        statistics: per neuron.
        kurtosis_threshold: prediction and suppression neurons lie strictly above.
        variance_threshold: partition neurons lie strictly above.

    Returns:
        Boolean masks; a neuron with undefined (NaN) statistics belongs to no class.
    """
    peaked = statistics.kurtosis > kurtosis_threshold
    return NeuronClasses(
        prediction=peaked & (statistics.skew > 0),
        suppression=peaked & (statistics.skew < 0),
        partition=statistics.variance > variance_threshold,
    )


@full_precision
def prediction_suppression_neurons(
    model: Any,
    fold_final_norm: bool = True,
    fold_post_norm: bool = False,
    vocab_size: int | None = None,
    *,
    post_norm_weight: Float[Tensor, "d_model"]
    | Float[Tensor, "physical_layer d_model"]
    | None = None,
    vocab_mask: Bool[Tensor, "d_vocab"] | None = None,
    center: bool | None = None,
    kurtosis_threshold: float | int = 10.0,
    variance_threshold: float | int = 0.005,
    chunk_size: int | None = None,
) -> PredictionSuppression:
    """Count prediction and suppression neurons per physical layer (arXiv 2604.11791, E.1).

    Prelude and core neurons are judged by the unembedding too, although the coda reads them first.
    The model may be looped or a plain HookedTransformer: read are `cfg`, `W_out` (physical layers),
    `W_U` and, where they exist, `ln_final.w` and `unembed.token_scale`.

    Args:
        model: the model.
        fold_final_norm: multiply `W_U` by the final norm's weight, as the published numbers do;
            nothing to do where it is folded already.
        fold_post_norm: multiply each neuron by `post_norm_weight`, for models that norm the MLP
            output before or after adding it (Ouro, Huginn). The paper does not say which it did.
        vocab_size: ids from here on are padding of the vocabulary; None counts all.
        post_norm_weight: weight of that norm, per physical layer.
        vocab_mask: True at further ids that count.
        center: see `neuron_vocabulary_statistics`; None centres LayerNorm models and no others.
        kurtosis_threshold: see `classify_neurons`.
        variance_threshold: see `classify_neurons`.
        chunk_size: see `neuron_vocabulary_statistics`.

    Returns:
        Statistics, classes, counts and fractions per physical layer.

    Raises:
        ValueError: no dense MLP neurons, a bad `vocab_size`, `fold_post_norm` without
            `post_norm_weight` or the reverse, and as `neuron_vocabulary_statistics`.
    """
    if not hasattr(model, "cfg") or not hasattr(model, "W_U"):
        raise ArgumentError(
            f"model must have the weights W_out and W_U, as a HookedTransformer has, got "
            f"{shortened(model)}"
        )
    if getattr(model.cfg, "attn_only", False) or getattr(model.cfg, "num_experts", None):
        raise ValueError(
            "the model has no dense MLP in every layer, so there is no W_out of its neurons; call "
            "neuron_vocabulary_statistics with the output weights of one layer or expert"
        )
    if fold_post_norm != (post_norm_weight is not None):
        raise ValueError(
            "fold_post_norm=True and post_norm_weight=[physical_layer, d_model] go together, got "
            "only one of them"
        )
    W_out, W_U = model.W_out, model.W_U
    d_vocab = W_U.shape[1]
    counted = torch.ones(d_vocab, dtype=torch.bool, device=W_U.device)
    if vocab_size is not None:
        if not 1 <= vocab_size <= d_vocab:
            raise ValueError(f"vocab_size={vocab_size}, expected 1 to d_vocab={d_vocab}")
        counted[vocab_size:] = False
    if vocab_mask is not None:
        counted &= vocab_mask.to(counted.device)
    gamma_final = None
    if fold_final_norm:
        gamma_final = getattr(getattr(model, "ln_final", None), "w", None)
    if center is None:
        center = getattr(model.cfg, "normalization_type", None) in ("LN", "LNPre")

    statistics = neuron_vocabulary_statistics(
        W_out,
        W_U,
        gamma_final,
        post_norm_weight,
        counted,
        center,
        chunk_size,
        getattr(getattr(model, "unembed", None), "token_scale", None),
    )
    classes = classify_neurons(statistics, kurtosis_threshold, variance_threshold)
    counts = [mask.sum(-1) for mask in (classes.prediction, classes.suppression, classes.partition)]
    fractions = [count / W_out.shape[-2] for count in counts]
    return PredictionSuppression(
        statistics,
        classes,
        *counts,
        *fractions,
        options={
            "kurtosis_threshold": kurtosis_threshold,
            "variance_threshold": variance_threshold,
            "fold_final_norm": fold_final_norm,
            "final_norm_had_weight": gamma_final is not None,
            "fold_post_norm": fold_post_norm,
            "center": center,
            "n_vocabulary_entries": int(counted.sum()),
        },
    )


class _Unembedding:
    """The counted columns of W_U with what is folded into them, converted in blocks of columns."""

    def __init__(
        self,
        W_U: Tensor,
        columns: Tensor,
        gamma: Tensor | None,
        center: bool,
        dtype: torch.dtype,
        scale: Tensor | None,
    ):
        self.W_U = W_U
        self.scale = None if scale is None else scale.detach().to(W_U.device, dtype)
        self.dtype = dtype
        self.gamma = None if gamma is None else gamma.detach().to(W_U.device, dtype)[:, None]
        self.n_columns = len(columns)
        first, last = int(columns[0]), int(columns[-1])
        self.blocks: list[slice | Tensor] = list(columns.split(_COLUMNS_PER_BLOCK))
        if last - first + 1 == len(columns):  # slices are views, index tensors copy
            starts = range(first, last + 1, _COLUMNS_PER_BLOCK)
            self.blocks = [slice(at, min(at + _COLUMNS_PER_BLOCK, last + 1)) for at in starts]
        self.mean = None
        if center:
            total = torch.zeros(len(W_U), 1, dtype=dtype, device=W_U.device)
            for block in self.blocks:
                total += self._directions(block).sum(-1, keepdim=True)
            self.mean = total / len(columns)
        self.norm = torch.cat([self._directions(block).norm(dim=0) for block in self.blocks])
        good = (self.norm > 0) & self.norm.isfinite()
        if not good.all():
            bad = columns[~good].tolist()
            raise ValueError(
                f"W_U is zero or not finite in {len(bad)} column(s), the first are {bad[:5]}; they "
                "have no direction: exclude them with vocab_size (padding at the end) or vocab_mask"
            )

    def cosines(self, directions: Tensor) -> Tensor:
        """Cosines `[neuron, counted id]` of unit `directions` with the columns."""
        scores = directions.new_empty(len(directions), self.n_columns)
        for block, target in zip(self.blocks, scores.split(_COLUMNS_PER_BLOCK, 1), strict=True):
            target.copy_(directions @ self._directions(block))
        return scores.div_(self.norm)

    def _directions(self, block: slice | Tensor) -> Tensor:
        columns = self.W_U[:, block].to(self.dtype)
        if self.scale is not None:
            columns = columns * self.scale[block]
        if self.gamma is not None:
            columns = columns * self.gamma
        if self.mean is not None:
            columns = columns - self.mean
            columns = columns - columns.mean(0)
        return columns


def _unit(vectors: Tensor) -> Tensor:
    # Scaled first, so that the squares neither underflow nor overflow. Zero rows become NaN.
    vectors = vectors / vectors.abs().amax(-1, keepdim=True)
    return vectors / vectors.norm(dim=-1, keepdim=True)


def _moments(cosines: Tensor) -> Tensor:
    """Variance, skew and kurtosis along the last axis; overwrites its argument."""
    deviation = cosines.sub_(cosines.mean(-1, keepdim=True))
    # Cosines that differ by rounding only have no shape.
    flat = deviation.abs().amax(-1) <= 16 * torch.finfo(cosines.dtype).eps
    variance = deviation.square().mean(-1)
    z = deviation.div_(variance.sqrt()[:, None])
    z_squared = z.square()
    skew = (z_squared * z).mean(-1)
    kurtosis = z_squared.square_().mean(-1)
    undefined = torch.full_like(variance, float("nan"))
    return torch.stack(
        [
            torch.where(flat, 0, variance),
            torch.where(flat, undefined, skew),
            torch.where(flat, undefined, kurtosis),
        ]
    )
