"""A HookedTransformer some of whose blocks run several times, over its own weights."""

from collections.abc import Iterable
from inspect import signature
from typing import Any, TypeVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.layout import LoopLayout
from tl_loops.model.iterations import Iterations
from tl_loops.model.repeated.config import RepeatedConfig
from tl_loops.model.repeated.weights import BorrowedWeights
from tl_loops.nn.loop.hooks import IterationHooks
from tl_loops.nn.unrolling import tied_copy, unroll
from tl_loops.upstream import (
    USE_DEFAULT_VALUE,
    HookedTransformer,
    HookPoint,
    KeyValueCache,
    LocallyOverridenDefaults,
    Output,
    TransformerBase,
    apply_softcap,
    complete_norm,
    init_root,
    unshared,
)

Module = TypeVar("Module", bound=nn.Module)

_NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")


class RepeatedTransformer(Iterations, BorrowedWeights):
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
    cfg: RepeatedConfig  # type: ignore[assignment]
    hook_initial_state: HookPoint

    def __init__(self, original: HookedTransformer, layout: LoopLayout):
        init_root(self)
        n_params = sum(p.numel() for p in original.parameters())
        self.cfg = RepeatedConfig.of(original.cfg, layout, n_params)  # type: ignore[assignment]
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
        blocks = unroll(layout, physical)  # type: ignore[arg-type]
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.iter = nn.ModuleList(
            IterationHooks(self.cfg, None) for _ in range(layout.n_iterations)
        )
        for name in ("tokenizer_padding_side", "training"):
            if name in vars(original):
                setattr(self, name, getattr(original, name))
        self.setup()

    def _own(self, module: Module) -> Module:
        """A module with hook points and flags of this model, over the original's parameters."""
        if isinstance(module, HookPoint):
            return HookPoint()  # type: ignore[return-value]
        own = tied_copy(module)
        for part in own.modules():
            if "cfg" in vars(part):
                part.cfg = self.cfg  # type: ignore[assignment]
        return own

    # The forward pass.

    def forward(  # type: ignore[override]
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
        n_iterations: int | None = None,
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
            past_kv_cache: One entry an unrolled block.
            n_iterations: Number of iterations for this call.
            initial_state: Put in the place of what enters the first core block.
            start_at_iteration: Start before this iteration, with its ``hook_state_in`` as input.
            kv_sharing: ``None`` or ``"none"``.

        Returns:
            As ``HookedTransformer.forward``.

        Raises:
            ValueError: Arguments of the wrong shape, out of range, or that contradict each other.
            LoopedSemanticsError: Another ``kv_sharing``.
        """
        _check_sharing(kv_sharing)
        if n_iterations is not None and n_iterations != self.cfg.n_iterations:
            arguments = {k: v for k, v in locals().items() if k not in ("self", "n_iterations")}
            with self.iterations(n_iterations):
                return self.forward(**arguments)
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(
                f"return_type must be 'logits', 'loss', 'both' or None, got {return_type!r}"
            )
        if start_at_layer is not None and start_at_iteration is not None:
            raise ValueError("give start_at_layer or start_at_iteration, not both")
        if past_kv_cache is not None and len(past_kv_cache.entries) != self.cfg.n_layers:
            raise ValueError(
                f"the key-value cache has {len(past_kv_cache.entries)} entries, but the model has "
                f"{self.cfg.n_layers} unrolled blocks: make it with the same n_iterations"
            )
        layout, depth = self.layout, self.cfg.n_layers
        start, stop = 0, depth
        with LocallyOverridenDefaults(self, prepend_bos=prepend_bos, padding_side=padding_side):
            if start_at_layer is None and start_at_iteration is None:
                resid, tokens, shortformer_pos_embed, attention_mask = self.input_to_embed(
                    input,  # type: ignore[arg-type]
                    prepend_bos=prepend_bos,
                    padding_side=padding_side,  # type: ignore[arg-type]
                    attention_mask=attention_mask,
                    past_kv_cache=past_kv_cache,
                )
            elif isinstance(input, Tensor) and input.ndim == 3:
                resid = input
                if start_at_iteration is not None:
                    start = layout.index(iteration=start_at_iteration)
                else:
                    start = self._block_index(start_at_layer or 0, "start_at_layer")
            else:
                raise ValueError(
                    "with start_at_layer or start_at_iteration the input must be the residual "
                    f"stream [batch, pos, {self.cfg.d_model}]"
                )
        if stop_at_layer is not None:
            stop = self._block_index(stop_at_layer, "stop_at_layer")
        if initial_state is not None and initial_state.shape != resid.shape:
            raise ValueError(
                "initial_state must be [batch, pos, d_model] = "
                f"{tuple(resid.shape)}, got {tuple(initial_state.shape)}"
            )
        enter = start_at_iteration is not None or start_at_layer in (None, 0)
        for index in range(start, stop):
            if index > start or enter:
                begins = index > start or start_at_iteration is None
                resid = self._enter(index, resid, initial_state, begins)
            resid = self.blocks[index](
                resid,
                past_kv_cache_entry=None if past_kv_cache is None else past_kv_cache[index],
                shortformer_pos_embed=shortformer_pos_embed,
                attention_mask=attention_mask,
            )
            if index < depth - 1 or stop_at_layer is None:
                resid = self._leave(index, resid)
        if stop_at_layer is not None:
            return self._enter(stop, resid, initial_state) if start < stop < depth else resid
        if self.cfg.normalization_type is not None:
            resid = self.ln_final(resid)
        if return_type is None:
            return None
        logits = apply_softcap(self.unembed(resid), self.cfg.output_logits_soft_cap)
        if return_type == "logits":
            return logits
        if tokens is None:
            raise ValueError("a loss needs tokens: pass tokens=[batch, pos]")
        loss = self.loss_fn(logits, tokens, attention_mask, per_token=loss_per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def _block_index(self, index: int, name: str) -> int:
        depth = self.cfg.n_layers
        if not -depth <= index <= depth:
            raise ValueError(f"{name}={index} is out of range: there are {depth} unrolled blocks")
        return index + depth if index < 0 else index

    def _enter(
        self, index: int, resid: Tensor, initial_state: Tensor | None, begins: bool = True
    ) -> Tensor:
        """The hook points before a block that begins an iteration."""
        layout = self.layout
        at = layout.coordinate(index)
        if at.iteration is None or at.layer:
            return resid
        if at.iteration == 0 and begins:
            resid = resid if initial_state is None else initial_state.to(resid)
            resid = self.hook_initial_state(unshared(resid, self.hook_initial_state))
        hooks: Any = self.iter[at.iteration]
        resid = hooks.hook_state_in(unshared(resid, hooks.hook_state_in))
        return hooks.hook_injected(unshared(resid, hooks.hook_injected))

    def _leave(self, index: int, resid: Tensor) -> Tensor:
        """The hook point behind a block that ends an iteration."""
        t = self.layout.coordinate(index).iteration
        if t is None or index != self.layout.iteration_blocks(t)[-1]:
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
        readout = self.cfg.readout
        readout.refuse_coda()
        normed = self.ln_final(state) if readout.final_steps() else state
        return apply_softcap(self.unembed(normed), self.cfg.output_logits_soft_cap)

    def generate(self, *args: Any, n_iterations: int | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """TransformerLens's generation, with a key-value slot for every unrolled block.

        Args:
            *args: As TransformerLens.
            n_iterations: Number of iterations for this call.
            **kwargs: As TransformerLens, which would ignore what it does not know.

        Raises:
            TypeError: An argument that TransformerLens's ``generate`` does not have.
            LoopedSemanticsError: ``kv_sharing``.
        """
        _check_sharing(kwargs.pop("kv_sharing", None))
        known = [*signature(TransformerBase.generate).parameters, "output_logits"]
        for name in kwargs:
            if name not in known:
                raise TypeError(f"generate() has no argument {name!r}; known: {', '.join(known)}")
        with self._for_call(n_iterations):
            return super().generate(*args, **kwargs)

    def make_kv_cache(self, batch: int = 1, kv_sharing: str | None = None) -> KeyValueCache:
        """An empty key-value cache for ``past_kv_cache``, one entry an unrolled block.

        Args:
            batch: Number of texts.
            kv_sharing: ``None`` or ``"none"``.

        Raises:
            LoopedSemanticsError: Another ``kv_sharing``.
        """
        _check_sharing(kv_sharing)
        return KeyValueCache.init_cache(self.cfg, self.embed.W_E.device, batch)

    def _iteration_hooks(self, old: Iterable[nn.Module]) -> list[IterationHooks]:
        n_iterations = self.cfg.n_iterations
        hooks: list[Any] = list(old)[:n_iterations]
        return hooks + [IterationHooks(self.cfg, None) for _ in range(n_iterations - len(hooks))]


def _check_sharing(kv_sharing: str | None) -> None:
    if kv_sharing not in (None, "none"):
        raise LoopedSemanticsError(
            f"kv_sharing={kv_sharing!r} is an option of LoopedTransformer: the blocks of a looped "
            "HookedTransformer are TransformerLens's own, which know one cache entry a block"
        )
