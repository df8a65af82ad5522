"""The residual stream of a cached run as a sum over heads, neurons and biases."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.cache.cached_run import CachedRun
from tl_loops.cache.carry import Rows
from tl_loops.cache.layers import LayerDecomposition, in_selection
from tl_loops.cache.path import Site, Target, working
from tl_loops.cache.places import Labelled, affine
from tl_loops.layout.selection import Selection, one_index
from tl_loops.metrics.precision import full_precision
from tl_loops.upstream import Slice, SliceLike, as_slice


class NeuronDecomposition(LayerDecomposition):
    """Decompositions down to single neurons; keyword arguments as in the base class."""

    @full_precision
    def stack_neuron_results(
        self,
        layer: int | None = -1,
        pos_slice: SliceLike = None,
        neuron_slice: SliceLike = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Float[Tensor, "d_model *output"] | None = None,
        mlp_input: bool = False,
        *,
        state_out: int | None = None,
        from_iteration: int | None = None,
        layers: Selection | None = None,
        iterations: Selection | None = None,
    ) -> Float[Tensor, "component ..."] | Labelled:
        """What every neuron before a place contributes to the residual stream there.

        Args:
            layer: The place is what enters this block; ``None`` or -1: the final norm.
            pos_slice: Positions.
            neuron_slice: Neurons of every block.
            return_labels: Also return labels: ``"r3.L1N7"``.
            incl_remainder: Add the rest of the residual stream as a last component.
            apply_ln: Also apply the norm that reads the place, at its cached scale.
            project_output_onto: ``[d_model]`` or ``[d_model, output]``: return products with these
                directions. They are pulled back through the run, so that no neuron's output is
                ever made in the width of the model.
            mlp_input: The place is what enters the block's MLP.
            state_out: See the class.
            from_iteration: See the class.
            layers: See the class.
            iterations: See the class.

        Returns:
            ``[neuron, ..., d_model]``; with a projection ``[neuron, ..., output]`` or, for one
            direction, ``[neuron, ...]``; and labels if asked for.

        Raises:
            KeyError: The cache lacks an activation that is needed.
            LoopedSemanticsError: The stack would be very large and no blocks were selected.
        """
        run, target = self._run(pos_slice), self._target(layer, mlp_input, state_out)
        selected = self._selected(layers, iterations)
        neurons = as_slice("neuron_slice", neuron_slice)
        if project_output_onto is None:
            if selected is None:
                n_neurons = np.size(neurons.indices(self.model.cfg.d_mlp))
                self._check_size(n_neurons, target, run, "neurons")

            def rows(site: Site) -> Rows | None:
                return run.neurons(site, neurons) if in_selection(selected, site.block) else None

            carried = run.carry(target, rows, "parts", from_iteration)
            norm = run.reader(target) if apply_ln else None
            stack, labels = self._finish(run, target, norm, *carried, incl_remainder)
            return self._result(stack, labels, return_labels)

        outputs = working(project_output_onto)
        outputs = outputs[:, None] if outputs.ndim == 1 else outputs
        stack, labels = self._projected_neurons(
            run, target, outputs, neurons, apply_ln, from_iteration, selected
        )
        if incl_remainder:
            resid = run.residual(target)
            norm = run.reader(target) if apply_ln else None
            resid = resid if norm is None else affine(norm, resid)
            stack = torch.cat([stack, (resid @ outputs.to(resid) - stack.sum(0))[None]])
            labels.append("remainder")
        stack = stack.squeeze(-1) if project_output_onto.ndim == 1 else stack
        return self._result(stack, labels, return_labels)

    def _projected_neurons(
        self,
        run: CachedRun,
        target: Target,
        outputs: Tensor,
        neurons: Slice,
        apply_ln: bool,
        from_iteration: int | None = None,
        selected: set[int] | None = None,
    ) -> Labelled:
        resid = run.residual(target)
        directions = outputs.to(resid).T.reshape(-1, *[1] * (resid.ndim - 1), resid.shape[-1])
        directions = directions.expand(-1, *resid.shape)
        norm = run.reader(target) if apply_ln else None
        directions = directions if norm is None else norm.adjoint(directions)

        def rows(site: Site, pulled: Tensor) -> Rows | None:
            if not in_selection(selected, site.block):
                return None
            return run.pulled_neurons(site, pulled, neurons)

        return run.pull_back(target, directions, rows, from_iteration)

    @full_precision
    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: SliceLike = None,
        return_labels: bool = False,
        project_output_onto: Float[Tensor, "d_model *output"] | None = None,
        *,
        state_out: int | None = None,
        from_iteration: int | None = None,
    ) -> Float[Tensor, "component ..."] | Labelled:
        """The residual stream at a place as the sum over heads, neurons, embeddings and biases.

        The order is TransformerLens's: heads, neurons (or MLPs), ``"embed"``, ``"pos_embed"``, here
        ``"initial_state"`` (or ``"r3_state_in"``), step embeddings, ``"bias"``. What the prelude
        and the embedding contribute through the injections is in their own rows.

        Args:
            layer: The place is what enters this block; ``None`` or -1: the final norm.
            mlp_input: The place is what enters the block's MLP.
            expand_neurons: Every neuron, rather than every MLP.
            apply_ln: Also apply the norm that reads the place, at its cached scale; its bias goes
                to the row ``"bias"``.
            pos_slice: Positions.
            return_labels: Also return labels.
            project_output_onto: ``[d_model]`` or ``[d_model, output]``: return products with these
                directions, without making any neuron's output in the width of the model.
            state_out: See the class.
            from_iteration: See the class.

        Returns:
            ``[component, ..., d_model]`` or their products as in :meth:`stack_neuron_results`, and
            labels if asked for. They sum to the residual stream (or to the norm's output).

        Raises:
            KeyError: The cache lacks an activation that is needed.
            LoopedSemanticsError: The stack would be very large; take :meth:`stack_neuron_results`
                with ``layers``, or project.
        """
        run, target = self._run(pos_slice), self._target(layer, mlp_input, state_out)
        norm = run.reader(target) if apply_ln else None
        outputs = None
        if project_output_onto is not None:
            outputs = working(project_output_onto)
            outputs = outputs[:, None] if outputs.ndim == 1 else outputs
        per_block = self.model.cfg.n_heads
        if expand_neurons and outputs is None:
            per_block += self.model.cfg.d_mlp or 0
        self._check_size(per_block, target, run, "heads and neurons")

        def end(stack: Tensor) -> Tensor:
            stack = stack if norm is None else norm(stack)
            return stack if outputs is None else stack @ outputs.to(stack)

        def group(rows: Callable[[Site], Rows | None]) -> Labelled:
            stack, labels = run.carry(target, rows, "parts", from_iteration)
            return end(stack), labels

        every = Slice(None)
        parts = [group(run.heads)]
        if not expand_neurons:
            parts.append(group(lambda site: run.component(site) if site.kind == "mlp" else None))
        elif outputs is None:
            parts.append(group(lambda site: run.neurons(site, every)))
        else:
            parts.append(
                self._projected_neurons(run, target, outputs, every, apply_ln, from_iteration)
            )
        parts.append(group(lambda site: run.component(site) if site.is_own else None))
        biases, _ = run.carry(
            target, lambda site: run.bias(site, expand_neurons), "parts", from_iteration
        )
        bias = biases.sum(0, keepdim=True)
        bias = bias if norm is None else norm(bias)
        if norm is not None and norm.bias is not None:
            bias = bias + norm.bias
        parts.append((bias if outputs is None else bias @ outputs.to(bias), ["bias"]))
        stack = torch.cat([stack for stack, _ in parts])
        if project_output_onto is not None and project_output_onto.ndim == 1:
            stack = stack.squeeze(-1)
        return self._result(stack, [label for _, own in parts for label in own], return_labels)

    @full_precision
    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: SliceLike = None,
        pos_slice: SliceLike = None,
        project_output_onto: Float[Tensor, "d_model *output"] | None = None,
    ) -> Tensor:
        """What each neuron of one block adds in its ``hook_mlp_out``.

        Where the branch has a norm of its own before the add, that norm is applied at its cached
        scale, so that the neurons' results (and ``b_out`` through the same norm) sum to
        ``hook_mlp_out``.

        Args:
            layer: The unrolled block; negative counts from the last.
            neuron_slice: Neurons; an integer drops the axis.
            pos_slice: Positions; an integer drops the axis.
            project_output_onto: ``[d_model]`` or ``[d_model, output]``, as in
                :meth:`stack_neuron_results`.

        Returns:
            ``[..., neuron, d_model]``; with a projection ``[..., neuron, output]`` or, for one
            direction, ``[..., neuron]``.

        Raises:
            KeyError: The cache lacks an activation that is needed.
        """
        run = self._run(pos_slice)
        index = one_index("block", layer, self.layout.n_layers)
        site = Site("mlp", "", index)
        neurons = as_slice("neuron_slice", neuron_slice)
        if project_output_onto is None:
            rows = run.neurons(site, neurons)
            assert rows is not None
            results = rows.values.movedim(0, -2)
        else:
            outputs = working(project_output_onto)
            outputs = outputs[:, None] if outputs.ndim == 1 else outputs
            like = run.read(f"blocks.{index}.hook_mlp_out")
            directions = outputs.to(like).T.reshape(-1, *[1] * (like.ndim - 1), like.shape[-1])
            rows = run.pulled_neurons(site, directions.expand(-1, *like.shape), neurons)
            assert rows is not None
            results = rows.values.movedim(0, -2)
        if neurons.mode == "int":
            results = results.squeeze(-2)
        if project_output_onto is not None and project_output_onto.ndim == 1:
            results = results.squeeze(-1)
        return results.to(self.model.cfg.dtype)
