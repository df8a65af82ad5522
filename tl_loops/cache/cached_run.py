"""What each part of a cached run contributes to the residual stream."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tl_loops.cache.carry import Carrier, Rows, pull_back
from tl_loops.cache.path import (
    FrozenNorm,
    Site,
    Step,
    Target,
    centred,
    path_steps,
    scale_of,
    working,
)
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.labels import part_labels
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model
from tl_loops.upstream import Slice

_NAMES = {
    "embed": "hook_embed",
    "pos_embed": "hook_pos_embed",
    "initial_state": "hook_initial_state",
    "injection": "hook_injection",
}


@dataclass(frozen=True)
class CachedRun:
    """The residual stream of one run, at some of its positions.

    Every map of the stream acts on each position by itself, so slicing comes first.

    Attributes:
        activations: Activations by canonical hook name.
        model: The model that ran; only its weights and its config are read.
        layout: Layout of the run, which need not be the model's present one.
        pos: Positions to read.
    """

    activations: dict[str, Tensor]
    model: Model
    layout: LoopLayout
    pos: Slice
    _paths: dict[tuple, list[Step]] = field(default_factory=dict)

    @cached_property
    def blocks(self) -> dict[str, Any]:
        """Physical blocks by physical name."""
        return self.model.physical_blocks()

    @cached_property
    def readout(self) -> Any:
        """What follows the blocks of an iteration, in this run."""
        return self.model.cfg.readout.over(self.layout)

    def block(self, index: int) -> Any:
        """The weights of an unrolled block of this run."""
        return self.blocks[self.layout.physical_name(index)]

    def raw(self, name: str) -> Tensor:
        """A cached activation as it is.

        Raises:
            KeyError: The cache does not hold it.
        """
        if name not in self.activations:
            raise KeyError(
                f"this needs {name!r}, which the cache does not hold: run_with_cache over the "
                "whole model and without names_filter, or with one that keeps it"
            )
        return self.activations[name]

    def read(self, name: str, pos_dim: int = -2) -> Tensor:
        """A cached activation at the positions asked for, in float32 or better."""
        return working(self.pos.apply(self.raw(name), dim=pos_dim))

    def freeze(self, prefix: str, norm: Any) -> FrozenNorm:
        """A norm with the scale that it had in this run.

        Raises:
            LoopedSemanticsError: It is one of the norms of the readout, and an early exit made it
                read another state than the last.
        """
        frozen = FrozenNorm.of(norm, self.read(f"{prefix}.hook_scale"))
        if prefix == "ln_coda" and not self.readout.has_coda:
            self._check_read(frozen, self._last(), prefix)
        return frozen

    def _last(self) -> Tensor:
        """What leaves the last block, or without a coda the loop."""
        return self.read(self.readout.last_hook)

    # The stream itself.

    def residual(self, target: Target) -> Tensor:
        """The cached residual stream at a target, in float32 or better."""
        if target.state_out is not None:
            return self.read(f"iter.{target.state_out}.hook_state_out")
        if target.layer < self.layout.n_layers:
            name = "hook_resid_mid" if target.mlp_input else "hook_resid_pre"
            return self.read(f"blocks.{target.layer}.{name}")
        resid = self._last()
        if self.readout.before_coda and not self.readout.has_coda:
            norm = self.model.ln_final
            self.freeze("ln_coda", norm)
            # As the model computes it, rounding included.
            normalized = self.pos.apply(self.raw("ln_coda.hook_normalized"), dim=-2)
            normalized = normalized.to(self.model.cfg.dtype)
            normalized = normalized if norm.w is None else normalized * norm.w
            resid = working(normalized if norm.b is None else normalized + norm.b)
        return resid

    def reader(self, target: Target) -> FrozenNorm | None:
        """The norm through which the target is read; ``None``: it is read as it is.

        Raises:
            LoopedSemanticsError: Nothing reads the target directly, or the final norm read
                something else in this run.
        """
        cfg, model = self.model.cfg, self.model
        if cfg.normalization_type is None:
            return None
        if target.state_out is not None:
            self.readout.refuse_coda()
            if self.readout.state_is_normed:
                return None
            state = self.residual(target)
            norm = FrozenNorm.of(model.ln_final, self._scale(state))
            if not self.readout.before_coda:
                return norm
            if norm.centred:
                raise LoopedSemanticsError(
                    "two LayerNorms in a row read a state of this model, which is no single norm; "
                    "decompose without apply_ln"
                )
            assert norm.scale is not None
            twice = None if norm.gain is None else norm.gain**2
            return FrozenNorm(norm.scale * self._scale(norm(state)), twice, None, False)
        if target.layer == self.layout.n_layers:
            if self.readout.last_is_normed:
                return None
            norm = self.freeze("ln_final", model.ln_final)
            if not self.readout.state_is_normed and not self.readout.has_coda:
                self._check_read(norm, self.residual(target), "ln_final")
            return norm
        if cfg.block_norm in ("post_branch", "post_norm"):
            return None
        name = "ln2" if target.mlp_input else "ln1"
        block = self.block(target.layer)
        return FrozenNorm.of(getattr(block, name), self._input_scale(target, name))

    def _scale(self, x: Tensor) -> Tensor:
        norm = self.model.ln_final
        return scale_of(centred(x, norm), norm)

    def _check_read(self, norm: FrozenNorm, last: Tensor, name: str) -> None:
        """Raise on a norm that did not read the last state, of a model without a coda."""
        assert norm.scale is not None
        if not torch.allclose(norm.scale, self._scale(last), rtol=1e-3):
            raise LoopedSemanticsError(
                f"{name} did not read the last state in this run, which left the loop early (or "
                "was edited there); pass state_out=t for the iteration that it left"
            )

    def _input_scale(self, target: Target, name: str) -> Tensor:
        scale = self.raw(f"blocks.{target.layer}.{name}.hook_scale")
        resid = self.raw(f"blocks.{target.layer}.hook_resid_pre")
        # With split inputs every head has a scale of its own, equal unless a hook edited one.
        if scale.ndim > resid.ndim:
            first = scale[..., :1, :]
            one = torch.equal(first.expand_as(scale), scale)
            scale = first.squeeze(-2)
            if not one or scale.shape[:-1] != resid.shape[:-1]:
                raise LoopedSemanticsError(
                    f"the heads of block {target.layer} read different inputs in this run, so no "
                    "one norm reads the residual stream; decompose without apply_ln"
                )
        return working(self.pos.apply(scale, dim=-2))

    # The path.

    def _replaced(self) -> bool:
        """Whether the state before iteration 0 was something else than what the prelude gave."""
        cfg, layout = self.model.cfg, self.layout
        if cfg.initial_state != "embed":
            return True
        if cfg.injection is not None:
            e = self.raw("hook_injection")
        elif layout.n_prelude:
            e = self.raw(f"blocks.{layout.n_prelude - 1}.hook_resid_post")
        else:
            e = self.raw("hook_embed")
            if cfg.positional_embedding_type == "standard":
                e = e + self.raw("hook_pos_embed")
        return not torch.equal(self.raw("hook_initial_state"), e)

    def steps(self, target: Target, from_iteration: int | None = None) -> list[Step]:
        """What happened to the stream from the embedding to a target."""
        known = self._paths.get((target, from_iteration))
        if known is not None:
            return known
        in_loop = target.state_out is not None or target.layer >= self.layout.core_start
        replaced = in_loop and from_iteration is None and self._replaced()
        device = next(iter(self.activations.values())).device
        path = path_steps(
            self.model,
            self.layout,
            target,
            self.freeze,
            replaced,
            from_iteration,
            device,
            lambda: self.pos.apply(self.raw("hook_injection"), dim=-2),
        )
        return self._paths.setdefault((target, from_iteration), list(path))

    def carry(
        self,
        target: Target,
        rows: Callable[[Site], Rows | None],
        injection: str = "parts",
        from_iteration: int | None = None,
    ) -> tuple[Tensor, list[str]]:
        """Components where they arrive at the target, ``[component, ..., d_model]``, and labels."""
        carrier = Carrier(rows, injection)
        has_injection = self.model.cfg.injection is not None
        carrier.run(self.steps(target, from_iteration), has_injection)
        stack = carrier.stack
        return self.residual(target)[None][:0] if stack is None else stack, carrier.labels

    def pull_back(
        self,
        target: Target,
        directions: Tensor,
        rows: Callable[[Site, Tensor], Rows | None],
        from_iteration: int | None = None,
    ) -> tuple[Tensor, list[str]]:
        """Products of components and directions ``[output, ..., d_model]`` at the target.

        Returns:
            ``[component, ..., output]``, and labels.
        """
        found = list(pull_back(self.steps(target, from_iteration), directions, rows))[::-1]
        if not found:
            return directions[..., 0].movedim(0, -1)[None][:0], []
        return torch.cat([f.values for f in found]), [name for f in found for name in f.labels]

    # What a site contributes.

    def component(self, site: Site) -> Rows:
        """The whole of what a site writes."""
        if site.kind == "norm_bias":
            assert site.norm is not None and site.norm.bias is not None
            assert site.norm.scale is not None
            bias = site.norm.bias.expand(*site.norm.scale.shape[:-1], -1)
            return Rows(bias[None], [site.label])
        if site.kind == "injection_bias":
            stream = self.read(f"iter.{site.iteration}.hook_injected")
            bias = working(self.model.injection.b).to(stream)
            return Rows(bias.expand_as(stream)[None], [site.label])
        if site.iteration is not None and site.kind not in _NAMES:
            name = f"iter.{site.iteration}.hook_{site.kind}"
        elif site.block is not None:
            name = f"blocks.{site.block}.hook_{site.kind}_out"
        else:
            name = _NAMES[site.kind]
        return Rows(self.read(name)[None], [site.label])

    def _branch_norm(self, site: Site) -> FrozenNorm | None:
        """The norm between a branch and the add, where there is one, with the share it adds."""
        cfg = self.model.cfg
        if not cfg.norms_outputs:
            return None
        assert site.block is not None
        block, name = self.block(site.block), cfg.branch_norms[site.kind == "mlp"]
        frozen = self.freeze(f"blocks.{site.block}.{name}", getattr(block, name))
        for mechanism in getattr(cfg, "mechanisms", ()):
            share = mechanism.added(block, site.kind)
            if share is not None:
                assert frozen.scale is not None
                share = working(share).to(frozen.scale)
                gain = share if frozen.gain is None else frozen.gain * share
                frozen = replace(frozen, gain=gain)
        return frozen

    def _unmodulated(self) -> None:
        """Raise on to take apart branches whose output is gated."""
        if getattr(self.model.cfg, "time_conditioning", False):
            raise LoopedSemanticsError(
                "what a branch of this model writes is gated by the iteration, so no head, neuron "
                "or bias adds to the stream what its weights write: decompose by layers "
                "(decompose_resid) instead"
            )

    def heads(self, site: Site) -> Rows | None:
        """What every head adds to the stream."""
        if site.kind != "attn":
            return None
        self._unmodulated()
        assert site.block is not None
        prefix = f"blocks.{site.block}.attn"
        if f"{prefix}.hook_result" in self.activations:
            values = self.read(f"{prefix}.hook_result", pos_dim=-3).movedim(-2, 0)
        else:
            z = self.read(f"{prefix}.hook_z", pos_dim=-3)
            W_O = working(self.block(site.block).attn.W_O).to(z)
            values = torch.einsum("...he,hed->h...d", z, W_O)
        norm = self._branch_norm(site)
        labels = part_labels(self.layout, site.block, "H", range(values.shape[0]))
        return Rows(values if norm is None else norm(values), labels)

    def _neurons(self, site: Site, neurons: Slice) -> tuple[Tensor, Tensor, list[str]]:
        assert site.block is not None
        self._unmodulated()
        if not hasattr(self.block(site.block).mlp, "W_out"):
            raise LoopedSemanticsError(
                f"the MLP of block {site.block} is a mixture of experts, which has no one set of "
                "neurons; decompose by layers or heads instead"
            )
        W_out = working(self.block(site.block).mlp.W_out)
        kept = torch.as_tensor(neurons.indices(W_out.shape[0])) % W_out.shape[0]
        acts = self.read(f"blocks.{site.block}.mlp.hook_post")
        labels = part_labels(self.layout, site.block, "N", kept.tolist())
        return acts[..., kept], W_out[kept].to(acts), labels

    def neurons(self, site: Site, neurons: Slice) -> Rows | None:
        """What every neuron adds to the stream."""
        if site.kind != "mlp":
            return None
        acts, W_out, labels = self._neurons(site, neurons)
        values = torch.einsum("...n,nd->n...d", acts, W_out)
        norm = self._branch_norm(site)
        return Rows(values if norm is None else norm(values), labels)

    def pulled_neurons(self, site: Site, g: Tensor, neurons: Slice) -> Rows | None:
        """:meth:`neurons` times directions ``[output, ..., d_model]``."""
        if site.kind != "mlp":
            return None
        acts, W_out, labels = self._neurons(site, neurons)
        norm = self._branch_norm(site)
        products = (g if norm is None else norm.adjoint(g)) @ W_out.T * acts
        return Rows(products.movedim(-1, 0).movedim(1, -1), labels)

    def bias(self, site: Site, of_mlps: bool) -> Rows | None:
        """The part of what a site writes that no head or neuron accounts for."""
        if site.kind == "norm_bias":
            return self.component(site)
        cfg = self.model.cfg
        if site.block is None:
            return None
        if site.kind == "attn" and cfg.attn_bias:
            bias = self.block(site.block).attn.b_O
        elif site.kind == "mlp" and cfg.mlp_bias and of_mlps:
            bias = self.block(site.block).mlp.b_out
        else:
            return None
        stream = self.read(f"blocks.{site.block}.hook_{site.kind}_out")
        values = working(bias).to(stream).expand_as(stream)[None]
        norm = self._branch_norm(site)
        return Rows(values if norm is None else norm(values), [site.label])
