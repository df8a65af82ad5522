"""A bridged model with a loop under the names of its iterations."""

import threading
from collections.abc import Sequence
from typing import Any, SupportsIndex

from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import LoopedSemanticsError
from tl_loops.families.base import Family
from tl_loops.model import readout
from tl_loops.model.bridged.family import BridgedFamily
from tl_loops.model.bridged.routing import routed
from tl_loops.model.bridged.taps import Tap
from tl_loops.model.bridged.weights import check_unprocessed, shared_weights
from tl_loops.model.checks import block_index, check_return_type
from tl_loops.model.hooks import HookNameError
from tl_loops.model.iterations import at_iterations
from tl_loops.model.looped import LoopedTransformer
from tl_loops.model.start import read_tokens
from tl_loops.upstream import (
    USE_DEFAULT_VALUE,
    AnyHookPoint,
    LocallyOverridenDefaults,
    left_as_it_was,
    shown_too_late,
)

_OWN_BLOCKS = "call model.looped(), a LoopedTransformer over the same weights in memory, which can"


_ENGINE = threading.RLock()
"""The Hugging Face model is one engine with settings of its own: one call at a time."""


class UnrolledBridge(LoopedTransformer):
    """A TransformerBridge of a looped model, with a hook point for every pass of every layer.

    The loop is the model's own (:func:`tl_loops.unroll`), or one over the layers of a feedforward
    model (:func:`tl_loops.loop`). The Hugging Face model behind the bridge is what runs; each
    firing of one of its hook points is routed to the hook point of its iteration. Names, aliases,
    cache and measurements are those of :class:`LoopedTransformer`. Weights are those of the Hugging
    Face model, seen without a copy; gradients gather at ``bridge.parameters()``.

    What the Hugging Face implementation never makes has no hook point: ``missing`` says which
    names and why. Hooks that were added to the bridge itself fire as before, at every iteration.

    Attributes:
        bridge: The bridge.
        missing: Hook names of LoopedTransformer that cannot be given, with the reason.
    """

    bridge: Any
    missing: dict[str, str]
    runs_own_blocks = False
    _family: Family
    _bridged: BridgedFamily
    _taps: list[Tap]
    _sources: dict[str, AnyHookPoint]

    def __init__(
        self, bridge: Any, family: Family, bridged: BridgedFamily, cfg: LoopedTransformerConfig
    ):
        # Around nn.Module, which would make the bridge a submodule with hook points of its own, and
        # which is not yet initialised.
        for name, value in (("bridge", bridge), ("_family", family), ("_bridged", bridged)):
            object.__setattr__(self, name, value)
        weights = shared_weights(bridge, family, bridged, cfg)
        super().__init__(cfg, move_to_device=False, weights=weights)
        self.tokenizer = bridge.tokenizer
        self.cfg.tokenizer_prepends_bos = getattr(bridge.cfg, "tokenizer_prepends_bos", None)
        self.cfg.default_prepend_bos = bool(bridge.cfg.default_prepend_bos)
        # They are views of the Hugging Face parameters, which are the ones to train.
        self.requires_grad_(False)
        self.train(bridge.training)

    def setup(self) -> None:
        """Name the hook points of the present iterations; those that never fire are left out."""
        super().setup()
        bridged = self._bridged
        self._sources = self.bridge.hook_dict
        taps: list[Tap] = []
        missing: dict[str, str] = {}
        given: set[str] = set()
        every = list(bridged.taps(self))
        late = shown_too_late(self.bridge, [tap.source for tap in every])
        for tap in every:
            if tap.source in late:
                reason = f"it fires {tap.source} only after its attention has used it"
                missing.update(dict.fromkeys(tap.names(), reason))
                continue
            try:
                self._source(tap.source)
                taps.append(tap)
                given.update(tap.names())
            except (KeyError, AttributeError):
                reason = f"this bridge has no {tap.source.removeprefix('@')}"
                missing.update(dict.fromkeys(tap.names(), reason))
        for name in self.hook_dict:
            if name not in given and name not in missing:
                reasons = (why for end, why in bridged.missing.items() if name.endswith(end))
                missing[name] = next(reasons, "nothing in the bridge fires with this tensor")
        unknown = given - set(self.hook_dict)
        assert not unknown, f"taps name hook points that do not exist: {sorted(unknown)}"
        self.missing = {name: why for name, why in missing.items() if name not in given}
        self.hook_dict = {n: point for n, point in self.hook_dict.items() if n in given}
        self._taps = taps

    def hook_name(self, name: str) -> str:
        """The canonical name of a hook point; see :meth:`LoopedTransformer.hook_name`.

        Raises:
            HookNameError: No hook point has that name, or the bridge cannot give it.
        """
        try:
            canonical = self.layout.canonical_name(name)
        except IndexError:
            canonical = name
        if canonical in self.missing:
            raise HookNameError(f"a bridge does not give {name!r}: {self.missing[canonical]}")
        return super().hook_name(name)

    def check_hooks_to_add(
        self, hook_point: AnyHookPoint, hook_point_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accept every hook point that there is: none depends on a flag."""

    def forward(
        self,
        input: str | list[str] | Int[Tensor, "*batch pos"],
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: str | None = USE_DEFAULT_VALUE,
        start_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        shortformer_pos_embed: None = None,
        attention_mask: Tensor | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: Any = None,
        *,
        n_iterations: SupportsIndex | None = None,
        initial_state: Float[Tensor, "..."] | None = None,
        prefix_mask: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Run the bridge.

        Args:
            input: Text or tokens.
            return_type: ``"logits"``, ``"loss"``, ``"both"`` or ``None``.
            loss_per_token: Whether the loss keeps its position axis.
            prepend_bos: Overrides ``cfg.default_prepend_bos`` for text.
            padding_side: Overrides the tokenizer's side for text.
            start_at_layer: Not supported.
            tokens: Not used: the input is tokens.
            shortformer_pos_embed: Not used.
            attention_mask: 1 for tokens, 0 for padding; raises where the model ignores it.
            stop_at_layer: Stop before this unrolled block and return what enters it.
            past_kv_cache: Not supported.
            n_iterations: Number of iterations for this call.
            initial_state: [batch, pos, d_model], the state before iteration 0, where the
                architecture draws one; ``None``: LoopedTransformer's draw.
            prefix_mask: [batch, pos], 1 where a prompt sees itself in both directions, for models
                that take one (HRM-Text).
            **others: LoopedTransformer's further arguments: they raise unless off.

        Returns:
            Logits [batch, pos, d_vocab], the loss, both, nothing, or with ``stop_at_layer`` the
            residual stream [batch, pos, d_model].

        Raises:
            LoopedSemanticsError: The Hugging Face model cannot do what an argument asks for.
            ValueError: An argument of the wrong shape or value.
        """
        check_return_type(return_type)
        if prefix_mask is not None and not self.cfg.prefix_mask:
            raise ValueError("prefix_mask is for models whose config has prefix_mask=True")
        asked = {"start_at_layer": start_at_layer, "past_kv_cache": past_kv_cache, **others}
        for name, value in asked.items():
            if value is not None and value is not False:
                raise LoopedSemanticsError(
                    f"{name} needs the blocks to run one by one, but the Hugging Face model behind "
                    f"the bridge runs as a whole: {_OWN_BLOCKS}"
                    + (
                        ", or pass use_past_kv_cache=False to generate"
                        if name == "past_kv_cache"
                        else ""
                    )
                )
        model = at_iterations(self, n_iterations)
        defaults = LocallyOverridenDefaults(
            model, prepend_bos=prepend_bos, padding_side=padding_side
        )
        with _ENGINE, defaults:
            tokens, padding, mask = read_tokens(model, input, attention_mask)
            arguments = model._arguments(model._bridged, tokens, mask, initial_state)
            if prefix_mask is not None:
                arguments["token_type_ids"] = prefix_mask.long()
            stop = stop_at_layer
            if stop is not None:
                stop = block_index(model.cfg.n_layers, stop, "stop_at_layer")
            result = model._run(tokens, arguments, stop)
            if stop is not None:
                return result
            return readout.output(model, return_type, result, tokens, padding, loss_per_token)

    def _arguments(
        self,
        bridged: BridgedFamily,
        tokens: Tensor,
        mask: Tensor | None,
        initial_state: Tensor | None,
    ) -> dict[str, Any]:
        """Arguments of the bridge's forward pass; raises for what the original ignores."""
        check_unprocessed(self.bridge)
        if mask is not None and bool((mask == 0).any()) and not bridged.masks:
            raise LoopedSemanticsError(
                "the Hugging Face model behind the bridge ignores the attention mask, so that it "
                "would read padding as text: run each prompt at its own length, or "
                f"{_OWN_BLOCKS}"
            )
        if initial_state is not None:
            if self.cfg.initial_state == "embed":
                raise LoopedSemanticsError(
                    "the Hugging Face model behind the bridge takes no initial state: edit "
                    "hook_initial_state instead"
                )
            expected = (*tokens.shape, self.cfg.d_model)
            if tuple(initial_state.shape) != expected:
                raise ValueError(
                    f"initial_state must be [batch, pos, d_model] = {expected}, got "
                    f"{tuple(initial_state.shape)}"
                )
        arguments = bridged.arguments(self, tokens, initial_state)
        if mask is not None and bridged.masks:
            arguments["attention_mask"] = mask
        return arguments

    @left_as_it_was
    def _run(self, tokens: Tensor, arguments: dict[str, Any], stop: int | None) -> Any:
        """The bridge's logits, or what enters the unrolled block that a run stops before."""
        with (
            self._bridged.iterations(self),
            routed(self._taps, self.hook_dict, self._source, self._stop_name(stop)) as run,
        ):
            logits = run.call(lambda: self.bridge(tokens, return_type="logits", **arguments))
        return logits if stop is None else run.stopped

    def counts_of_a_run(self) -> Sequence[tuple[Any, str]]:
        """What a run sets in the Hugging Face model for a time: objects and attributes."""
        return self._bridged.counts(self.bridge)

    def _source(self, name: str) -> AnyHookPoint | nn.Module:
        """The hook point of the bridge, or the module behind an ``@``, that a tap listens at."""
        if not name.startswith("@"):
            return self._sources[name]
        return self.bridge.original_model.get_submodule(name[1:].partition(":")[0])

    def _stop_name(self, stop: int | None) -> tuple[str, bool] | None:
        """The hook point that a run stops at, and whether before its hooks or after them."""
        if stop is None:
            return None
        if stop == 0:
            return "hook_embed", False
        if stop == self.cfg.n_layers:
            return f"blocks.{stop - 1}.hook_resid_post", False
        return f"blocks.{stop}.hook_resid_pre", True

    def looped(self) -> LoopedTransformer:
        """A LoopedTransformer over the same weights in memory, with blocks that run one by one."""
        model = LoopedTransformer(
            self.cfg,
            move_to_device=False,
            weights=shared_weights(self.bridge, self._family, self._bridged, self.cfg),
        )
        model.tokenizer = self.tokenizer
        return model.requires_grad_(False).train(self.training)

    # The bridge owns weights and mode.

    def train(self, mode: bool = True) -> "UnrolledBridge":
        """Set the mode of the bridge, too."""
        self.bridge.train(mode)
        return super().train(mode)

    def to(self, *args: Any, print_details: bool = False, **kwargs: Any) -> "UnrolledBridge":
        """Not supported: move the bridge, and unroll or loop it again.

        Raises:
            LoopedSemanticsError: Always.
        """
        raise LoopedSemanticsError(
            "the weights belong to the bridge: call bridge.to(...), and then "
            "tl_loops.unroll(bridge) or tl_loops.loop(bridge, ...) again"
        )

    def process_weights_(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: the weights belong to the bridge.

        Raises:
            LoopedSemanticsError: Always.
        """
        raise LoopedSemanticsError(
            "the weights belong to the bridge: process those of a model of its own, made by "
            "model.save_pretrained(directory) and LoopedTransformer.from_pretrained(directory)"
        )
