"""Weights that exist once: physical names, stacks over physical layers, moving, folding."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.layout import LoopLayout
from tl_loops.mechanisms import MECHANISMS
from tl_loops.model import circuits, state_dicts
from tl_loops.model.ties import check_ties, tie
from tl_loops.upstream import TransformerBase

Weights = Iterable[tuple[str, Tensor]]


def owners(cfg: LoopedTransformerConfig) -> list[str]:
    """The model's modules beside the blocks that may own weights, in the order of the data flow."""
    inside = [name for m in MECHANISMS if not m.reads_out for name in m.owners]
    outside = [name for m in MECHANISMS if m.reads_out for name in m.owners]
    return ["embed", "pos_embed", *inside, "ln_final", "unembed", *outside]


class PhysicalWeights(TransformerBase):
    """Access to the weights of a looped model, each of which exists once.

    Physical names do not depend on the number of iterations: ``embed.W_E``,
    ``prelude.{l}.attn.W_Q``, ``core.{l}.mlp.W_in``, ``coda.{l}.ln1.w``, ``injection.W``,
    ``ln_final.w``, ``unembed.W_U``.
    """

    cfg: LoopedTransformerConfig
    layout: LoopLayout
    ln_final: Any
    unembed: Any

    def physical_blocks(self) -> dict[str, Any]:
        """The first unrolled block of every physical layer, by physical name."""
        blocks: dict[str, Any] = {}
        for index, block in enumerate(self.blocks):
            blocks.setdefault(self.layout.physical_name(index), block)
        return blocks

    def physical_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that own weights, by physical name, in the order of the data flow."""
        blocks = iter(self.physical_blocks().items())
        for name in owners(self.cfg):
            if name == "ln_final":
                yield from blocks
            if hasattr(self, name):
                yield name, getattr(self, name)

    def physical_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trained parameter once, under its physical name."""
        for prefix, module in self.physical_modules():
            for name, parameter in module.named_parameters():
                yield f"{prefix}.{name}", parameter

    def physical_state_dict(self) -> dict[str, Tensor]:
        """Every weight once, detached but not copied; what ``save_pretrained`` saves.

        Raises:
            LoopedSemanticsError: Iterations no longer share their weights.
        """
        check_ties(self)
        return {name: parameter.detach() for name, parameter in self.physical_named_parameters()}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in torch, for weights that iterations share.

        With ``assign=True`` the blocks share the new tensors. Nothing is loaded if the state dict
        does not fit.

        Raises:
            RuntimeError: Names are missing or unexpected (with ``strict``), shapes differ, or
                entries of one shared weight do.
        """
        state_dicts.check_fits(self, state_dict, strict)
        result = nn.Module.load_state_dict(self, state_dict, strict=strict, assign=assign)
        tie(self)
        return result

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)
        tie(self)  # Where a conversion makes new Parameters, it does so block by block.
        return result

    def load_physical_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Copy weights in place, so that every iteration sees them.

        Raises:
            ValueError: Names are missing or unexpected, or shapes differ; nothing is then copied.
        """
        own = dict(self.physical_named_parameters())
        problems = [f"missing: {name}" for name in own if name not in state_dict]
        for name, tensor in state_dict.items():
            if name not in own:
                problems.append(f"unexpected: {name}")
            elif tensor.shape != own[name].shape:
                problems.append(
                    f"{name}: expected {tuple(own[name].shape)}, found {tuple(tensor.shape)}"
                )
        if problems:
            raise ValueError("physical state dict does not fit: " + "; ".join(problems))
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state_dict[name])

    def _assign(self, weights: Weights, modules: dict[str, nn.Module]) -> None:
        """Put streamed tensors into modules that were made without storage, one at a time."""
        waiting = {
            f"{prefix}.{name}": (module, name)
            for prefix, module in modules.items()
            for name, _ in module.named_parameters()
        }
        for name, tensor in weights:
            if name not in waiting:
                raise ValueError(f"unexpected weight {name}")
            module, path = waiting.pop(name)
            *parents, leaf = path.split(".")
            for parent in parents:
                module = getattr(module, parent)
            expected = module._parameters[leaf]
            assert expected is not None
            if tensor.shape != expected.shape:
                raise ValueError(
                    f"{name}: expected {tuple(expected.shape)}, found {tuple(tensor.shape)}"
                )
            # A Parameter that fits is taken as it is: models may share it.
            if not isinstance(tensor, nn.Parameter) or tensor.dtype != self.cfg.dtype:
                tensor = nn.Parameter(tensor.to(self.cfg.dtype))
            module._parameters[leaf] = tensor
        if waiting:
            raise ValueError(f"missing weights: {', '.join(waiting)}")
        for module in modules.values():
            for part in module.modules():
                for leaf, buffer in part._buffers.items():
                    if buffer is not None and buffer.is_meta:  # the zero biases
                        part._buffers[leaf] = torch.zeros(buffer.shape, dtype=buffer.dtype)

    # Moving. TransformerLens rebuilds the state dict once a key, which is quadratic in its length.

    def to(self, *args: Any, print_details: bool = False, **kwargs: Any) -> "PhysicalWeights":
        """Move or cast the model and keep ``cfg.device`` and ``cfg.dtype`` true.

        Takes what ``torch.nn.Module.to`` takes, and TransformerLens's ``print_details``.
        """
        if len(args) > 1 and isinstance(args[1], bool):  # TransformerLens's second argument
            args, print_details = (args[0], *args[2:]), args[1]
        parse: Any = vars(torch._C)["_nn"]._parse_to  # what nn.Module.to itself calls
        device, dtype, _, _ = parse(*args, **kwargs)
        nn.Module.to(self, *args, **kwargs)
        if device is not None:
            self.cfg.device = str(device)
        if dtype is not None:
            self.cfg.dtype = dtype
        if print_details:
            print(f"Moved model to {device or dtype}")
        return self

    def make_contiguous(self) -> "PhysicalWeights":
        """Store every weight row by row, as code that calls ``parameter.view(-1)`` needs it.

        That is ``torch.optim.LBFGS`` and ``torch.nn.utils.parameters_to_vector``, for example.
        Weights are otherwise views of their files' layout, so that loading copies none and forward
        passes take them as they are; afterwards each pass lays some of them out for itself.
        One weight is copied at a time. Parameters stay the objects that they are: ties hold, and
        optimisers keep them.
        """
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.data = parameter.data.contiguous()
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.contiguous()
        return self

    def half(self) -> "PhysicalWeights":
        """Cast to float16."""
        return self.to(torch.float16)

    def float(self) -> "PhysicalWeights":
        """Cast to float32."""
        return self.to(torch.float32)

    def double(self) -> "PhysicalWeights":
        """Cast to float64."""
        return self.to(torch.float64)

    def bfloat16(self) -> "PhysicalWeights":
        """Cast to bfloat16."""
        return self.to(torch.bfloat16)

    def move_model_modules_to_device(self) -> None:
        """Move everything to ``cfg.device``; tied weights stay on one device."""
        nn.Module.to(self, self.cfg.device)

    # Analyses of the weights alone.

    all_head_labels: Any = circuits.all_head_labels
    tl_parameters: Any = circuits.tl_parameters
    accumulated_bias: Any = circuits.accumulated_bias
    all_composition_scores: Any = circuits.all_composition_scores

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "*tokens d_model"]:
        """The direction whose product with the final norm's output is a token's logit.

        It is the token's column of ``W_U``, times its scale where the model scales logits
        (``unembed.token_scale``).

        Args:
            tokens: Text of one token, an id, or ids of any shape (a single one loses its axes).
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        directions = super().tokens_to_residual_directions(tokens)
        scale = self.unembed.token_scale
        if scale is None:
            return directions
        scale = scale[tokens].view(*directions.shape[:-1], 1)
        return (directions.to(scale.dtype) * scale).to(directions.dtype)

    # Stacks over physical layers.

    def _stack(self, path: str) -> Tensor:
        part, name = path.split(".")
        return torch.stack(
            [getattr(getattr(block, part), name) for block in self.physical_blocks().values()]
        )

    @property
    def W_Q(self) -> Float[Tensor, "n_physical n_heads d_model d_head"]:
        """Query weights of all physical layers."""
        return self._stack("attn.W_Q")

    @property
    def W_K(self) -> Float[Tensor, "n_physical n_heads d_model d_head"]:
        """Key weights of all physical layers."""
        return self._stack("attn.W_K")

    @property
    def W_V(self) -> Float[Tensor, "n_physical n_heads d_model d_head"]:
        """Value weights of all physical layers."""
        return self._stack("attn.W_V")

    @property
    def W_O(self) -> Float[Tensor, "n_physical n_heads d_head d_model"]:
        """Attention output weights of all physical layers."""
        return self._stack("attn.W_O")

    @property
    def b_Q(self) -> Float[Tensor, "n_physical n_heads d_head"]:
        """Query biases of all physical layers; zeros where there are none."""
        return self._stack("attn.b_Q")

    @property
    def b_K(self) -> Float[Tensor, "n_physical n_heads d_head"]:
        """Key biases of all physical layers; zeros where there are none."""
        return self._stack("attn.b_K")

    @property
    def b_V(self) -> Float[Tensor, "n_physical n_heads d_head"]:
        """Value biases of all physical layers; zeros where there are none."""
        return self._stack("attn.b_V")

    @property
    def b_O(self) -> Float[Tensor, "n_physical d_model"]:
        """Attention output biases of all physical layers; zeros where there are none."""
        return self._stack("attn.b_O")

    @property
    def W_in(self) -> Float[Tensor, "n_physical d_model d_mlp"]:
        """MLP input weights of all physical layers."""
        return self._stack("mlp.W_in")

    @property
    def W_gate(self) -> Float[Tensor, "n_physical d_model d_mlp"] | None:
        """MLP gate weights of all physical layers; ``None`` without a gate."""
        return self._stack("mlp.W_gate") if self.cfg.gated_mlp else None

    @property
    def W_out(self) -> Float[Tensor, "n_physical d_mlp d_model"]:
        """MLP output weights of all physical layers."""
        return self._stack("mlp.W_out")

    @property
    def b_in(self) -> Float[Tensor, "n_physical d_mlp"]:
        """MLP input biases of all physical layers; zeros where there are none."""
        return self._stack("mlp.b_in")

    @property
    def b_out(self) -> Float[Tensor, "n_physical d_model"]:
        """MLP output biases of all physical layers; zeros where there are none."""
        return self._stack("mlp.b_out")

    # Folding and centring, in place on the physical weights.

    def process_weights_(
        self,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
        fold_value_biases: bool = True,
    ) -> None:
        """Fold and centre where the logits stay what they are; one warning names the rest.

        ``fold_ln`` multiplies the gains of ``ln1`` and ``ln2`` into the weights that read them (the
        gains become 1), and that of ``ln_final`` into ``W_U`` where it is used once and the head is
        not tied. ``fold_value_biases`` moves ``b_V`` into ``b_O``, where no
        mechanism scales what the values add.

        Raises:
            LoopedSemanticsError: ``refactor_factored_attn_matrices=True`` with rotary positions
                (nor does TransformerLens do it).
        """
        if refactor_factored_attn_matrices:
            raise LoopedSemanticsError(
                "refactor_factored_attn_matrices is not exact with rotary positions or a query-key "
                "norm; read the circuits from model.QK and model.OV instead"
            )
        left: list[str] = []
        with torch.no_grad():
            if fold_ln:
                left += self._fold_norms()
            if fold_value_biases and (self.cfg.value_bias or self.cfg.attn_bias):
                left += self._fold_value_biases()
        if center_writing_weights:
            left.append("center_writing_weights (an RMS norm does not centre what it reads)")
        if center_unembed:
            left.append("center_unembed (it shifts all logits of a position by a constant)")
        if left:
            warnings.warn(
                f"{self.cfg.model_name}: not applied, since the numbers would change: "
                f"{'; '.join(left)}. Pass these flags as False, or use "
                "from_pretrained_no_processing, to load without this warning.",
                stacklevel=3,
            )

    def _fold_value_biases(self) -> list[str]:
        reasons = [mechanism.keeps_value_biases(self.cfg) for mechanism in self.cfg.mechanisms]
        if not self.cfg.attn_bias:
            reasons.append("attention has no b_O to take them")
        if any(reasons):
            return [f"fold_value_biases ({'; '.join(filter(None, reasons))})"]
        for block in self.physical_blocks().values():
            attn = block.attn
            attn.b_O += torch.einsum("he,hed->d", attn.b_V, attn.W_O)
            getattr(attn, f"{attn.kv_prefix}b_V").zero_()
        return []

    def _fold_norms(self) -> list[str]:
        cfg, left = self.cfg, []
        if not cfg.norm_has_weight:
            return left
        if cfg.normalization_type == "LN":
            return ["fold_ln (only RMS norms are folded)"]
        if cfg.block_norm == "stream":
            left.append("fold_ln for ln1 and ln2 (what they give is the residual stream)")
        elif cfg.block_norm not in ("post_branch", "post_norm"):
            for block in self.physical_blocks().values():
                kv = block.attn.kv_prefix
                attention_in = ("W_Q", f"{kv}W_K", f"{kv}W_V")
                mlp_in = ("W_in", "W_gate") if cfg.gated_mlp else ("W_in",)
                for norm, reader, names in (
                    (block.ln1, block.attn, attention_in),
                    (block.ln2, block.mlp, mlp_in),
                ):
                    if norm.w is None:
                        continue
                    for name in names:
                        getattr(reader, name).mul_(norm.w[:, None])
                    if reader is block.attn:
                        for mechanism in cfg.mechanisms:
                            mechanism.fold_attention_norm(block, norm.w)
                    norm.w.fill_(1.0)
        if cfg.block_norm != "pre":
            left.append("fold_ln for ln1_post and ln2_post (they write to the residual stream)")
        for mechanism in cfg.mechanisms:
            left += [
                f"fold_ln for {norm} (its output is the injection itself)"
                for norm in mechanism.norms(cfg)
            ]
        if cfg.tie_word_embeddings:
            left.append("fold_ln for ln_final (the unembedding is the embedding)")
        elif cfg.readout.final_norm_feeds_blocks:
            left.append("fold_ln for ln_final (its output also feeds further blocks)")
        elif cfg.final_norm:
            self.unembed.W_U.mul_(self.ln_final.w[:, None])
            self.ln_final.w.fill_(1.0)
        return left
