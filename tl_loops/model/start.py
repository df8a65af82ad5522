"""From the arguments of a call to where its run starts: tokens, mask, positions, residual stream.

A run starts with tokens, with the stream that enters a block, or with the state that enters an
iteration. What a start in the middle needs besides is asked for here, before anything runs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from tl_loops.arguments import argument
from tl_loops.errors import LoopedSemanticsError
from tl_loops.mechanisms.kv_sharing import KVSharing
from tl_loops.model.checks import block_index, check_residual, check_starts, check_state
from tl_loops.nn.context import make_context
from tl_loops.nn.kv_cache import SharedKeyValueCache
from tl_loops.nn.loop.run import StackRun
from tl_loops.upstream import USE_DEFAULT_VALUE, KeyValueCache, given
from tl_loops.upstream.inputs import (
    ModelInput,
    attention_needs,
    check_length,
    model_input,
    token_ids,
    zeros_and_ones,
)


@dataclass(eq=False)
class Start:
    """Where a run starts, and with what.

    Attributes:
        run: The run, with its positions, mask and key-value cache.
        resid: [batch, pos, d_model], what enters the first block or iteration.
        tokens: [batch, pos], the new tokens where they are known.
        mask: [batch, pos], 0 at new tokens that are padding; ``None``: none is.
        at_layer: ``start_at_layer`` of the call.
        at_iteration: ``start_at_iteration`` of the call.
    """

    run: StackRun
    resid: Tensor
    tokens: Tensor | None
    mask: Tensor | None
    at_layer: int | None
    at_iteration: int | None

    def first_iteration(self) -> int:
        """The first iteration that runs whole."""
        return self.at_iteration or self.run.layout.next_iteration(self.run.start)

    def carry(
        self,
        sharing: KVSharing | None,
        stop: int | None,
        initial_state: Tensor | None,
        injection: Tensor | None,
        other_state: Tensor | None,
    ) -> None:
        """Give the run what it reads besides the residual stream.

        Raises:
            ValueError: A tensor of the wrong shape, or one that this start lacks.
            LoopedSemanticsError: The loop carries more than its state, and the start is inside it.
        """
        run, x = self.run, self.resid
        self._check_inside(sharing)
        if sharing is not None and sharing.within_call and run.past is None:
            run.past = SharedKeyValueCache(run.cfg, sharing, x.device, x.shape[0])
            run.past.unroll(run.layout)
        for name, state in (
            ("initial_state", initial_state),
            ("injection", injection),
            ("other_state", other_state),
        ):
            check_state(name, state, x)
        run.initial_state = initial_state
        run.injection = None if injection is None else injection.to(x)
        self._check_injection(stop, other_state)
        if other_state is not None:
            if run.cfg.stacks is None:
                raise ValueError("other_state is for models with two stacks (cfg.stacks)")
            run.other_state = other_state.to(x)

    def go(self, stop: int | None) -> Any:
        """Run from here to before block ``stop``, or to the end."""
        return self.run.run(
            self.resid,
            stop,
            enter_first=self.at_iteration is not None or self.at_layer in (None, 0),
            state_given=self.at_iteration is not None,
        )

    def _check_inside(self, sharing: KVSharing | None) -> None:
        """Raise for a start in a loop that carries more than its state."""
        cfg, layout, start = self.run.cfg, self.run.layout, self.run.start
        if cfg.state_is_whole and sharing is None:
            return
        inside = max(layout.core_start, 1) <= start < layout.coda_start
        # After the last block only the end of the last iteration follows, which runs no attention.
        mixes = cfg.readout.mixes_states or cfg.readout.sums_states
        inside |= mixes and start == layout.coda_start == layout.n_layers
        if (self.at_layer is not None and inside) or self.at_iteration:
            raise LoopedSemanticsError(
                "this loop carries more than its state from one iteration to the next "
                f"({', '.join(cfg.carried) or 'shared keys'}), so a run cannot start "
                "inside it: start_at_layer=0 or start_at_iteration=0 runs all of it"
            )

    def _check_injection(self, stop: int | None, other_state: Tensor | None) -> None:
        """Raise for a start after the prelude whose later iterations would lack e."""
        if not self._lacks(stop):
            return
        cfg = self.run.cfg
        if cfg.injection is not None and self.run.injection is None:
            raise ValueError(
                "this start skips the prelude, whose output the following iterations inject: "
                "pass injection=cache['hook_injection'] [batch, pos, d_model]"
            )
        if cfg.stacks is not None and other_state is None:
            raise ValueError(
                "this start skips a call of the other stack, whose state the following "
                "iterations read: pass other_state=cache['iter.{t}.hook_other_in'] "
                "[batch, pos, d_model] of the iteration t of the start"
            )

    def _lacks(self, stop: int | None) -> bool:
        """Whether the start skips what a later iteration of the run reads besides the stream."""
        layout, start = self.run.layout, self.run.start
        end = layout.n_layers if stop is None else stop
        next_entry = start
        if self.at_iteration is None:
            if self.at_layer is None or start < max(layout.core_start, 1):
                return False
            next_entry = start + 1
        t = layout.next_iteration(next_entry)
        return t < layout.n_iterations and layout.iteration_blocks(t)[0] <= end


def start_run(
    model: Any,
    input: Any,
    tokens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    start_at_layer: int | None = None,
    start_at_iteration: int | None = None,
    past: KeyValueCache | None = None,
    prefix_mask: Tensor | None = None,
) -> Start:
    """Embed the input or take the residual stream, with positions, masks and the first block.

    The arguments are those of ``LoopedTransformer.forward``.

    Raises:
        ValueError: Arguments of the wrong shape, out of range, beyond the context, or that
            contradict each other.
        LoopedSemanticsError: A key-value cache of a model whose tokens all see each other.
    """
    cfg, block = model.cfg, 0
    tokens = given("tokens", tokens, Int[Tensor, "batch pos"])
    attention_mask = _checked_mask(attention_mask, each_row=past is None)
    check_starts(cfg, start_at_layer, start_at_iteration, past)
    if past is not None and cfg.attention_dir != "causal":
        raise LoopedSemanticsError(
            "every token of this model sees every other (attention_dir='bidirectional'), so "
            "cached keys would be wrong once a token is added: leave past_kv_cache out "
            "(generate: use_past_kv_cache=False)"
        )
    device = model.embed.W_E.device
    n_past = 0 if past is None else past[0].past_keys.shape[1]
    from_tokens = start_at_layer is None and start_at_iteration is None
    if from_tokens:
        tokens, padding, attention_mask = read_tokens(model, input, attention_mask, past)
        batch, n_new = tokens.shape
    else:
        check_residual(cfg, input)
        batch, n_new = input.shape[:2]
        if past is not None and attention_mask is None:
            attention_mask = past.append_attention_mask(
                torch.ones(batch, n_new, dtype=torch.int, device=input.device)
            )
        padding = None if attention_mask is None else attention_mask[:, -n_new:]
        if start_at_iteration is not None:
            block = model.layout.index(iteration=start_at_iteration, layer=0)
        elif start_at_layer is not None:
            block = block_index(cfg.n_layers, start_at_layer, "start_at_layer")
    check_length(cfg, n_new, n_past, attention_mask)
    context = make_context(
        batch,
        n_new,
        n_past,
        attention_mask,
        cfg.attention_dir == "causal",
        model._rotary,
        device,
        _value_tokens(cfg, tokens, batch, n_new, device),
        _prefix(cfg, prefix_mask, batch, n_new, n_past, device),
    )
    x = input
    if from_tokens:
        x = model.hook_embed(model.embed(tokens))
        if cfg.positional_embedding_type == "standard":
            x = x + model.hook_pos_embed(model.pos_embed.at(context.positions))
    run = StackRun(model, model.layout, cfg, context, block, past=past)
    return Start(run, x, tokens, padding, start_at_layer, start_at_iteration)


def read_tokens(
    model: Any,
    input: Any,
    attention_mask: Tensor | None,
    past: KeyValueCache | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Tokens of text or tokens, and what of them is padding.

    Right padding of a causal model reaches no real token, so attention needs no mask for it unless
    later tokens follow in a key-value cache.

    Returns:
        The tokens [batch, pos]; 0 where they are padding [batch, pos], or ``None``; and the mask
        for attention over cached and new tokens, or ``None``.
    """
    if not isinstance(input, (str, list)):
        if not isinstance(input, Tensor) or input.is_floating_point():
            raise ValueError(
                "input must be text or integer tokens [batch, pos]; to give a residual stream "
                "also give start_at_layer or start_at_iteration"
            )
        if attention_mask is not None:
            tokens = token_ids(model, input)
            padding = attention_mask[:, -tokens.shape[1] :]
            return tokens, padding, _with_past(attention_mask, tokens, past)
    read = read_text_or_tokens(model, input)
    if attention_mask is None:
        padding = None if read.mask is None else read.mask.int()
        if past is not None or attention_needs(read.mask, model.cfg):
            attention_mask = padding
    else:
        padding = attention_mask[:, -read.tokens.shape[1] :]
    return read.tokens, padding, _with_past(attention_mask, read.tokens, past)


