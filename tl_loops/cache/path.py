"""The residual stream of a looped model as writes and linear maps, in the order of a run.

Between two writes the stream is added to, normed (a norm on the sum, the norm between iterations,
the norm before the coda) or mixed (the injection's map of the state). With the scales of the norms
held at what they were in one run, all of these are linear.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.coordinate import BlockCoordinate
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model, norm_of_iterations
from tl_loops.layout.names import Branch


def working(x: Tensor) -> Tensor:
    """``x`` without a gradient, in float32 or better."""
    x = x.detach()
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def centred(x: Float[Tensor, "*batch d_model"], norm: Any) -> Float[Tensor, "*batch d_model"]:
    """What a norm divides by its scale: its input, for LayerNorm without the mean."""
    return x - x.mean(-1, keepdim=True) if norm.centred else x


def scale_of(x: Float[Tensor, "*batch d_model"], norm: Any) -> Float[Tensor, "*batch 1"]:
    """What a norm divides a (centred) input by."""
    if getattr(norm, "off", False):
        return torch.ones_like(x[..., :1])
    squares = x.pow(2)
    sums = getattr(norm, "sums", False)  # the norms of TransformerLens do not
    power = squares.sum(-1, keepdim=True) if sums else squares.mean(-1, keepdim=True)
    return (power + norm.eps).sqrt()


# Linear maps.


@dataclass(frozen=True)
class FrozenNorm:
    """A norm with its scale held: ``x / scale · gain``, on the centred x for LayerNorm.

    Attributes:
        scale: What the norm divided by, ``[..., 1]``; ``None`` leaves the factor out.
        gain: The trained gain, if there is one.
        bias: LayerNorm's bias, which is no part of the linear map.
        centred: Whether the mean over the last axis is taken off first.
    """

    scale: Tensor | None
    gain: Tensor | None
    bias: Tensor | None
    centred: bool

    @classmethod
    def of(
        cls, norm: Any, scale: Tensor | None, device: torch.device | None = None
    ) -> "FrozenNorm":
        """The norm module's gain and bias with a given scale."""
        device = device if scale is None else scale.device
        gain, bias = (None if p is None else working(p).to(device) for p in (norm.w, norm.b))
        return cls(None if scale is None else working(scale), gain, bias, norm.centred)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        x = centred(x, self)
        x = x if self.scale is None else x / self.scale
        return x if self.gain is None else x * self.gain

    def adjoint(self, g: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The transposed map: ``self(x) · g == x · self.adjoint(g)``."""
        g = g if self.gain is None else g * self.gain
        g = g if self.scale is None else g / self.scale
        return centred(g, self)  # taking off the mean is its own transpose


@dataclass(frozen=True)
class Mix:
    """``x @ matrix · diagonal``; ``None`` stands for the identity."""

    matrix: Tensor | None = None
    diagonal: Tensor | None = None

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        x = x if self.matrix is None else x @ self.matrix
        return x if self.diagonal is None else x * self.diagonal

    def adjoint(self, g: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The transposed map."""
        g = g if self.diagonal is None else g * self.diagonal
        return g if self.matrix is None else g @ self.matrix.T


@dataclass(frozen=True)
class Projection:
    """The orthogonal injection's ``v - (v·a) / (a·a + ε) a`` with the a of a run held.

    Attributes:
        direction: a, ``[..., d_model]``.
        injection: The module, which has ε.
    """

    direction: Tensor
    injection: Any

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return self.injection.project(x, self.direction)

    def adjoint(self, g: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The transposed map, which is the map itself."""
        return self(g)


def injection_maps(injection: Any, device: torch.device) -> tuple[Mix, Mix]:
    """The maps of the state and of e whose sum enters an iteration (``carry`` and ``prepare``)."""
    if injection.kind in ("add", "add_normed"):  # the norms are steps of their own
        return Mix(), Mix()
    if injection.kind in ("gated_diagonal", "orthogonal"):
        # Taken from the module, so that its rounding is the model's own.
        decay = injection.carry(torch.ones_like(injection.A_log))
        gate = F.softplus(injection.dt_bias)
        return (
            Mix(diagonal=working(decay).to(device)),
            Mix(working(injection.W_B).to(device), working(gate).to(device)),
        )
    return (
        Mix(working(injection.W_state).to(device)),
        Mix(working(injection.W_injection).to(device)),
    )


# Steps of a path.


@dataclass(frozen=True)
class Site:
    """A place that writes to the residual stream.

    Attributes:
        kind: What is written: ``"embed"``, ``"pos_embed"``, ``"initial_state"``, ``"state_in"``,
            ``"injection"``, ``"injection_bias"``, ``"attn"``, ``"mlp"``, ``"norm_bias"``, or a hook
            point between iterations that a mechanism adds (``"step_embedding"``).
        label: Its name in a decomposition, e.g. ``"r3.1_mlp_out"``.
        block: The unrolled block of an attention or MLP output.
        iteration: The iteration of an injection, of a state or of a norm's bias.
        norm: The norm that owns a norm's bias.
    """

    kind: str
    label: str
    block: int | None = None
    iteration: int | None = None
    norm: FrozenNorm | None = None

    @property
    def is_own(self) -> bool:
        """Whether it is neither of a block nor the bias of a norm."""
        return self.block is None and self.kind != "norm_bias"


class Read(NamedTuple):
    """The attention of a block reads the stream here."""

    block: int


class Write(NamedTuple):
    """Something is added to the stream."""

    site: Site


class Map(NamedTuple):
    """The stream goes through a linear map."""

    map: FrozenNorm | Mix | Projection


class BeginLoop(NamedTuple):
    """The stream becomes e; with ``replaced`` the state starts anew rather than as e."""

    replaced: bool


class Inject(NamedTuple):
    """``prepare(e)`` is added to the stream."""

    prepare: Mix | FrozenNorm
    site: Site


Step = Read | Write | Map | BeginLoop | Inject
Freeze = Callable[[str, Any], FrozenNorm]
"""Makes a frozen norm from the prefix of its hook names and its module."""


@dataclass(frozen=True)
class Target:
    """The place in a run that components are carried to.

    Attributes:
        layer: What enters this block; with the unrolled depth, what enters the final norm.
        mlp_input: Rather what enters the block's MLP.
        state_out: Rather the state that leaves this iteration.
    """

    layer: int
    mlp_input: bool = False
    state_out: int | None = None


@lru_cache(maxsize=32)
def _described(layout: LoopLayout) -> list[tuple[BlockCoordinate, str, str]]:
    """Coordinate, label and physical name of every block."""
    names = [layout.physical_name(index) for index in range(layout.n_layers)]
    return list(zip(layout.coordinates(), layout.labels(), names, strict=True))


def path_steps(
    model: Model,
    layout: LoopLayout,
    target: Target,
    freeze: Freeze,
    replaced: bool,
    from_iteration: int | None = None,
    device: torch.device | None = None,
    injected: Callable[[], Tensor] | None = None,
) -> Iterator[Step]:
    """Everything that happens to the residual stream from the embedding to a target.

    Args:
        model: The looped model, for its norms and its injection.
        layout: Layout of the run.
        target: Where the path ends.
        freeze: Makes frozen norms.
        replaced: Whether the state before iteration 0 is something else than e.
        from_iteration: Leave out what happened in the loop before this iteration, and take the
            state that enters it as given.
        device: Where the maps go; ``None``: where the weights are.
        injected: Gives the e of a run, which an orthogonal injection projects by; ``None``: there
            is no run.

    Raises:
        ValueError: ``from_iteration`` lies after the target.
        LoopedSemanticsError: A mechanism of the loop makes the stream no sum along one path.
    """
    cfg, blocks = model.cfg, model.physical_blocks()
    first = from_iteration or 0
    norm_sum = cfg.norms_sums
    carry: Mix = Mix()
    prepare: Mix | FrozenNorm = Mix()
    if cfg.injection is not None:
        carry, prepare = injection_maps(model.injection, device or model.embed.W_E.device)
    if from_iteration is not None:
        enters = layout.index(iteration=from_iteration, layer=0)
        passed = target.state_out is not None and target.state_out < from_iteration
        if passed or target.layer < enters:
            raise ValueError(f"from_iteration={from_iteration} lies after the place asked for")

    def normed(prefix: str, norm: Any, label: str, iteration: int | None) -> Iterator[Step]:
        frozen = freeze(prefix, norm)
        yield Map(frozen)
        if frozen.bias is not None:
            yield Write(Site("norm_bias", f"{label}_norm_bias", iteration=iteration, norm=frozen))

    readout = cfg.readout.over(layout)

    def before_add(branch: Branch, index: int, block: Any) -> Iterator[Step]:
        """What a block makes of the stream before it adds a branch."""
        if cfg.block_norm == "stream":
            name = "ln1" if branch == "attn" else "ln2"
            label = f"{layout.label(index)}_{branch}"
            yield from normed(f"blocks.{index}.{name}", getattr(block, name), label, None)
        for mechanism in cfg.mechanisms:
            share = mechanism.kept(block, branch)
            if share is not None:
                yield Map(Mix(diagonal=working(share).to(device or share.device)))

    def enter_coda() -> Iterator[Step]:
        for step in readout.before_coda:
            if step.kind == "norm":
                yield from normed(step.prefix, model.ln_final, "coda", None)
            else:
                W = model.coda_in.W
                yield Map(Mix(working(W).to(device or W.device)))

    coda_start = layout.coda_start
    yield Write(Site("embed", "embed"))
    if cfg.positional_embedding_type == "standard":
        yield Write(Site("pos_embed", "pos_embed"))
    for index, (at, label, physical) in enumerate(_described(layout)):
        t = at.iteration
        if t is not None and t < first:
            continue
        if t is not None and at.layer == 0:
            if t == first and cfg.norm_injection:
                yield from normed("ln_injection", model.ln_injection, "injection", None)
            if t == first and from_iteration is not None:
                yield BeginLoop(True)
                yield Write(Site("state_in", f"r{t}_state_in", iteration=t))
            elif t == 0:
                yield BeginLoop(replaced)
                if replaced:
                    yield Write(Site("initial_state", "initial_state"))
            for mechanism in cfg.mechanisms:
                on_path = mechanism.path(cfg)
                if on_path.refused is not None:
                    raise LoopedSemanticsError(on_path.refused)
                for point in on_path.adds:
                    yield Write(Site(point, f"r{t}_{point}", iteration=t))
            if cfg.injection is not None:
                if cfg.injection == "add_normed":
                    prefix = f"iter.{t}.ln_state"
                    yield from normed(prefix, model.iter[0].ln_state, f"r{t}_state", t)
                    prepare = freeze("ln_injection", model.ln_injection)
                yield Map(carry)
                if model.injection.kind == "orthogonal":
                    yield Map(_projection(model.injection, injected, device))
                yield Inject(prepare, Site("injection", f"r{t}_injection", iteration=t))
                if model.injection.b is not None:
                    yield Write(Site("injection_bias", f"r{t}_injection_bias", iteration=t))
        if index == coda_start:
            yield from enter_coda()
        if target.state_out is None and index == target.layer and not target.mlp_input:
            return
        block = blocks[physical]
        yield Read(index)
        yield from before_add("attn", index, block)
        yield Write(Site("attn", f"{label}_attn_out", index))
        if norm_sum:
            prefix = f"blocks.{index}.ln1_post"
            yield from normed(prefix, block.ln1_post, f"{label}_attn", t)
        if target.state_out is None and index == target.layer:
            return
        yield from before_add("mlp", index, block)
        if not cfg.attn_only:
            yield Write(Site("mlp", f"{label}_mlp_out", index))
        if norm_sum:
            yield from normed(f"blocks.{index}.ln2_post", block.ln2_post, f"{label}_mlp", t)
        if t is not None and layout.ends_at(index) == t:
            prefix = readout.iteration_norm(t)
            # The final norm is not on the path to the end, which it reads.
            if prefix is not None and (prefix != "ln_final" or target.state_out == t):
                yield from normed(prefix, norm_of_iterations(model), f"r{t}", t)
            if target.state_out == t:
                return
            if t == layout.n_iterations - 1:
                for mechanism in cfg.mechanisms:
                    after_loop = mechanism.path_after_loop(cfg)
                    if after_loop.refused is not None:
                        raise LoopedSemanticsError(after_loop.refused)
    if not readout.has_coda:
        yield from enter_coda()


def _projection(
    injection: Any, injected: Callable[[], Tensor] | None, device: torch.device | None
) -> Projection:
    if injected is None:
        raise LoopedSemanticsError(
            "injection='orthogonal' takes off the state what lies along the injected update of a "
            "run, so weights alone do not say what reaches a head: decompose a cached run instead"
        )
    with torch.no_grad():
        update = injection.prepare(injected().to(injection.W_B))
    return Projection(working(update).to(device or update.device), injection)
