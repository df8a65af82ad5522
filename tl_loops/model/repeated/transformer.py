"""A HookedTransformer some of whose blocks run several times, over its own weights."""

from collections.abc import Iterable
from inspect import signature
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_loops.layout.layout import LoopLayout
from tl_loops.mechanisms.exclusions import check_shared_keys
from tl_loops.mechanisms.kv_sharing import KVSharing
from tl_loops.model import readout
from tl_loops.model.checks import (
    block_index,
    check_residual,
    check_return_type,
    check_starts,
    check_state,
)
from tl_loops.model.hooks import CoordinateHooks
from tl_loops.model.iterations import at_iterations
from tl_loops.model.repeated.config import RepeatedConfig
from tl_loops.model.repeated.weights import BorrowedWeights
from tl_loops.model.start import read_text_or_tokens
from tl_loops.nn.loop.hooks import IterationHooks
from tl_loops.nn.unrolling import tied_copy, unroll
from tl_loops.upstream import (
    USE_DEFAULT_VALUE,
    AnyHookPoint,
    HookedTransformer,
    HookPoint,
    KeyValueCache,
    LocallyOverridenDefaults,
    TransformerBase,
    complete_norm,
    init_root,
    unshared,
)

_NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")


class RepeatedTransformer(CoordinateHooks, BorrowedWeights):
    """A HookedTransformer with repeated blocks; what :func:`tl_loops.loop` returns.

    It computes with TransformerLens's own components, so that with one iteration every number is
    the original's, bit for bit. Every Parameter is the original's object: an edit of a weight shows
    in both models. Hook points are its own, and so are the flags (``set_use_attn_result``, ...).

    Between iterations there are ``hook_initial_state`` (what enters the first core block),
    ``iter.{t}.hook_state_in``, ``iter.{t}.hook_injected`` (the same, as nothing is injected) and
    ``iter.{t}.hook_state_out``.

    Args:
        original: The model whose blocks repeat.
        layout: How; its physical layers are the original's blocks in order.
    """

    iter: nn.ModuleList
    blocks: Any
    cfg: RepeatedConfig
    hook_initial_state: HookPoint

    def __init__(self, original: HookedTransformer, layout: LoopLayout):
        init_root(self)
        n_params = sum(p.numel() for p in original.parameters())
        self.cfg = RepeatedConfig.of(original.cfg, layout, n_params)
        self.tokenizer, self.dataset = original.tokenizer, original.dataset
        for name, child in original.named_children():
            if name != "blocks":
                setattr(self, name, self._own(child))
        if not hasattr(self, "ln_final"):  # normalization_type=None
            object.__setattr__(self, "ln_final", nn.Identity())
        complete_norm(self.ln_final)
        self.hook_initial_state = HookPoint()
        names = layout.physical_names()
        physical = {
            name: self._own(block) for name, block in zip(names, original.blocks, strict=True)
        }
        for block in physical.values():
            for norm in _NORMS:
                if hasattr(block, norm):
                    complete_norm(getattr(block, norm))
        blocks = unroll(layout, physical)
        self.blocks = nn.ModuleList(blocks)
        self.iter = nn.ModuleList(IterationHooks(self.cfg, t) for t in range(layout.n_iterations))
        for name in ("tokenizer_padding_side", "training"):
            if name in vars(original):
                setattr(self, name, getattr(original, name))
        self.setup()

    def _own(self, module: nn.Module) -> Any:
        """A module with hook points and flags of this model, over the original's parameters."""
        if isinstance(module, AnyHookPoint):
            return HookPoint()
        own = tied_copy(module)
        for part in own.modules():
            if "cfg" in vars(part):
                part.__dict__["cfg"] = self.cfg
        return own

    # The forward pass.

    def forward(
        self,
        input: str | list[str] | Int[Tensor, "*batch pos"] | Float[Tensor, "batch pos d_model"],
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: str | None = USE_DEFAULT_VALUE,
        start_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        shortformer_pos_embed: Float[Tensor, "batch pos d_model"] | None = None,
        attention_mask: Tensor | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: KeyValueCache | None = None,
        *,
        n_iterations: SupportsIndex | None = None,
        initial_state: Float[Tensor, "batch pos d_model"] | None = None,
        start_at_iteration: int | None = None,
        kv_sharing: str | None = None,
    ) -> Any:
        """Run the model; TransformerLens's arguments, on unrolled block indices, and the loop's.

        Args:
            input: Text, tokens, or (with a start) the residual stream.
            return_type: ``"logits"``, ``"loss"``, ``"both"`` or ``None``.
            loss_per_token: Whether the loss keeps its position axis.
            prepend_bos: Overrides ``cfg.default_prepend_bos`` for text.
            padding_side: Overrides the tokenizer's side for text.
            start_at_layer: Start before this block, with its ``resid_pre`` as input.
            tokens: Tokens for the loss, when the input is not tokens.
            shortformer_pos_embed: Of shortformer models, with a start.
            attention_mask: 1 for tokens, 0 for padding.
            stop_at_layer: Return what enters this block.
            past_kv_cache: One entry per unrolled block.
            n_iterations: Number of iterations for this call.
            initial_state: Put in the place of what enters the first core block.
            start_at_iteration: Start before this iteration, with its ``hook_state_in`` as input.
            kv_sharing: ``None`` or ``"none"``.

        Returns:
            As ``HookedTransformer.forward``.

        Raises:
            ValueError: Arguments of the wrong shape, out of range, or that contradict each other.
            ConfigError: Another ``kv_sharing``.
        """
        check_shared_keys(self.cfg, KVSharing.parse(kv_sharing))
        model = at_iterations(self, n_iterations)
        check_return_type(return_type)
        check_starts(model.cfg, start_at_layer, start_at_iteration, past_kv_cache)
        layout, depth = model.layout, model.cfg.n_layers
        start, stop = 0, depth
        resid: Any
        with LocallyOverridenDefaults(model, prepend_bos=prepend_bos, padding_side=padding_side):
            if start_at_layer is None and start_at_iteration is None:
                text = isinstance(input, (str, list))
                ids, known = model._read(input, past_kv_cache) if text else (input, None)
                resid, tokens, shortformer_pos_embed, attention_mask = model.input_to_embed(
                    ids,
                    attention_mask=known if attention_mask is None else attention_mask,
                    past_kv_cache=past_kv_cache,
                )
            else:
                check_residual(model.cfg, input)
                resid = input
                if start_at_iteration is not None:
                    start = layout.index(iteration=start_at_iteration)
                else:
                    start = block_index(depth, start_at_layer or 0, "start_at_layer")
        if stop_at_layer is not None:
            stop = block_index(depth, stop_at_layer, "stop_at_layer")
        check_state("initial_state", initial_state, resid)
        enter = start_at_iteration is not None or start_at_layer in (None, 0)
        for index in range(start, stop):
            if index > start or enter:
                begins = index > start or start_at_iteration is None
                resid = model._enter(index, resid, initial_state, begins)
            resid = model.blocks[index](
                resid,
                past_kv_cache_entry=None if past_kv_cache is None else past_kv_cache[index],
                shortformer_pos_embed=shortformer_pos_embed,
                attention_mask=attention_mask,
            )
            if index < depth - 1 or stop_at_layer is None:
                resid = model._leave(index, resid)
        if stop_at_layer is not None:
            return model._enter(stop, resid, initial_state) if start < stop < depth else resid
        if start == depth:
            resid = model._leave(depth - 1, resid)
        if model.cfg.normalization_type is not None:
            resid = model.ln_final(resid)
        if return_type is None:
            return None
        logits = readout.unembed(model, resid)
        return readout.output(model, return_type, logits, tokens, attention_mask, loss_per_token)

    def _read(
        self, text: str | list[str], past: KeyValueCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens of text, with the tokenizer's mask where TransformerLens would guess one."""
        read = read_text_or_tokens(self, text)
        if past is None and self.tokenizer.padding_side != "left":
            return read.tokens, None
        mask = torch.ones_like(read.tokens) if read.mask is None else read.mask
        return read.tokens, mask.int()

    def _enter(
        self, index: int, resid: Tensor, initial_state: Tensor | None, begins: bool = True
    ) -> Tensor:
        """The hook points before a block that begins an iteration."""
        t = self.layout.begins_at(index)
        if t is None:
            return resid
        if t == 0 and begins:
            resid = resid if initial_state is None else initial_state.to(resid)
            resid = self.hook_initial_state(unshared(resid, self.hook_initial_state))
        hooks: Any = self.iter[t]
        resid = hooks.hook_state_in(unshared(resid, hooks.hook_state_in))
        return hooks.hook_injected(unshared(resid, hooks.hook_injected))

    def _leave(self, index: int, resid: Tensor) -> Tensor:
        """The hook point after a block that ends an iteration."""
        t = self.layout.ends_at(index)
        if t is None:
            return resid
        hooks: Any = self.iter[t]
        return hooks.hook_state_out(unshared(resid, hooks.hook_state_out))

    def enter_coda(
        self, state: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """What happens to the last state between core and coda: nothing."""
        return state

    def state_logits(
        self, state: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of a state that leaves an iteration, of a model without a coda.

        Raises:
            LoopedSemanticsError: A coda stands between the states and the logits.
        """
        after = self.cfg.readout
        after.refuse_coda()
        return readout.unembed(self, self.ln_final(state) if after.final_steps() else state)

    def generate(self, *args: Any, n_iterations: SupportsIndex | None = None, **kwargs: Any) -> Any:
        """TransformerLens's generation, with a key-value slot for every unrolled block.

        Args:
            *args: As TransformerLens.
            n_iterations: Number of iterations for this call.
            **kwargs: As TransformerLens, which would ignore what it does not know.

        Raises:
            TypeError: An argument that TransformerLens's ``generate`` does not have.
            ConfigError: ``kv_sharing``.
        """
        check_shared_keys(self.cfg, KVSharing.parse(kwargs.pop("kv_sharing", None)))
        known = [*signature(TransformerBase.generate).parameters, "output_logits"]
        for name in kwargs:
            if name not in known:
                raise TypeError(f"generate() has no argument {name!r}; known: {', '.join(known)}")
        parent: Any = super(RepeatedTransformer, at_iterations(self, n_iterations))
        return parent.generate(*args, **kwargs)

    def make_kv_cache(self, batch: int = 1, kv_sharing: str | None = None) -> KeyValueCache:
        """An empty key-value cache for ``past_kv_cache``, one entry an unrolled block.

        Args:
            batch: Number of texts.
            kv_sharing: ``None`` or ``"none"``.

        Raises:
            ConfigError: Another ``kv_sharing``.
        """
        check_shared_keys(self.cfg, KVSharing.parse(kv_sharing))
        return KeyValueCache.init_cache(self.cfg, self.embed.W_E.device, batch)

    def iteration_hooks(
        self, cfg: RepeatedConfig, old: Iterable[nn.Module]
    ) -> list[IterationHooks]:
        """Hook points for the iterations of ``cfg``; those of ``old`` are kept."""
        hooks: list[Any] = list(old)[: cfg.n_iterations]
        return hooks + [IterationHooks(cfg, t) for t in range(len(hooks), cfg.n_iterations)]
