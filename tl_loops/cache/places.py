"""The residual stream of a cached run as the model would read it out at each place."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.arguments import described
from tl_loops.cache.cached_run import CachedRun
from tl_loops.cache.path import FrozenNorm, Target, centred, scale_of, working
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model
from tl_loops.metrics.precision import full_precision
from tl_loops.upstream import ActivationCache, SliceLike, as_slice, check_ids

Stack = Float[Tensor, "component ... d_model"]
Labelled = tuple[Tensor, list[str]]


class ResidualReadout(ActivationCache):
    """The residual stream place by place, and what reads it there.

    A place is what enters a block (``layer``), what enters its MLP (``mlp_input``), what enters the
    final norm (``layer=None``), or the state that leaves an iteration (``state_out``).
    """

    layout: LoopLayout
    model: Model

    def _run(self, pos_slice: SliceLike, decomposes: bool = True) -> CachedRun:
        if decomposes:
            self._check_activations()
        return CachedRun(self.cache_dict, self.model, self.layout, as_slice("pos_slice", pos_slice))

    def _check_activations(self) -> None:
        """Raise for a cache of gradients: parts of a stream are carried on by maps of activations.

        A norm's scale is a length and a pattern a probability, which gradients are not.
        """
        for name, tensor in self.cache_dict.items():
            at_least = tensor.detach()
            wrong = name.endswith(".hook_scale") and bool((at_least <= 0).any())
            if wrong or (name.endswith("attn.hook_pattern") and bool((at_least < 0).any())):
                raise LoopedSemanticsError(
                    f"{name} has values that no activation has: this looks like a cache of "
                    "gradients, which do not add up along the stream as activations do. Rows of "
                    "accumulated_resid without apply_ln are the gradients there; "
                    "tl_loops.attribution.attribution_patch sums over places"
                )

    def _target(self, layer: int | None, mlp_input: bool, state_out: int | None) -> Target:
        depth = self.layout.n_layers
        if state_out is not None:
            if layer not in (None, -1, depth) or mlp_input:
                raise ValueError("give layer (and mlp_input) or state_out, not both")
            # The index checks the iteration and counts negative ones from the end.
            block = self.layout.index(iteration=state_out, layer=-1)
            return Target(depth, state_out=self.layout.coordinate(block).iteration)
        layer = depth if layer in (None, -1) else layer
        assert layer is not None
        if not 0 <= layer <= depth:
            raise ValueError(f"layer={layer} is out of range: 0 to {depth}, or -1 for the end")
        if mlp_input and layer == depth:
            raise ValueError(f"mlp_input=True needs a block, but layer={layer} is the end")
        if mlp_input:
            self._check_mid()
        return Target(layer, mlp_input)

    def _check_mid(self) -> None:
        cfg = self.model.cfg
        if cfg.attn_only or cfg.parallel_attn_mlp:
            which = "have no MLP" if cfg.attn_only else "run attention and MLP side by side"
            raise LoopedSemanticsError(
                f"the blocks of this model {which}, so there is no residual stream between the two:"
                " leave mlp_input and incl_mid out"
            )

    def _result(self, stack: Tensor, labels: list[str], return_labels: bool) -> Tensor | Labelled:
        stack = stack.to(self.model.cfg.dtype)
        return (stack, labels) if return_labels else stack

    @full_precision
    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: SliceLike = None,
        mlp_input: bool = False,
        return_labels: bool = False,
        *,
        incl_states: bool = False,
    ) -> Stack | Labelled:
        """The residual stream before every block up to ``layer`` (and after the last one).

        With ``apply_ln`` and ``layer`` at the end, every row goes through the final norm with a
        scale of its own (the logit lens): times ``W_U`` (and ``unembed.token_scale``, where
        logits have scales) it gives the logits that the model would read out there. Rows that the
        final norm has already been applied to between iterations, in a model without a coda, are
        not normed twice. With an earlier ``layer``, every row is divided by the scale of that
        layer's norm, as in TransformerLens.

        Args:
            layer: The stream that enters this block is the last row; ``None`` or -1: the end.
            incl_mid: Also the stream between attention and MLP.
            apply_ln: See above. Gains and biases of the norm are applied.
            pos_slice: Positions.
            mlp_input: Also the stream that enters the MLP of ``layer``.
            return_labels: Also return labels: ``"r3.1_pre"``, ``"r3.1_mid"``, ``"final_post"``.
            incl_states: Also the state that leaves each iteration (``"r3_state_out"``), which is no
                block's input where an injection or a norm follows it.

        Returns:
            ``[row, ..., d_model]``, and labels if asked for.
        """
        target = self._target(layer, mlp_input, None)
        readout = self.model.cfg.readout.over(self.layout)
        run = self._run(pos_slice, apply_ln or bool(readout.before_coda and not readout.has_coda))
        if incl_mid:
            self._check_mid()
        layout = self.layout
        rows: list[tuple[str, Tensor]] = []
        normed: set[int] = set()
        for index in range(min(target.layer + 1, layout.n_layers)):
            at, label = layout.coordinate(index), layout.label(index)
            if readout.is_normed("resid_pre", at.phase, at.iteration, at.layer):
                normed.add(len(rows))
            rows.append((f"{label}_pre", run.read(f"blocks.{index}.hook_resid_pre")))
            within = index < target.layer
            if (incl_mid and within) or (mlp_input and not within):
                rows.append((f"{label}_mid", run.read(f"blocks.{index}.hook_resid_mid")))
            t = layout.ends_at(index)
            if incl_states and within and t is not None:
                if readout.is_normed("state_out"):
                    normed.add(len(rows))
                rows.append((f"r{t}_state_out", run.read(f"iter.{t}.hook_state_out")))
        if target.layer == layout.n_layers:
            if readout.last_is_normed:
                normed.add(len(rows))
            rows.append(("final_post", run.residual(target)))
        stack = torch.stack([row for _, row in rows])
        if apply_ln and target.layer == layout.n_layers:
            norm = self.model.ln_final
            lens = freshly_normed(stack, norm)
            if readout.before_coda and not readout.has_coda:
                # The last row is after the first of the two norms of this readout.
                lens[:-1] = freshly_normed(lens[:-1], norm)
            # With a coda the final norm comes again, after its blocks.
            done = [i in normed and readout.state_is_normed for i in range(len(rows))]
            keep = torch.tensor(done, device=stack.device)
            stack = torch.where(keep.view(-1, *[1] * (stack.ndim - 1)), stack, lens)
        elif apply_ln:
            reader = run.reader(target)
            stack = stack if reader is None else affine(reader, stack)
        return self._result(stack, [label for label, _ in rows], return_labels)

    @full_precision
    def apply_ln_to_stack(
        self,
        residual_stack: Stack,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: SliceLike = None,
        batch_slice: SliceLike = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
        *,
        state_out: int | None = None,
    ) -> Stack:
        """Apply the norm that reads a place to a stack of components of what it reads.

        With the cached scale this is linear: the gain is applied (1 where it was folded), and
        LayerNorm's bias is not, since it belongs to no component. Where the place is read without a
        norm (``block_norm="post_branch"``, or a state after the norm between iterations), the
        stack is returned as it is.

        Args:
            residual_stack: ``[component, ..., d_model]``.
            layer: The norm that reads the stream before this block; ``None`` or -1: the final norm.
            mlp_input: The norm that the block's MLP reads through instead.
            pos_slice: Positions that the stack holds; applied to the scale only.
            batch_slice: Applied to the stack and to the scale.
            has_batch_dim: Whether the stack has a batch axis.
            recompute_ln: Rather norm each component with a scale of its own (logit lens), with
                gain and bias.
            state_out: See the class.

        Raises:
            KeyError: The cache lacks the scale.
            LoopedSemanticsError: No norm reads the place.
        """
        run, target = self._run(pos_slice), self._target(layer, mlp_input, state_out)
        rows = as_slice("batch_slice", batch_slice)
        if has_batch_dim:
            residual_stack = rows.apply(residual_stack, dim=1)
        norm = run.reader(target)
        check_width("residual_stack", residual_stack, self.model.cfg.d_model)
        if norm is None:
            return residual_stack
        if recompute_ln:
            module = self.model.ln_final
            if target.layer < self.layout.n_layers:
                block = run.block(target.layer)
                module = block.ln2 if mlp_input else block.ln1
            return freshly_normed(working(residual_stack), module).to(residual_stack.dtype)
        if self.has_batch_dim:
            assert norm.scale is not None
            norm = type(norm)(rows.apply(norm.scale), norm.gain, norm.bias, norm.centred)
        _check_axes(norm, residual_stack)
        return norm(working(residual_stack)).to(residual_stack.dtype)

    @full_precision
    def logit_attrs(
        self,
        residual_stack: Stack,
        tokens: str | int | Int[Tensor, "..."],
        incorrect_tokens: str | int | Int[Tensor, "..."] | None = None,
        pos_slice: SliceLike = None,
        batch_slice: SliceLike = None,
        has_batch_dim: bool = True,
        *,
        state_out: int | None = None,
    ) -> Float[Tensor, "component ..."]:
        """How much each component of the last residual stream adds to the logits of tokens.

        Over all components of a decomposition the attributions sum to the logit, less ``b_U`` and
        what LayerNorm's bias adds (and before ``cfg.output_logits_soft_cap``, where there is one).

        Args:
            residual_stack: Components at the end of the model (or with ``state_out`` of a state).
            tokens: One token, one for every batch row, or one for every batch row and position.
            incorrect_tokens: Attribute the difference to these tokens' logits instead.
            pos_slice: Positions that the stack holds.
            batch_slice: Batch rows to keep.
            has_batch_dim: Whether the stack has a batch axis.
            state_out: The stack decomposes the state that leaves this iteration; attribute the
                logits of the exit there.

        Returns:
            ``[component, ...]``, in float32 or better.

        Raises:
            ValueError: Tokens that do not fit the stack, or of two different shapes.
            LoopedSemanticsError: ``state_out`` on a model with a coda.
        """
        directions = self._directions("tokens", tokens)
        if incorrect_tokens is not None:
            right, wrong = _shape(tokens), _shape(incorrect_tokens)
            if right != wrong:
                raise ValueError(
                    f"tokens and incorrect_tokens must have the same shape, got {right} and {wrong}"
                )
            directions = directions - self._directions("incorrect_tokens", incorrect_tokens)
        stack = self.apply_ln_to_stack(
            working(residual_stack),
            pos_slice=pos_slice,
            batch_slice=batch_slice,
            has_batch_dim=has_batch_dim,
            state_out=state_out,
        )
        directions = _aligned(working(directions).to(stack), stack)
        return (stack * directions).sum(-1)

    def _directions(self, name: str, tokens: str | int | Tensor) -> Tensor:
        """Columns of the unembedding."""
        if isinstance(tokens, str):
            try:
                return self.model.tokens_to_residual_directions(tokens)
            except AssertionError as error:  # of TransformerLens, for a text of several tokens
                raise ValueError(f"{name} must be one token or ids: {error}") from None
        if _shape(tokens) != (0,):
            check_ids(name, tokens, self.model.cfg.d_vocab_out, "there are logits of")
        return self.model.tokens_to_residual_directions(tokens)


def check_width(name: str, value: Any, d_model: int) -> None:
    """Raise for what is no residual stream of a model.

    Raises:
        ValueError: It is no tensor of floating point numbers, or of another width.
    """
    is_tensor = isinstance(value, Tensor) and value.is_floating_point()
    if not is_tensor or value.shape[-1:] != (d_model,):
        raise ValueError(
            f"{name} must be a tensor [..., d_model={d_model}] of floating point numbers, got "
            f"{described(value)}"
        )


def _check_axes(norm: FrozenNorm, stack: Tensor) -> None:
    """Raise where a stack holds other rows or positions than a norm's scale."""
    if norm.scale is None:
        return
    scale, axes = tuple(norm.scale.shape[:-1]), tuple(stack.shape[1:-1])
    try:
        torch.broadcast_shapes(scale, axes)
    except RuntimeError:
        raise ValueError(
            f"residual_stack has the axes {list(axes)} between component and d_model, but the norm "
            f"that reads it has a scale for {list(scale)}: give the pos_slice and the batch_slice "
            "that the stack was made with"
        ) from None


