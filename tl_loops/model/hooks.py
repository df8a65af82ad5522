"""Hook names by coordinate, wherever TransformerLens takes a hook name."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from tl_loops.cache.cache import LoopedActivationCache
from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import did_you_mean
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.names import spec_of
from tl_loops.model.checks import block_index
from tl_loops.model.iterations import IterationsContext, at_iterations, set_iterations
from tl_loops.model.start import real_tokens
from tl_loops.upstream import (
    AnyHookPoint,
    Slice,
    TemporaryHooks,
    TransformerBase,
    as_slice,
    left_as_it_was,
)

HookName = str | Callable[[str], bool]
Hooks = list[tuple[HookName, Callable]]

_KEPT_IN: ContextVar[torch.dtype | None] = ContextVar("dtype of a cache", default=None)
"""What the present ``run_with_cache`` keeps activations in: TransformerLens makes the hooks."""


class HookNameError(KeyError, ValueError):
    """A hook name matches no hook point."""

    def __str__(self) -> str:
        return str(self.args[0])


class CoordinateHooks(TransformerBase):
    """Lets ``iter.3.0.attn.hook_pattern`` stand for ``blocks.14.attn.hook_pattern``.

    Covers ``hooks``, ``run_with_hooks``, ``add_hook``, ``names_filter`` and the cache. Predicates
    on names see canonical names.
    """

    cfg: LoopedTransformerConfig
    tokenizer: Any
    hook_dict: dict[str, AnyHookPoint]

    @property
    def layout(self) -> LoopLayout:
        """Coordinates and names of the unrolled blocks."""
        return self.cfg.layout

    def set_iterations(self, n_iterations: SupportsIndex) -> None:
        """Change the number of iterations in place; no weight is copied.

        Iterations that remain keep their hooks; those that go lose them.

        Raises:
            ConfigError: ``n_iterations`` is not an integer of at least 1.
            LoopedSemanticsError: The model has several loops.
        """
        set_iterations(self, n_iterations)

    def iterations(self, n_iterations: SupportsIndex) -> AbstractContextManager[Any]:
        """Run a block of code with another number of iterations; hooks are restored after it.

        Raises:
            ConfigError: ``n_iterations`` is not an integer of at least 1.
            LoopedSemanticsError: The model has several loops.
        """
        return IterationsContext(self, n_iterations)

    def hook_name(self, name: str) -> str:
        """The canonical name of a hook point.

        Args:
            name: A canonical name, or ``prelude.{l}.REST``, ``iter.{t}.{l}.REST``,
                ``coda.{l}.REST``.

        Raises:
            HookNameError: No hook point has that name; near matches are suggested.
        """
        try:
            canonical = self.layout.canonical_name(name)
        except IndexError as error:
            raise HookNameError(f"{error} (layout {self.cfg.notation})") from None
        if canonical in self.hook_dict:
            return canonical
        # An alias is matched against aliases, so that the suggestion speaks the user's language.
        known = list(self.hook_dict)
        if canonical != name:
            known = [self.layout.alias(other) for other in known]
        hint = did_you_mean(name, known, "see model.hook_dict", quoted=True)
        raise HookNameError(f"no hook point is called {name!r}: {hint}")

    def _canonical(self, name: HookName) -> HookName:
        return self.hook_name(name) if isinstance(name, str) else name

    def _canonical_hooks(self, hooks: Hooks) -> Hooks:
        translated = [(self._canonical(name), hook) for name, hook in hooks]
        for name, hook in translated:
            if isinstance(name, str):  # Raise for points that never fire with the present flags.
                self.check_hooks_to_add(self.hook_dict[name], name, hook)
        return translated

    def _canonical_filter(self, names_filter: Any) -> Any:
        if isinstance(names_filter, str):
            names_filter = [names_filter]
        if isinstance(names_filter, Sequence):
            names = [self.hook_name(name) for name in names_filter]
            for name in names:
                self.check_hooks_to_add(self.hook_dict[name], name, _no_hook)
            return names
        return names_filter

    def check_hooks_to_add(
        self,
        hook_point: AnyHookPoint,
        hook_point_name: str,
        hook: Callable,
        dir: str = "fwd",
        is_permanent: bool = False,
        prepend: bool = False,
    ) -> None:
        """Raise on hooks on points that do not fire with the present flags.

        Raises:
            HookNameError: The flag that the hook point needs is off; the message names the setter.
        """
        spec = spec_of(hook_point_name)
        if spec is None:
            return
        if spec.place == "block" and spec.first_iteration:
            block = int(hook_point_name.split(".")[1])
            if (self.layout.coordinate(block).iteration or 0) < spec.first_iteration:
                raise HookNameError(
                    f"{hook_point_name} fires from iteration {spec.first_iteration} on: "
                    "iteration 0 is the first pass"
                )
        if spec.flag is not None and not getattr(self.cfg, spec.flag):
            raise HookNameError(
                f"{hook_point_name} does not fire while cfg.{spec.flag} is False: "
                f"call model.set_{spec.flag}(True) first"
            )

    def add_hook(self, name: HookName, hook: Callable, *args: Any, **kwargs: Any) -> None:
        """Add a hook; as in TransformerLens, with aliases."""
        super().add_hook(self._canonical(name), hook, *args, **kwargs)

    def hooks(
        self,
        fwd_hooks: Hooks | None = None,
        bwd_hooks: Hooks | None = None,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> AbstractContextManager[Any]:
        """Add hooks for a block of code; as in TransformerLens, with aliases.

        Raises:
            HookNameError: A name matches no hook point (before any hook is added).
        """
        forward = self._canonical_hooks(fwd_hooks or [])
        backward = self._canonical_hooks(bwd_hooks or [])
        return TemporaryHooks(self, forward, backward, reset_hooks_end, clear_contexts)

    @left_as_it_was
    def run_with_hooks(
        self, *args: Any, n_iterations: SupportsIndex | None = None, **kwargs: Any
    ) -> Any:
        """Run with temporary hooks; names are those of the layout with ``n_iterations``."""
        parent: Any = super(CoordinateHooks, at_iterations(self, n_iterations))
        return parent.run_with_hooks(*args, **kwargs)

    def add_caching_hooks(self, *args: Any, **kwargs: Any) -> dict:
        """Add the hooks of :meth:`get_caching_hooks`; as in TransformerLens, with aliases."""
        cache, forward, backward = self.get_caching_hooks(*args, **kwargs)
        for direction, hooks in (("fwd", forward), ("bwd", backward)):
            for name, hook in hooks:
                self.add_hook(name, hook, direction)
        return cache

    def get_caching_hooks(
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict | None = None,
        pos_slice: Any = None,
    ) -> tuple:
        """Make hooks that cache; as in TransformerLens, with aliases.

        Hook points that do not fire with the present flags are left out. ``pos_slice`` cuts the
        position axis of each, whatever its other axes are. With ``remove_batch_dim`` the hooks
        raise a ValueError in a run of several prompts.
        """
        positions, dtype = as_slice("pos_slice", pos_slice, keep_axis=True), _KEPT_IN.get()
        cache, forward, backward = super().get_caching_hooks(
            self._canonical_filter(names_filter), incl_bwd, device, remove_batch_dim, cache
        )

        def of_firing(hooks: list[tuple[str, Callable]]) -> list[tuple[str, Callable]]:
            cut = [(n, _kept(n, h, positions, dtype)) for n, h in hooks if self._fires(n)]
            return [(n, _of_one_prompt(h)) for n, h in cut] if remove_batch_dim else cut

        return cache, of_firing(forward), of_firing(backward)

    def list_hooks(self, name_filter: Any = None, *args: Any, **kwargs: Any) -> dict[str, list]:
        """Attached hooks by canonical name; as in TransformerLens, with aliases.

        Raises:
            HookNameError: A name matches no hook point.
        """
        return super().list_hooks(self._canonical_names(name_filter), *args, **kwargs)

    def _canonical_names(self, name_filter: Any) -> Any:
        if isinstance(name_filter, str):
            return self.hook_name(name_filter)
        if name_filter is None or callable(name_filter):
            return name_filter
        return [self.hook_name(name) for name in name_filter]

    def _fires(self, name: str) -> bool:
        try:
            self.check_hooks_to_add(self.hook_dict[name], name, _no_hook)
        except HookNameError:
            return False
        return True

    @left_as_it_was
    def run_with_cache(
        self,
        *args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        n_iterations: SupportsIndex | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run and cache activations; as in TransformerLens, with aliases.

        A cache of chosen names holds their numbers and nothing else: parts (``pos_slice``) are
        copied out of what they are parts of.

        Args:
            *args: Of the forward pass.
            return_cache_object: Whether the cache is an object rather than a dictionary.
            remove_batch_dim: Whether to leave out the batch axis, which then must be 1.
            n_iterations: Number of iterations for this run.
            dtype: Floating point activations are kept in it; ``None``: as they are.
            **kwargs: TransformerLens's, such as ``names_filter``, ``device`` (where the cache is
                kept) and ``pos_slice``, and those of the forward pass.

        Returns:
            The model's output, and a :class:`tl_loops.cache.cache.LoopedActivationCache` (or, with
            ``return_cache_object=False``, a dictionary with canonical names).

        Raises:
            HookNameError: ``names_filter`` names no hook point.
            IndexError: ``pos_slice`` asks for a position that there is not.
            ValueError: ``remove_batch_dim`` with several prompts, a ``dtype`` that is not of
                floating point numbers, or a ``stop_at_layer`` that ends the run before a hook point
                that ``names_filter`` names.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be of floating point numbers, got {dtype}")
        if "pos_slice" in kwargs:
            kwargs["pos_slice"] = as_slice("pos_slice", kwargs["pos_slice"], keep_axis=True)
        model = at_iterations(self, n_iterations)
        if remove_batch_dim:
            _check_one_prompt("the input", _n_prompts(args[0] if args else kwargs.get("input")))
        parent: Any = super(CoordinateHooks, model)
        chosen = _KEPT_IN.set(dtype)
        try:
            output, cache = parent.run_with_cache(
                *args, return_cache_object=False, remove_batch_dim=remove_batch_dim, **kwargs
            )
        finally:
            _KEPT_IN.reset(chosen)
        model._check_reached(cache, kwargs.get("names_filter"), kwargs.get("stop_at_layer"))
        if return_cache_object:
            tokens, mask = (
                value[0] if value is not None and remove_batch_dim else value
                for value in self._tokens_of_run(args, kwargs)
            )
            cache = LoopedActivationCache(cache, model, not remove_batch_dim, mask, tokens)
            cache.model = self
        return output, cache

    def _check_reached(self, cache: dict, names_filter: Any, stop: int | None) -> None:
        """Raise where the run ended before a hook point that was asked for by its iteration.

        A tool that reads the first number of ``iter.3.1.REST`` as a layer stops there. Names of
        TransformerLens that are not reached are left out, as there.
        """
        if stop is None or callable(names_filter) or names_filter is None:
            return
        for name in [names_filter] if isinstance(names_filter, str) else names_filter:
            if not name.startswith("iter."):
                continue
            canonical = self.hook_name(name)
            kind, _, rest = canonical.partition(".")
            here = canonical if kind == "blocks" else "no hook point with a block number"
            end = block_index(self.cfg.n_layers, stop, "stop_at_layer")
            reached = kind == "blocks" and int(rest.split(".")[0]) < end
            if canonical not in cache and not reached:
                raise ValueError(
                    f"the run ends at stop_at_layer={stop}, before {name!r}. A tool that takes the "
                    f"first number of a hook name for a layer needs blocks.{{i}}: here {here!r}"
                )

    def _tokens_of_run(
        self, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Tokens of a run and which are real, as a cache of it keeps them; ``None``: all.

        Without tokens the run was given a residual stream.
        """
        # Of the class: tools such as nnsight put a function of theirs on the model.
        signature = inspect.signature(type(self).forward)
        names = [name for name in kwargs if name in signature.parameters]
        given = signature.bind(self, *args, **{name: kwargs[name] for name in names}).arguments
        starts = (given.get("start_at_layer"), given.get("start_at_iteration"))
        tokens, mask = real_tokens(
            self,
            given["input"],
            given.get("attention_mask"),
            given.get("prepend_bos"),
            given.get("padding_side"),
            from_tokens=starts == (None, None),
        )
        positions = as_slice("pos_slice", kwargs.get("pos_slice"))
        kept = (v if v is None else positions.apply(v, dim=1) for v in (tokens, mask))
        return next(kept), next(kept)