def real_tokens(
    model: Any,
    input: Any,
    attention_mask: Tensor | None,
    prepend_bos: bool | None = USE_DEFAULT_VALUE,
    padding_side: str | None = USE_DEFAULT_VALUE,
    from_tokens: bool = True,
) -> tuple[Int[Tensor, "batch pos"] | None, Bool[Tensor, "batch pos"] | None]:
    """Tokens of a forward pass, and which are real; ``None``: a residual stream, and all.

    Args:
        model: The model.
        input: What it is given.
        attention_mask: What it is given; over a key-value cache's tokens and the new ones, or the
            new ones alone.
        prepend_bos: What it is given.
        padding_side: What it is given.
        from_tokens: Whether the input is text or tokens, not a residual stream.
    """
    found, tokens = None, None
    n_given = 0 if from_tokens else input.shape[1]
    if from_tokens and (attention_mask is None or isinstance(input, (str, list))):
        read = model_input(model, input, prepend_bos=prepend_bos, padding_side=padding_side)
        found, tokens = read.mask, read.tokens
    elif from_tokens:
        tokens = input.reshape(-1, input.shape[-1])
    attention_mask = _checked_mask(attention_mask, each_row=False)
    if attention_mask is None:
        return tokens, found
    n_new = n_given if tokens is None else tokens.shape[1]
    mask = attention_mask[:, -n_new:].bool()
    return tokens, None if bool(mask.all()) else mask