def _shape(tokens: str | int | Tensor) -> tuple[int, ...]:
    return tuple(tokens.shape) if isinstance(tokens, Tensor) else ()


def freshly_normed(x: Tensor, norm: Any) -> Tensor:
    """A norm with fresh scales, without its hook points."""
    if getattr(norm, "off", False):
        return x
    x = centred(x, norm)
    x = x / scale_of(x, norm)
    x = x if norm.w is None else x * working(norm.w).to(x)
    return x if norm.b is None else x + working(norm.b).to(x)


def affine(norm: FrozenNorm, x: Tensor) -> Tensor:
    """A frozen norm with its bias."""
    return norm(x) if norm.bias is None else norm(x) + norm.bias


def _aligned(directions: Tensor, stack: Tensor) -> Tensor:
    """Token directions with axes that stand for the same things as the stack's."""
    axes = tuple(stack.shape[1:-1])
    shape = tuple(directions.shape[:-1])
    if len(shape) == 1 and len(axes) == 2:
        per_row, per_pos = shape[0] == axes[0], shape[0] == axes[1]
        if per_row and per_pos and shape[0] > 1:
            raise ValueError(
                f"{shape[0]} tokens fit the batch as well as the positions of a stack of shape "
                f"{tuple(stack.shape)}: give them as [batch, 1] or [batch, pos]"
            )
        if per_row:
            return directions[:, None]
    try:
        broadcast = torch.broadcast_shapes(shape, axes)
    except RuntimeError:
        broadcast = None
    if broadcast != axes:
        raise ValueError(
            f"tokens of shape {shape} do not fit a stack of shape {tuple(stack.shape)}: give one "
            "token, one for every batch row, or [batch, pos]"
        )
    return directions
