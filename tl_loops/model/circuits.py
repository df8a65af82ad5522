"""Circuits read from the weights alone: composition, biases, weights with norms folded in."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.cache.carry import Carrier, Rows
from tl_loops.cache.path import FrozenNorm, Inject, Read, Site, Target, path_steps, working
from tl_loops.cache.places import freshly_normed
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.labels import part_labels
from tl_loops.upstream import FactoredMatrix, composition_scores


class EffectiveWeights(Mapping[str, Tensor]):
    """The weight matrices under TransformerLens's names, each with the norms next to it folded in.

    What reads the residual stream (``W_Q``, ``W_K``, ``W_V``, ``W_in``, ``W_gate``, ``W_U``) has
    the gain of its norm folded in, and the centring of LayerNorm; what writes to the stream
    (``W_O``, ``W_out``) the gain of a norm after it. Trained scales and rates next to a weight are
    folded in likewise. Up to a factor at each position, which is the
    norm's scale, these are the maps that the model applies; they do not change when norms are
    folded. The weights of the model are left alone: a matrix is made when it is asked for.
    """

    _ATTENTION = ("W_Q", "W_K", "W_V", "W_O")

    def __init__(self, model: Any):
        self._model, self._blocks = model, list(model.blocks)
        mlp = ("W_in", "W_gate", "W_out") if model.cfg.gated_mlp else ("W_in", "W_out")
        self._names = ["embed.W_E", "unembed.W_U"] + [
            f"blocks.{i}.{part}.{name}"
            for i in range(len(self._blocks))
            for part, names in (("attn", self._ATTENTION), ("mlp", mlp))
            for name in names
        ]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name == "embed.W_E":
            embed = self._model.embed
            rows = working(embed.W_E) * self._model.cfg.embed_scale
            return rows if embed.ln is None else freshly_normed(rows, embed.ln)
        if name == "unembed.W_U":
            W_U = _read_through(self._model.ln_final, self._model.unembed.W_U)
            scale = self._model.unembed.token_scale
            return W_U if scale is None else W_U * working(scale)
        _, index, part, weight = name.split(".")
        return effective_weight(self._blocks[int(index)], part, weight)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def effective_weight(block: Any, part: str, weight: str, of_sum: bool = True) -> Tensor:
    """One weight of a block with the norms next to it folded in; see :class:`EffectiveWeights`.

    Args:
        block: The block.
        part: ``"attn"`` or ``"mlp"``.
        weight: The weight's name.
        of_sum: Whether a norm on the sum, after the add, counts as next to what writes.
    """
    if any(mechanism.scales_branches(block.cfg) for mechanism in block.cfg.mechanisms):
        raise LoopedSemanticsError(
            "what the blocks of this model read and write is scaled by the iteration, so their "
            "weights have no one effect: read the raw weights from model.blocks"
        )
    raw = getattr(getattr(block, part), weight)
    for mechanism in block.cfg.mechanisms:
        raw = mechanism.effective(block, weight, raw)
    before, after = ("ln1", "ln1_post") if part == "attn" else ("ln2", "ln2_post")
    if weight in ("W_O", "W_out"):
        norm, added = getattr(block, after, None), working(raw)
        if norm is not None and (of_sum or not block.cfg.norms_sums):
            added = FrozenNorm.of(norm, None, raw.device)(added)
        for mechanism in block.cfg.mechanisms:
            share = mechanism.added(block, "attn" if part == "attn" else "mlp")
            added = added if share is None else added * working(share).to(added)
        return added
    return _read_through(getattr(block, before, None), raw)


def _read_through(norm: Any, W: Tensor) -> Tensor:
    """``W`` as it acts on what its norm reads: ``norm(x) W == x (folded W)``, but for the scale."""
    if norm is None:
        return working(W)
    return FrozenNorm.of(norm, None, W.device).adjoint(working(W).mT).mT


def all_head_labels(self: Any) -> list[str]:
    """Labels of the heads of all unrolled blocks: ``"p.L0H1"``, ``"r3.L1H4"``, ``"c.L0H2"``."""
    blocks, heads = range(self.layout.n_layers), range(self.cfg.n_heads)
    return [label for i in blocks for label in part_labels(self.layout, i, "H", heads)]


def tl_parameters(self: Any) -> EffectiveWeights:
    """Weight matrices by TransformerLens's names, with the norms next to them folded in.

    ``SVDInterpreter`` reads these; its ``layer_index`` is an unrolled block, so that all
    iterations of a layer give the same singular vectors.
    """
    return EffectiveWeights(self)


@checked
def accumulated_bias(
    self: Any, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
) -> Float[Tensor, "d_model"]:
    """What the biases of all attentions, MLPs and injections add to the stream at a block.

    Biases of the prelude go through the injections, by the architecture's own rule for the
    initial state.

    Args:
        self: The looped model.
        layer: The unrolled block; the unrolled depth means the end.
        mlp_input: Up to the block's MLP.
        include_mlp_biases: Whether ``b_out`` counts.

    Raises:
        ValueError: ``layer`` is out of range.
        LoopedSemanticsError: The sum depends on the position, because a norm stands after
            some bias.
    """
    cfg, depth = self.cfg, self.layout.n_layers
    if not 0 <= layer <= depth or (mlp_input and layer == depth):
        raise ValueError(f"layer={layer} (mlp_input={mlp_input}) is out of range: 0 to {depth}")
    biased = {"attn": cfg.attn_bias, "mlp": cfg.mlp_bias and include_mlp_biases}
    blocks = self.physical_blocks()

    def refuse(*_: Any) -> FrozenNorm:
        raise LoopedSemanticsError(
            "a norm stands between a bias and this place, so what the biases add depends on "
            "the position: take the row 'bias' of cache.get_full_resid_decomposition(layer, "
            "return_labels=True)"
        )

    def rows(site: Site) -> Rows | None:
        if site.kind == "injection_bias":
            return Rows(working(self.injection.b)[None], [site.label])
        if site.block is None or not biased[site.kind]:
            return None
        if cfg.time_conditioning:
            raise LoopedSemanticsError(
                "what a branch of this model writes is gated by the iteration, its biases "
                "too: read cache.decompose_resid instead"
            )
        if cfg.block_norm != "pre":
            refuse()
        block = blocks[self.layout.physical_name(site.block)]
        bias = block.attn.b_O if site.kind == "attn" else block.mlp.b_out
        return Rows(working(bias)[None], [site.label])

    total = torch.zeros(cfg.d_model, device=self.embed.W_E.device, dtype=cfg.dtype)
    if not any(biased.values()) and self.ln_final.b is None and not cfg.injection_bias:
        return total
    target, anew = Target(layer, mlp_input), cfg.initial_state != "embed"
    steps = list(path_steps(self, self.layout, target, refuse, anew))
    stack = Carrier(rows).run(steps, cfg.injection is not None).stack
    return total if stack is None else stack.sum(0).to(cfg.dtype)


@checked
def all_composition_scores(
    self: Any, mode: str, iterations_apart: int = 1
) -> Float[Tensor, "apart n_physical n_heads n_physical n_heads"]:
    """How much each head reads of what each earlier head writes, by iterations between them.

    ``scores[a, l1, h1, l2, h2]`` is ‖OV₁ M C₂‖ / (‖OV₁ M‖ ‖C₂‖), where C₂ is the later head's
    QK, QKᵀ or OV circuit and M is what the residual stream goes through on the direct path
    from one to the other: gains of norms, and the injection's map of the state. The norms'
    scales are factors and drop out. Gains of the norms next to a head belong to its circuits.
    Physical layers come in the order prelude, core, coda. Axis 0:

    - 0: both in one iteration (or both in the prelude, or both in the coda);
    - a: the later head a iterations on;
    - prelude to core: from the injection a iterations ago, or without one from the prelude to
      iteration a; to the coda: likewise, to the end of the last iteration;
    - core to coda: from the iteration a before the last.

    Pairs with no such path are 0. As in TransformerLens, the rotation of queries and keys is
    left out.

    Args:
        self: The looped model.
        mode: ``"Q"``, ``"K"`` or ``"V"``.
        iterations_apart: Largest number of iterations between the two heads.

    Raises:
        ValueError: Another mode, or a negative number.

    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits,
    "Composition of heads".
    """
    if mode not in ("Q", "K", "V"):
        raise ValueError(f"mode must be 'Q', 'K' or 'V', got {mode!r}")
    if iterations_apart < 0:
        raise ValueError(f"iterations_apart must be at least 0, got {iterations_apart}")
    return torch.stack([_composition(self, mode, apart) for apart in range(iterations_apart + 1)])


def _composition(
    model: Any, mode: str, apart: int
) -> Float[Tensor, "n_physical n_heads n_physical n_heads"]:
    """Composition from the first to the last of ``apart + 1`` iterations."""
    cfg, layout = model.cfg, model.layout.with_iterations(apart + 1)
    names, heads = layout.physical_names(), cfg.n_heads
    physical: dict[str, Any] = model.physical_blocks()
    device = model.embed.W_E.device
    scores = torch.zeros(len(names), heads, len(names), heads, device=device)
    writers: list[int] = []

    def block(index: int) -> Any:
        return physical[layout.physical_name(index)]

    def rows(site: Site) -> Rows | None:
        if site.kind != "attn":
            return None
        assert site.block is not None
        at = layout.coordinate(site.block)
        if (at.iteration or 0) > 0 or (apart and at.phase == "coda"):
            return None
        writers.append(names.index(layout.physical_name(site.block)))
        W_O = effective_weight(block(site.block), "attn", "W_O", of_sum=False)
        return Rows(W_O.flatten(0, 1), [site.label] * (heads * cfg.d_head))

    carrier = Carrier(rows)
    anew = cfg.injection is not None or cfg.initial_state != "embed"

    def without_scale(prefix: str, norm: Any) -> FrozenNorm:
        return FrozenNorm.of(norm, None, device)

    for step in path_steps(model, layout, Target(layout.n_layers), without_scale, anew):
        if isinstance(step, Inject) and step.site.iteration:
            continue
        if isinstance(step, Read) and carrier.stack is not None:
            at = layout.coordinate(step.block)
            last = at.phase == "coda" or at.iteration == apart
            if last or (apart == 0 and at.phase == "prelude"):
                reader = names.index(layout.physical_name(step.block))
                written = carrier.stack.unflatten(0, (len(writers), heads, cfg.d_head))
                read_by = [physical[names[w]] for w in writers]
                W_V = torch.stack([effective_weight(b, "attn", "W_V") for b in read_by])
                found = composition_scores(
                    FactoredMatrix(W_V, written), _circuit(model, mode, block(step.block))
                )
                scores[writers, :, reader] = found.nan_to_num().to(scores)
        else:
            carrier.take(step)
    return scores


def _circuit(model: Any, mode: str, block: Any) -> FactoredMatrix:
    """A block's QK, QKᵀ or OV circuit, with the gains that belong to it."""
    W_O = effective_weight(block, "attn", "W_O")
    if mode == "V":
        return FactoredMatrix(effective_weight(block, "attn", "W_V"), W_O)
    queries = _after_qk_norm(model, block.attn, "q_norm", "W_Q", block)
    keys = _after_qk_norm(model, block.attn, "k_norm", "W_K", block)
    circuit = FactoredMatrix(queries, keys.mT)
    return circuit if mode == "Q" else circuit.T


def _after_qk_norm(model: Any, attn: Any, norm: str, weight: str, block: Any) -> Tensor:
    W = effective_weight(block, "attn", weight)
    if model.cfg.qk_norm == "head_weight":
        gain = getattr(attn, norm).w
        return W if gain is None else W * working(gain)
    if model.cfg.qk_norm != "full":
        return W
    # The norm is over all (distinct) heads of a position together.
    copies = attn.groups if weight == "W_K" else 1
    flat = W[::copies].movedim(0, 1).flatten(1)
    flat = FrozenNorm.of(getattr(attn, norm), None, flat.device)(flat)
    return flat.unflatten(1, (-1, W.shape[-1])).movedim(1, 0).repeat_interleave(copies, dim=0)