def read_text_or_tokens(
    model: Any, input: Any, padding_side: str | None = USE_DEFAULT_VALUE
) -> ModelInput:
    """Tokens of text or tokens, with the mask that says which are padding.

    Raises:
        ValueError: Text without a tokenizer, or an input that is neither.
    """
    if isinstance(input, (str, list)) and model.tokenizer is None:
        raise ValueError("text needs a tokenizer; give tokens [batch, pos] instead")
    return model_input(model, input, padding_side=padding_side)


def _checked_mask(mask: Any, each_row: bool) -> Tensor | None:
    """A mask of ones and zeros; of a run without cached tokens each row has a real one.

    Raises:
        ValueError: It is something else.
    """
    if mask is None:
        return None
    mask = argument("attention_mask", mask, Shaped[Tensor, "batch pos"])
    real = zeros_and_ones(mask)
    if each_row and not bool(real.any(-1).all()):
        raise ValueError("attention_mask has a row without a real token")
    return mask


def _with_past(mask: Tensor | None, tokens: Tensor, past: KeyValueCache | None) -> Tensor | None:
    """The mask over cached and new tokens."""
    if past is None:
        return mask
    n_past = past[0].past_keys.shape[1]
    if mask is None:
        mask = torch.ones_like(tokens)
    if n_past and mask.shape[1] == n_past + tokens.shape[1]:
        return mask
    return past.append_attention_mask(mask)


def _value_tokens(
    cfg: Any, tokens: Tensor | None, batch: int, n_new: int, device: torch.device
) -> Tensor | None:
    """The tokens that value embeddings read; ``None`` where the model has none."""
    if not cfg.value_embeddings:
        return None
    if tokens is None or tuple(tokens.shape) != (batch, n_new):
        found = "none" if tokens is None else f"shape {tuple(tokens.shape)}"
        raise ValueError(
            "the values of this model read embeddings of the tokens themselves: with a "
            f"residual stream also pass tokens=[batch, pos] = ({batch}, {n_new}), got {found}"
        )
    return tokens.to(device)


def _prefix(
    cfg: Any,
    prefix_mask: Tensor | None,
    batch: int,
    n_new: int,
    n_past: int,
    device: torch.device,
) -> Tensor | None:
    """A prefix mask that has an effect, as booleans."""
    if prefix_mask is None:
        return None
    if not cfg.prefix_mask:
        raise ValueError("this model takes no prefix_mask (cfg.prefix_mask is False)")
    if tuple(prefix_mask.shape) != (batch, n_new):
        raise ValueError(
            f"prefix_mask must be [batch, new tokens] = ({batch}, {n_new}), "
            f"got {tuple(prefix_mask.shape)}"
        )
    prefix = prefix_mask.to(device).bool()
    if not bool(prefix.any()):
        return None
    if n_past:
        raise ValueError(
            "a prefix sees itself in both directions, so it must be one call: the key-value "
            f"cache already holds {n_past} tokens, whose states cannot see new ones"
        )
    return prefix
