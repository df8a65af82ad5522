"""The residual stream of a cached run as a sum over components, per iteration and layer."""

import math

import torch
from torch import Tensor

from tl_loops.cache.cached_run import CachedRun
from tl_loops.cache.carry import INJECTION_ROWS, Rows
from tl_loops.cache.path import FrozenNorm, Site, Target
from tl_loops.cache.places import Labelled, ResidualReadout, Stack
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.selection import Selection, chosen_indices
from tl_loops.metrics.precision import full_precision
from tl_loops.upstream import SliceLike

MAX_ELEMENTS = 2**29
"""Largest stack that is made without being asked for by blocks: 2 GiB in float32."""


class LayerDecomposition(ResidualReadout):
    """Decompositions of the residual stream that hold on looped models.

    The norm on the sum, the norm between iterations, the norm before the coda and the injection's
    map are linear once the norms' scales are held at what they were in the run. Every component is
    carried through them, so that the components sum to the residual stream at the place asked for,
    for runs in which no hook edited the stream itself. ``incl_remainder=True`` adds the difference
    (rounding, or such edits) as a last component.

    Keyword arguments that several methods share:

    - ``state_out=t``: decompose the state that leaves iteration t instead of a block's input.
    - ``from_iteration=t``: take the state that enters iteration t as one component
      (``"r{t}_state_in"``) instead of following it to where it came from.
    - ``layers``, ``iterations``: only components of these unrolled blocks, and of the core blocks
      of these iterations (an index, a slice, or several indices).

    Components are named by iteration and layer: ``"p0_attn_out"`` (prelude), ``"r3.1_mlp_out"``
    (iteration 3, layer 1), ``"c0_attn_out"`` (coda), ``"r3.L1H4"`` (head 4), ``"r3.L1N7"``
    (neuron 7).
    """

    def _selected(self, layers: Selection | None, iterations: Selection | None) -> set[int] | None:
        if layers is None and iterations is None:
            return None
        layout = self.layout
        chosen = set(chosen_indices("block", layout.n_layers, layers))
        if iterations is not None:
            passes = chosen_indices("iteration", layout.n_iterations, iterations)
            chosen &= {
                layout.index(iteration=t, layer=layer)
                for t in passes
                for layer in range(layout.n_core)
            }
        return chosen

    def _check_size(self, n_per_block: int, target: Target, run: CachedRun, what: str) -> None:
        """Raise on stacks that do not fit any machine, before any work."""
        shape = run.residual(target).shape
        n_rows = n_per_block * min(target.layer + target.mlp_input, self.layout.n_layers)
        if n_rows * math.prod(shape) > MAX_ELEMENTS:
            size = n_rows * math.prod(shape) * 4 / 2**30
            raise LoopedSemanticsError(
                f"a stack of {n_rows} {what} of shape {tuple(shape)} would take {size:.1f} GiB: "
                "pass layers=... or iterations=... for a part of the blocks, pos_slice=..., "
                "neuron_slice=... or (for neurons) project_output_onto=..."
            )

    @full_precision
    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: SliceLike = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
        *,
        injection: str | None = None,
        state_out: int | None = None,
        from_iteration: int | None = None,
        layers: Selection | None = None,
        iterations: Selection | None = None,
        incl_remainder: bool = False,
    ) -> Stack | Labelled:
        """The residual stream at a place as the sum of what each layer wrote to it.

        Components: ``"embed"`` and ``"pos_embed"``; ``"initial_state"`` where the state before
        iteration 0 is not the prelude's output e; ``"injection"``; and the attention and MLP output
        of every block. Norms with a bias (LayerNorm) after an iteration add ``"r3_norm_bias"``.

        Args:
            layer: Decompose what enters this block; ``None`` or -1: what enters the final norm.
            mlp_input: Decompose what enters the block's MLP instead.
            mode: All components, or only those of MLPs or of attentions.
            apply_ln: Also apply the norm that reads the place, at its cached scale, with its gain;
                LayerNorm's bias becomes the component ``"ln_bias"`` of a full decomposition.
            pos_slice: Positions.
            incl_embeds: Include embeddings, initial state and injection.
            return_labels: Also return labels.
            injection: What entered through the injections. ``"whole"``: as one component.
                ``"parts"``: in the rows of the embedding and the prelude, which made e.
                ``"by_iteration"``: one component for every iteration (``"r3_injection"``).
                ``None``: ``"whole"`` in mode ``"all"``, ``"parts"`` in the others, which do not
                show it.
            state_out: See the class.
            from_iteration: See the class.
            layers: See the class.
            iterations: See the class.
            incl_remainder: See the class.

        Returns:
            ``[component, ..., d_model]``, and labels if asked for. Without a selection and with
            ``mode="all"`` they sum to the residual stream, or with ``apply_ln`` to what the norm
            makes of it.

        Raises:
            KeyError: The cache lacks an activation that is needed.
            LoopedSemanticsError: ``apply_ln`` where no norm reads the place.
        """
        if mode not in ("all", "mlp", "attn"):
            raise ValueError(f"mode must be 'all', 'mlp' or 'attn', got {mode!r}")
        run, target = self._run(pos_slice), self._target(layer, mlp_input, state_out)
        selected = self._selected(layers, iterations)
        shown = injection or ("whole" if mode == "all" else "parts")
        if shown not in INJECTION_ROWS:
            raise ValueError(f"injection must be one of {INJECTION_ROWS} or None, got {shown!r}")

        def rows(site: Site) -> Rows | None:
            if site.block is not None:
                wanted = mode in ("all", site.kind) and in_selection(selected, site.block)
            elif site.kind == "norm_bias":
                wanted = mode == "all" and selected is None
            else:
                wanted = incl_embeds
            return run.component(site) if wanted else None

        carried = run.carry(target, rows, shown, from_iteration)
        full = mode == "all" and incl_embeds and selected is None
        norm = run.reader(target) if apply_ln else None
        stack, labels = self._finish(run, target, norm, *carried, incl_remainder, full)
        return self._result(stack, labels, return_labels)

    @full_precision
    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: SliceLike = None,
        apply_ln: bool = False,
        *,
        mlp_input: bool = False,
        state_out: int | None = None,
        from_iteration: int | None = None,
        layers: Selection | None = None,
        iterations: Selection | None = None,
    ) -> Stack | Labelled:
        """What every attention head before a place contributes to the residual stream there.

        A prelude head contributes through the state and through every injection.

        Args:
            layer: The place is what enters this block; ``None`` or -1: the final norm.
            return_labels: Also return labels: ``"r3.L1H4"``, ``"p.L0H4"``, ``"c.L0H4"``.
            incl_remainder: Add the rest of the residual stream as a last component.
            pos_slice: Positions.
            apply_ln: Also apply the norm that reads the place, at its cached scale.
            mlp_input: The place is what enters the block's MLP.
            state_out: See the class.
            from_iteration: See the class.
            layers: See the class.
            iterations: See the class.

        Returns:
            ``[head, ..., d_model]`` in the order of the blocks, and labels if asked for.

        Raises:
            KeyError: The cache lacks an activation that is needed.
            LoopedSemanticsError: The stack would be very large and no blocks were selected.
        """
        run, target = self._run(pos_slice), self._target(layer, mlp_input, state_out)
        selected = self._selected(layers, iterations)
        if selected is None:
            self._check_size(self.model.cfg.n_heads, target, run, "heads")

        def rows(site: Site) -> Rows | None:
            return run.heads(site) if in_selection(selected, site.block) else None

        carried = run.carry(target, rows, "parts", from_iteration)
        norm = run.reader(target) if apply_ln else None
        stack, labels = self._finish(run, target, norm, *carried, incl_remainder)
        return self._result(stack, labels, return_labels)

    def _finish(
        self,
        run: CachedRun,
        target: Target,
        norm: FrozenNorm | None,
        stack: Tensor,
        labels: list[str],
        incl_remainder: bool,
        full: bool = False,
    ) -> Labelled:
        """A carried stack with its remainder, after the norm that reads it."""
        if incl_remainder:
            stack = torch.cat([stack, (run.residual(target) - stack.sum(0))[None]])
            labels = [*labels, "remainder"]
        if norm is not None:
            stack = norm(stack)
            if norm.bias is not None and (full or incl_remainder):
                stack = torch.cat([stack, norm.bias.expand(stack.shape[1:])[None]])
                labels = [*labels, "ln_bias"]
        return stack, labels

    @full_precision
    def compute_head_results(self) -> None:
        """Cache what each head of each block adds up to in its attention, as ``hook_result``.

        They sum (with ``b_O``) to the attention's output before a norm after the branch; it is
        :meth:`stack_head_results` that applies that norm. Blocks whose ``hook_z`` was not cached
        are left out.

        Raises:
            KeyError: No block's ``hook_z`` was cached.
        """
        run = self._run(None)
        found = False
        for index in range(self.layout.n_layers):
            z = self.cache_dict.get(f"blocks.{index}.attn.hook_z")
            name = f"blocks.{index}.attn.hook_result"
            found = found or z is not None or name in self.cache_dict
            if z is not None and name not in self.cache_dict:
                W_O = run.block(index).attn.W_O.detach().to(z)
                self.cache_dict[name] = torch.einsum("...he,hed->...hd", z, W_O)
        if not found:
            run.raw("blocks.0.attn.hook_z")


def in_selection(selected: set[int] | None, block: int | None) -> bool:
    """Whether a block belongs to a selection; ``None`` selects all."""
    return selected is None or block in selected