def _kept(name: str, save: Callable, positions: Slice, dtype: torch.dtype | None) -> Callable:
    """A caching hook that is shown what is kept, in memory of its own if it is only a part."""
    spec = spec_of(name)
    dim = 1 if spec is None else spec.pos_dim
    if positions.mode == "identity":
        dim = None
    if dim is None and dtype is None:
        return save

    def save_part(value: Any, hook: Any) -> None:
        part = value = value.detach()
        if dim is not None:
            part = positions.apply(value, dim=dim)
        if dtype is not None and part.is_floating_point():
            part = part.to(dtype)
        if dim is not None and part.untyped_storage().nbytes() > part.numel() * part.element_size():
            part = part.clone()  # a view would keep the whole activation
        save(part, hook)

    return save_part


def _of_one_prompt(save: Callable) -> Callable:
    """A caching hook that takes the one prompt of a run, and no run of several."""

    def save_one(value: Tensor, hook: Any) -> None:
        _check_one_prompt(hook.name, value.shape[0])
        save(value, hook=hook)

    return save_one


def _check_one_prompt(what: str, n_prompts: int) -> None:
    if n_prompts != 1:
        raise ValueError(
            f"remove_batch_dim keeps one prompt, but {what} holds {n_prompts}: leave it out, or "
            "run one prompt"
        )


def _n_prompts(input: Any) -> int:
    """Of text, texts, tokens or a residual stream, as far as can be seen."""
    if isinstance(input, Tensor):
        return input.shape[0] if input.ndim > 1 else 1
    return len(input) if isinstance(input, (list, tuple)) else 1


def _no_hook(tensor: Any, hook: Any) -> None:
    """A hook that does nothing."""
