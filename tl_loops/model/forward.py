"""The forward pass: TransformerLens's arguments on unrolled blocks, and those of the loop."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_loops.errors import LoopedSemanticsError
from tl_loops.mechanisms.exclusions import check_shared_keys
from tl_loops.mechanisms.kv_sharing import KVSharing
from tl_loops.model.exits import ExitMode
from tl_loops.model.readout import LoopedReadout
from tl_loops.model.restarts import Restarts
from tl_loops.nn.context import make_context
from tl_loops.nn.kv_cache import SharedKeyValueCache
from tl_loops.nn.loop.run import StackRun
from tl_loops.nn.rotary import RotaryTable
from tl_loops.upstream import (
    USE_DEFAULT_VALUE,
    KeyValueCache,
    LocallyOverridenDefaults,
    get_attention_mask,
)


class LoopedForward(Restarts, LoopedReadout):
    """Runs an unrolled stack from tokens, from a block or from an iteration."""

    _rotary: RotaryTable | None

    def forward(  # type: ignore[override]
        self,
        input: str | list[str] | Int[Tensor, "*batch pos"] | Float[Tensor, "batch pos d_model"],
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: str | None = USE_DEFAULT_VALUE,
        start_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        shortformer_pos_embed: None = None,
        attention_mask: Int[Tensor, "batch key"] | Bool[Tensor, "batch key"] | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: KeyValueCache | None = None,
        *,
        n_iterations: int | None = None,
        initial_state: Float[Tensor, "..."] | None = None,
        injection: Float[Tensor, "..."] | None = None,
        start_at_iteration: int | None = None,
        exit_at: int | None = None,
        exit_threshold: float | None = None,
        weighted_exit: bool = False,
        other_state: Float[Tensor, "..."] | None = None,
        prefix_mask: Int[Tensor, "..."] | Bool[Tensor, "..."] | None = None,
        kv_sharing: str | None = None,
    ) -> Any:
        """Run the model.

        The arguments up to ``past_kv_cache`` are TransformerLens's, on unrolled block indices.

        Args:
            input: Text, tokens, or (with a start) the residual stream.
            return_type: ``"logits"``, ``"loss"``, ``"both"`` or ``None``.
            loss_per_token: Whether the loss keeps its position axis.
            prepend_bos: Overrides ``cfg.default_prepend_bos`` for text.
            padding_side: Overrides the tokenizer's side for text.
            start_at_layer: Start before this block, with its ``resid_pre`` (behind the injection)
                as input. 0 means: behind the embedding.
            tokens: Tokens for the loss, and for value embeddings where the model has them, when the
                input is not tokens.
            shortformer_pos_embed: Accepted for TransformerLens's generation loop; must be ``None``.
            attention_mask: 1 for tokens, 0 for padding, over cached and new tokens.
            stop_at_layer: Return what enters this block; with the unrolled depth, what leaves the
                last one. ``model(model(x, stop_at_layer=i), start_at_layer=i, ...)`` is
                ``model(x)``.
            past_kv_cache: One entry an unrolled block.
            n_iterations: Number of iterations for this call.
            initial_state: [batch, pos, d_model], the state before iteration 0; ``None``: the
                architecture's rule.
            injection: [batch, pos, d_model], the prelude output e (``cache["hook_injection"]``),
                needed when a start skips the prelude and later iterations inject it.
            start_at_iteration: Start before this iteration, with its ``hook_state_in`` as input.
            exit_at: Logits of the state after this iteration (models without a coda).
            exit_threshold: Per position, logits of the first iteration whose cumulative exit
                probability reaches this; default ``cfg.exit_threshold``.
            weighted_exit: Logits of all iterations weighted by their exit probabilities.
            other_state: [batch, pos, d_model], with two stacks and a start inside the loop: the
                state of the stack that the first iteration does not call
                (``cache["iter.{t}.hook_other_in"]``).
            prefix_mask: 1 where new tokens see each other in both directions, else 0 (models with
                ``cfg.prefix_mask``). Not behind a filled key-value cache: a prefix is one call.
            kv_sharing: Which keys and values the iterations share, see
                :class:`tl_loops.KVSharing`; ``None``: as the cache was made, else
                ``cfg.kv_sharing``; ``"none"``: not. With ``past_kv_cache`` it must be the cache's.

        Returns:
            Logits [batch, pos, d_vocab], the loss, both, nothing, or with ``stop_at_layer`` the
            residual stream [batch, pos, d_model].

        Raises:
            ValueError: Arguments of the wrong shape, out of range, or that contradict each other.
            LoopedSemanticsError: The exit asked for has no meaning on this model.
        """
        if n_iterations is not None and n_iterations != self.cfg.n_iterations:
            arguments = {k: v for k, v in locals().items() if k not in ("self", "n_iterations")}
            with self.iterations(n_iterations):
                return self.forward(**arguments)
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(
                f"return_type must be 'logits', 'loss', 'both' or None, got {return_type!r}"
            )
        mode = ExitMode(exit_at, exit_threshold, weighted_exit)
        if not mode.early:
            mode = ExitMode(threshold=self.cfg.exit_threshold)
        sharing = self._sharing(kv_sharing, past_kv_cache)
        with LocallyOverridenDefaults(self, prepend_bos=prepend_bos, padding_side=padding_side):
            run, x, tokens, start = self._prepare(
                input,
                tokens,
                attention_mask,
                start_at_layer,
                start_at_iteration,
                past_kv_cache,
                prefix_mask,
            )
        stop = None if stop_at_layer is None else self._block_index(stop_at_layer, "stop_at_layer")
        first_iteration = start_at_iteration or max(
            0, -(-(start - self.cfg.n_prelude) // self.cfg.n_core)
        )
        mode.check(self.cfg, first_iteration)
        self._check_start(start, start_at_layer, start_at_iteration, sharing)
        if sharing is not None and sharing.within_call and run.past is None:
            run.past = SharedKeyValueCache(self.cfg, sharing, x.device, x.shape[0])
            run.past.unroll(self.layout)
        run.keep_states = mode.early and stop is None
        self._check_state("initial_state", initial_state, x)
        self._check_state("injection", injection, x)
        self._check_state("other_state", other_state, x)
        run.initial_state = initial_state
        run.injection = None if injection is None else injection.to(x)
        self._need_injection(run, start, start_at_layer, start_at_iteration, stop, other_state)
        if other_state is not None:
            if self.cfg.stacks is None:
                raise ValueError("other_state is for models with two stacks (cfg.stacks)")
            run.other_state = other_state.to(x)

        trajectory = run.run(
            x,
            stop,
            enter_first=start_at_iteration is not None or start_at_layer in (None, 0),
            state_given=start_at_iteration is not None,
        )
        if stop is not None:
            return trajectory.resid
        if mode.early:
            logits = self._exit_logits(mode, trajectory.states, trajectory.gates)
        else:
            x = trajectory.resid
            logits = None
            if not trajectory.normed:
                x = self.ln_final(x)
            if return_type is not None:
                logits = self._unembed(x)
        return self._output(return_type, logits, tokens, attention_mask, loss_per_token)

    def _prepare(
        self,
        input: Any,
        tokens: Tensor | None,
        attention_mask: Tensor | None,
        start_at_layer: int | None,
        start_at_iteration: int | None,
        past: KeyValueCache | None,
        prefix_mask: Tensor | None = None,
    ) -> tuple[StackRun, Tensor, Tensor | None, int]:
        """Embed the input or take the residual stream; positions, masks and the first block."""
        start = 0
        if start_at_layer is not None and start_at_iteration is not None:
            raise ValueError("give start_at_layer or start_at_iteration, not both")
        if past is not None and len(past.entries) != self.cfg.n_layers:
            raise ValueError(
                f"the key-value cache has {len(past.entries)} entries, but the model has "
                f"{self.cfg.n_layers} unrolled blocks: make it with the same n_iterations"
            )
        if past is not None and self.cfg.attention_dir != "causal":
            raise LoopedSemanticsError(
                "every token of this model sees every other (attention_dir='bidirectional'), so "
                "cached keys would be wrong once a token is added: leave past_kv_cache out "
                "(generate: use_past_kv_cache=False)"
            )
        n_past = 0 if past is None else past[0].past_keys.shape[1]
        if start_at_layer is None and start_at_iteration is None:
            if isinstance(input, (str, list)):
                input = self.to_tokens(input)
            if not isinstance(input, Tensor) or input.is_floating_point():
                raise ValueError(
                    "input must be text or integer tokens [batch, pos]; to give a residual stream "
                    "also give start_at_layer or start_at_iteration"
                )
            tokens = (input[None] if input.ndim == 1 else input).to(self.embed.W_E.device)
            batch, n_new = tokens.shape
            attention_mask = self._mask(tokens, attention_mask, past, n_past)
        else:
            if not isinstance(input, Tensor) or input.ndim != 3:
                raise ValueError(
                    "with start_at_layer or start_at_iteration the input must be the residual "
                    f"stream [batch, pos, {self.cfg.d_model}]"
                )
            batch, n_new = input.shape[:2]
            if past is not None and attention_mask is None:
                attention_mask = past.append_attention_mask(
                    torch.ones(batch, n_new, dtype=torch.int, device=input.device)
                )
            if start_at_iteration is not None:
                start = self.layout.index(iteration=start_at_iteration, layer=0)
            elif start_at_layer is not None:
                start = self._block_index(start_at_layer, "start_at_layer")
        context = make_context(
            batch,
            n_new,
            n_past,
            attention_mask,
            self.cfg.attention_dir == "causal",
            self._rotary,
            self.embed.W_E.device,
            self._value_tokens(tokens, batch, n_new),
            self._prefix(prefix_mask, batch, n_new, n_past),
        )
        if start_at_layer is None and start_at_iteration is None:
            x = self.hook_embed(self.embed(tokens))
            if self.cfg.positional_embedding_type == "standard":
                x = x + self.hook_pos_embed(self.pos_embed(context.positions))
        else:
            x = input
        run = StackRun(self, self.layout, self.cfg, context, start, past=past)
        return run, x, tokens, start

    def _value_tokens(self, tokens: Tensor | None, batch: int, n_new: int) -> Tensor | None:
        """The tokens that value embeddings read; ``None`` where the model has none."""
        if not self.cfg.value_embeddings:
            return None
        if tokens is None or tuple(tokens.shape) != (batch, n_new):
            found = "none" if tokens is None else f"shape {tuple(tokens.shape)}"
            raise ValueError(
                "the values of this model read embeddings of the tokens themselves: with a "
                f"residual stream also pass tokens=[batch, pos] = ({batch}, {n_new}), got {found}"
            )
        return tokens.to(self.embed.W_E.device)

    def _prefix(
        self, prefix_mask: Tensor | None, batch: int, n_new: int, n_past: int
    ) -> Tensor | None:
        """A prefix mask that has an effect, as booleans."""
        if prefix_mask is None:
            return None
        if not self.cfg.prefix_mask:
            raise ValueError("this model takes no prefix_mask (cfg.prefix_mask is False)")
        if tuple(prefix_mask.shape) != (batch, n_new):
            raise ValueError(
                f"prefix_mask must be [batch, new tokens] = ({batch}, {n_new}), "
                f"got {tuple(prefix_mask.shape)}"
            )
        prefix = prefix_mask.to(self.embed.W_E.device).bool()
        if not bool(prefix.any()):
            return None
        if n_past:
            raise ValueError(
                "a prefix sees itself in both directions, so it must be one call: the key-value "
                f"cache already holds {n_past} tokens, whose states cannot see new ones"
            )
        return prefix

    def _mask(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        past: KeyValueCache | None,
        n_past: int,
    ) -> Tensor | None:
        """The mask over cached and new tokens; padding is found as TransformerLens finds it."""
        tokenizer = self.tokenizer
        if attention_mask is None and tokenizer is not None and tokenizer.padding_side == "left":
            prepend_bos = bool(self.cfg.default_prepend_bos)
            attention_mask = get_attention_mask(tokenizer, tokens, prepend_bos)
        if past is None:
            return attention_mask
        if attention_mask is None:
            attention_mask = torch.ones_like(tokens)
        if attention_mask.shape[1] == n_past + tokens.shape[1] and n_past:
            return attention_mask
        return past.append_attention_mask(attention_mask)

    def _block_index(self, index: int, name: str) -> int:
        depth = self.cfg.n_layers
        if not -depth <= index <= depth:
            raise ValueError(f"{name}={index} is out of range: there are {depth} unrolled blocks")
        return index + depth if index < 0 else index

    def make_kv_cache(self, batch: int = 1, kv_sharing: str | None = None) -> KeyValueCache:
        """An empty key-value cache for ``past_kv_cache``.

        Args:
            batch: Number of texts.
            kv_sharing: Which keys and values the iterations share; ``None``: ``cfg.kv_sharing``;
                ``"none"``: each block has its own.

        Raises:
            ConfigError: ``kv_sharing`` names no sharing, or the model routes its tokens or has two
                stacks.
        """
        sharing = self._sharing(kv_sharing, None)
        device = self.embed.W_E.device
        if sharing is None:
            return KeyValueCache.init_cache(self.cfg, device, batch)
        cache = SharedKeyValueCache(self.cfg, sharing, device, batch)
        cache.unroll(self.layout)
        return cache

    def _sharing(self, kv_sharing: str | None, past: KeyValueCache | None) -> KVSharing | None:
        """How iterations share keys and values in a call, checked against its cache."""
        held = past.sharing if isinstance(past, SharedKeyValueCache) else None
        if kv_sharing is None:
            sharing = held or KVSharing.parse(self.cfg.kv_sharing)
        else:
            sharing = KVSharing.parse(kv_sharing)
        if past is not None and sharing != held:
            raise ValueError(
                f"kv_sharing={str(sharing)!r}, but the cache was made for {str(held)!r}: make it "
                "with model.make_kv_cache(batch, kv_sharing)"
            )
        check_shared_keys(self.cfg.mechanisms, sharing)
        if isinstance(past, SharedKeyValueCache):
            past.unroll(self.layout)
        return sharing
