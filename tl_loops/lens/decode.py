"""From a residual to logits: through the final norm alone, or through all that follows the loop."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.model import Model, norm_of_iterations
from tl_loops.lens.points import LensPoint, PointSet
from tl_loops.runs.inputs import LensInputs
from tl_loops.upstream import apply_softcap


@runtime_checkable
class Lens(Protocol):
    """Turns what is read at a point into logits."""

    @property
    def name(self) -> str:
        """What results call it."""
        ...

    @property
    def points(self) -> PointSet | Sequence[str]:
        """The points that it reads when none are asked for."""
        ...

    def check(self, model: Model, points: Sequence[LensPoint]) -> None:
        """Raise on a model or a point that this lens cannot read, before anything runs."""
        ...

    def reads_sequence(self, point: LensPoint) -> bool:
        """Whether a position's logits depend on the residual at other positions."""
        ...

    def logits(
        self,
        model: Model,
        resid: Float[Tensor, "batch in_pos d_model"],
        point: LensPoint,
        inputs: LensInputs,
    ) -> Float[Tensor, "batch read d_vocab"]:
        """Logits at the positions that are read.

        Args:
            model: The model that gave the residual.
            resid: What was read: at all positions if :meth:`reads_sequence`, else at those of
                ``inputs``.
            point: Where it was read.
            inputs: The prompts.
        """
        ...


class LogitLens:
    """Final norm and unembedding applied to any residual (nostalgebraist 2020)."""

    name = "logit"
    points: PointSet | Sequence[str] = "blocks"

    def check(self, model: Model, points: Sequence[LensPoint]) -> None:
        """Every model and every point can be read."""

    def reads_sequence(self, point: LensPoint) -> bool:
        """No: the final norm and the unembedding act on each position alone."""
        return False

    def logits(
        self, model: Model, resid: Tensor, point: LensPoint, inputs: LensInputs
    ) -> Float[Tensor, "batch read d_vocab"]:
        """Logits of the residual [batch, read, d_model]."""
        final = model.cfg.readout.final_steps(_is_normed(model, point))
        return unembed(model, model.ln_final(resid) if final else resid)


class CodaLens:
    """All that the model does after the loop, applied to a residual as if the loop ended there.

    Inside the coda what is left of it follows, so that every point there gives the model's logits.

    Source: 2507.02199, section 3 (for Huginn: norm, coda, norm, head).
    """

    name = "coda"
    points: PointSet | Sequence[str] = "states"

    def check(self, model: Model, points: Sequence[LensPoint]) -> None:
        """Raise on points between the two halves of a coda block.

        Raises:
            ValueError: There is one.
            LoopedSemanticsError: The sum of all states leaves the loop, and no single one.
        """
        if any(point.phase == "core" for point in points):
            model.cfg.readout.refuse_sum_of_states()
        for point in points:
            if point.phase == "coda" and point.kind == "resid_mid":
                raise ValueError(
                    f"the coda lens cannot start inside a block, at {point.alias}; use "
                    "hook_resid_pre or hook_resid_post of a coda block"
                )

    def reads_sequence(self, point: LensPoint) -> bool:
        """Yes: the coda attends to other positions."""
        return True

    def logits(
        self, model: Model, resid: Tensor, point: LensPoint, inputs: LensInputs
    ) -> Float[Tensor, "batch read d_vocab"]:
        """Logits of the residual [batch, pos, d_model]."""
        layout, readout = model.layout, model.cfg.readout
        normed = _is_normed(model, point)
        start = layout.coda_start
        if point.phase == "coda":
            assert point.block is not None
            start = point.block + (point.kind == "resid_post")
        else:
            if readout.end_of_iteration(normed):
                resid = norm_of_iterations(model)(resid)
            resid = model.enter_coda(resid)
        if start < layout.n_layers:
            resid = model(
                resid,
                start_at_layer=start,
                stop_at_layer=layout.n_layers,
                attention_mask=inputs.attention_mask,
                tokens=inputs.tokens,
            )
        resid = inputs.select(resid)
        final = readout.final_steps(normed)
        return unembed(model, model.ln_final(resid) if final else resid)


class ExitLens(LogitLens):
    """The exit that a model was trained with: the state of every iteration, decoded directly.

    Equals ``model(tokens, exit_at=t)`` for every t, in one pass. Source: Ouro, 2510.25741.
    """

    name = "exit"
    points: PointSet | Sequence[str] = "states"

    def check(self, model: Model, points: Sequence[LensPoint]) -> None:
        """Raise on models with a coda and points that are no exit.

        Raises:
            LoopedSemanticsError: A coda stands between the loop and the logits, or the sum of all
                states leaves the loop.
            ValueError: A point is not the state that leaves an iteration.
        """
        readout = model.cfg.readout
        readout.refuse_sum_of_states()
        if readout.has_coda or readout.before_coda:
            raise LoopedSemanticsError(
                "exits read the state directly, but this model has a coda (or a norm in its "
                "place) between the loop and the logits; use coda_lens"
            )
        for point in points:
            if point.kind != "state_out":
                raise ValueError(
                    f"the exit lens reads hook_state_out of iterations, not {point.name}; use "
                    "logit_lens inside an iteration"
                )
            assert point.iteration is not None
            readout.refuse_fast_stack(point.iteration)


def unembed(model: Model, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
    """Logits of a normed residual, with the model's soft cap where it has one."""
    return apply_softcap(model.unembed(x), model.cfg.output_logits_soft_cap)


def _is_normed(model: Model, point: LensPoint) -> bool:
    """Whether the norm between iterations is the last thing that happened to a residual."""
    at = point.iteration, point.layer
    return model.cfg.readout.is_normed(point.kind, point.phase, *at)
