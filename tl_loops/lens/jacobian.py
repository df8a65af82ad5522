"""Jacobian lens: transport a residual to a later point by the mean Jacobian, and read it there."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import require_layout, with_iterations
from tl_loops.layout.selection import one_index
from tl_loops.lens.decode import CodaLens, Lens, LogitLens
from tl_loops.lens.fitted import check_sizes, check_width, model_sizes
from tl_loops.lens.points import LensPoint, PointSet, select_points
from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.precision import full_precision
from tl_loops.printing import prints_short
from tl_loops.runs.batches import check_batch_size, token_prompts
from tl_loops.runs.cells import named_hooks
from tl_loops.runs.identity import identity_of, prompts_fingerprint
from tl_loops.runs.in_batches import Batch, Run, Split, run_in_batches
from tl_loops.runs.inputs import LensInputs
from tl_loops.runs.shards import Shards
from tl_loops.runs.storage import load_artefact, save_artefact
from tl_loops.upstream import left_as_it_was

Target = Literal["final", "penultimate", "loop_ends"]


@prints_short
@dataclass(frozen=True, eq=False)
class JacobianLens:
    """Reads ``J h`` at a target instead of ``h`` where it is.

    With J of a point the mean, over prompts and source positions s, of the sum over target
    positions s' >= s of d h_target[s'] / d h[s].

    Attributes:
        points: Sources: hook names by coordinate.
        targets: Hook name by coordinate of each source's target.
        jacobians: [point, d_model, d_model], rows are the target's dimensions.
        n_prompts: How many prompts were averaged.
        readout: ``"logit"``: the target is read by the logit lens. ``"coda"``: by the coda lens.
        sizes: Sizes of the model that it was fitted on.

    Source: the Jacobian lens as applied to looped models in 2609.01924.
    """

    points: tuple[str, ...]
    targets: tuple[str, ...]
    jacobians: Float[Tensor, "point d_model d_model"]
    n_prompts: int
    readout: Literal["logit", "coda"]
    sizes: dict[str, int]
    name: str = "jacobian"

    @checked
    @full_precision
    def transport(
        self, resid: Float[Tensor, "*batch d_model"], index: int
    ) -> Float[Tensor, "*batch d_model"]:
        """``J h`` of point ``index``, in the residual's dtype."""
        J = self.jacobians[one_index("point", index, len(self.points))]
        check_width(resid, J.shape[-1])
        return (resid.to(J.dtype) @ J.T).to(resid.dtype)

    def check(self, model: Model, points: Sequence[LensPoint]) -> None:
        """Raise on another model, and points without a Jacobian.

        Raises:
            ValueError: The message names the size or the point.
        """
        check_sizes("Jacobian", self.sizes, model.cfg)
        for point in points:
            if point.alias not in self.points:
                raise ValueError(
                    f"this Jacobian lens has no Jacobian for {point.alias}; it was fitted at "
                    f"{', '.join(self.points)}"
                )
            self._reader().check(model, [self._target(model, point)])

    def reads_sequence(self, point: LensPoint) -> bool:
        """Whether the target is read by the coda lens."""
        return self.readout == "coda"

    def logits(
        self,
        model: Model,
        resid: Float[Tensor, "batch in_pos d_model"],
        point: LensPoint,
        inputs: LensInputs,
    ) -> Float[Tensor, "batch read d_vocab"]:
        """Logits of the transported residual."""
        moved = self.transport(resid, self.points.index(point.alias))
        return self._reader().logits(model, moved, self._target(model, point), inputs)

    def _reader(self) -> Lens:
        return CodaLens() if self.readout == "coda" else LogitLens()

    def _target(self, model: Model, point: LensPoint) -> LensPoint:
        return select_points(model, self.targets[self.points.index(point.alias)])[0]

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        metadata = {
            "points": self.points,
            "targets": self.targets,
            "n_prompts": self.n_prompts,
            "readout": self.readout,
            "sizes": self.sizes,
        }
        save_artefact(path, "jacobian_lens", {"jacobians": self.jacobians}, metadata)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "JacobianLens":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged or holds no Jacobian lens.
        """
        tensors, metadata = load_artefact(path, "jacobian_lens", ("jacobians",))
        return cls(
            tuple(metadata["points"]),
            tuple(metadata["targets"]),
            tensors["jacobians"].to(device),
            metadata["n_prompts"],
            metadata["readout"],
            metadata["sizes"],
        )


@checked
@left_as_it_was
def fit_jacobian_lens(
    model: Model,
    prompts: Iterable[str | Tensor],
    *,
    points: PointSet | str | Sequence[str] = "core",
    target: Target | str = "final",
    readout: Literal["logit", "coda"] = "logit",
    skip_positions: int = 0,
    vjp_batch_size: int = 16,
    n_iterations: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
) -> JacobianLens:
    """Average the Jacobian of the unrolled model from each point to its target.

    Takes d_model vector-Jacobian products a prompt and target, ``vjp_batch_size`` of them in one
    backward pass (over copies of the prompt), which serves all points at once. Gradients run
    through every iteration between a point and its target. Where injection makes the loop contract,
    the Jacobian of an early iteration vanishes with the number of iterations; ``"loop_ends"`` then
    still shows what an iteration does.

    Args:
        model: A looped model.
        prompts: A list of strings or of 1-D token tensors, each at its own length.
        points: Sources, as for :func:`tl_loops.lens.read_lens`.
        target: ``"final"``: what leaves the last block. ``"penultimate"``: what enters it.
            ``"loop_ends"``: the state that leaves the source's own iteration. Or a hook name.
        readout: How the target is read: by the logit lens or the coda lens.
        skip_positions: Leading positions that are not averaged over.
        vjp_batch_size: Copies of a prompt in one backward pass; memory grows with it.
        n_iterations: Number of iterations of the model.
        batch_size: Prompts that are added up before the sum is kept, one after the other.
        progress: Whether to show a progress bar.
        checkpoint: A file to which the sum of every batch is added, each as large as the lens; the
            same call goes on from it, to the same bits.
        shard: Which batches are run here, as for :func:`tl_loops.measure`. With ``(k, n)`` the lens
            is the mean over the prompts of that shard; :func:`tl_loops.merge_shards` puts the
            checkpoints of all together, from which the same call without ``shard`` makes the whole.

    Returns:
        The lens. Jacobians are float32 (float64 for a float64 model); zero where a target does not
        depend on a point.

    Raises:
        ValueError: A prompt is too short, a target does not lie after its source, or an argument
            is out of range.
        TypeError: ``prompts`` is no list of strings or tensors.
        HookNameError: A point or target that the model does not have.
        FloatingPointError: A Jacobian is not finite.
        CheckpointError: The checkpoint is damaged or of another run, or the run can be neither
            resumed nor cut into shards.

    Source: 2609.01924. With attention in both directions the sum runs over all target positions.
    """
    require_layout(model)
    if readout not in ("logit", "coda"):
        raise ValueError(f"readout must be 'logit' or 'coda', got {readout!r}")
    if skip_positions < 0 or vjp_batch_size < 1:
        raise ValueError(
            "skip_positions must be at least 0 and vjp_batch_size at least 1, got "
            f"{skip_positions} and {vjp_batch_size}"
        )
    check_batch_size(batch_size)
    split = Split(shard, checkpoint)
    split.check(model)
    tokens = token_prompts(model, prompts, at_least=skip_positions + 1)
    members = [tokens[i : i + batch_size] for i in range(0, len(tokens), batch_size)]
    with with_iterations(model, n_iterations), torch.inference_mode(False), torch.enable_grad():
        sources = select_points(model, points)
        targets = _targets(model, sources, target)
        reader: Lens = CodaLens() if readout == "coda" else LogitLens()
        reader.check(model, targets)
        d_model = model.cfg.d_model
        W_E = model.embed.W_E
        total = torch.zeros(
            len(sources), d_model, d_model, dtype=statistic_dtype(W_E), device=W_E.device
        )
        n_added = 0

        def compute(number: int) -> Batch:
            part = torch.zeros_like(total)
            for prompt in members[number]:
                _add_prompt(model, prompt, sources, targets, skip_positions, vjp_batch_size, part)
            return {"sum": part}

        def take(number: int, batch: Batch) -> None:
            nonlocal n_added
            total.add_(batch["sum"].to(total))
            n_added += len(members[number])

        def identify() -> dict[str, Any]:
            return identity_of(
                model,
                prompts=prompts_fingerprint(tokens),
                points=[point.name for point in sources],
                targets=[point.name for point in targets],
                skip_positions=skip_positions,
                batch_sizes=[batch_size, vjp_batch_size],
            )

        run = Run("Jacobian lens", [len(batch) for batch in members], identify)
        run_in_batches(run, compute, take, split, progress)
    if not n_added:
        raise ValueError(
            f"shard {shard} has no prompt: there are {len(members)} batch(es) of {batch_size}; "
            "give a smaller batch_size"
        )
    if not bool(total.isfinite().all()):
        raise FloatingPointError("a Jacobian is not finite; try float32 weights")
    return JacobianLens(
        tuple(point.alias for point in sources),
        tuple(point.alias for point in targets),
        total / n_added,
        n_added,
        readout,
        model_sizes(model.cfg),
    )


def _targets(
    model: Model, sources: tuple[LensPoint, ...], target: Target | str
) -> tuple[LensPoint, ...]:
    last = model.layout.n_layers - 1
    if target == "loop_ends":
        for source in sources:
            if source.iteration is None:
                raise ValueError(
                    f"{source.alias} is in no iteration: target='loop_ends' needs points='core'"
                )
        names = [f"iter.{source.iteration}.hook_state_out" for source in sources]
    elif target in ("final", "penultimate"):
        part = "resid_post" if target == "final" else "resid_pre"
        names = [f"blocks.{last}.hook_{part}"] * len(sources)
    else:
        names = [target] * len(sources)
    targets = tuple(select_points(model, name)[0] for name in names)
    for source, its_target in zip(sources, targets, strict=True):
        if source.depth >= its_target.depth and source.name != its_target.name:
            raise ValueError(
                f"the target {its_target.alias} does not lie after the point {source.alias}"
            )
    return targets


def _add_prompt(
    model: Model,
    prompt: Int[Tensor, "pos"],
    sources: tuple[LensPoint, ...],
    targets: tuple[LensPoint, ...],
    skip_positions: int,
    rows: int,
    total: Float[Tensor, "point d_model d_model"],
) -> None:
    """Add one prompt's Jacobians, averaged over source positions."""
    d_model = model.cfg.d_model
    rows = min(rows, d_model)
    kept: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> Tensor:
        # With frozen weights the first point starts the graph, and the later ones continue it.
        kept[name] = x if x.requires_grad else x.detach().requires_grad_()
        return kept[name]

    names = dict.fromkeys(point.name for point in (*sources, *targets))
    tokens = prompt.repeat(rows, 1)
    # The mask of ones keeps a pad token in a prompt from being taken for padding.
    model.run_with_hooks(
        tokens,
        return_type=None,
        attention_mask=torch.ones_like(tokens),
        fwd_hooks=named_hooks(names, keep),
    )
    by_target: dict[str, list[int]] = {}
    for index, point in enumerate(targets):
        by_target.setdefault(point.name, []).append(index)
    for name, indices in by_target.items():
        inputs = [kept[sources[index].name] for index in indices]
        for first in range(0, d_model, rows):
            count = min(rows, d_model - first)
            gradients = _pull_back(kept[name], inputs, first, count)
            for index, gradient in zip(indices, gradients, strict=True):
                mean = gradient[:count, skip_positions:].to(total.dtype).mean(1)
                total[index, first : first + count] += mean


def _pull_back(
    target: Float[Tensor, "row pos d_model"], inputs: list[Tensor], first: int, count: int
) -> list[Tensor]:
    """Gradient of dimension ``first + r`` of the target, summed over positions, in row r."""
    cotangent = torch.zeros_like(target)
    for row in range(count):
        cotangent[row, :, first + row] = 1.0
    gradients = torch.autograd.grad(target, inputs, cotangent, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(x) if gradient is None else gradient
        for x, gradient in zip(inputs, gradients, strict=True)
    ]
