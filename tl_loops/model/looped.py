"""The looped transformer: unrolled blocks over weights that exist once."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import ConfigError, LoopedSemanticsError
from tl_loops.loading import open as loading
from tl_loops.loading.tokenizer import load_tokenizer
from tl_loops.model.circuits import Circuits
from tl_loops.model.generation import Generation
from tl_loops.model.iterations import Iterations
from tl_loops.model.state_dicts import InheritedMethods
from tl_loops.model.weights import PhysicalWeights, Weights, owners
from tl_loops.nn.embedding import Embed, PosEmbed, Unembed
from tl_loops.nn.initialise import initialise
from tl_loops.nn.loop.hooks import IterationHooks
from tl_loops.nn.norm import Norm
from tl_loops.nn.rotary import RotaryTable
from tl_loops.nn.unrolling import iteration_hooks, physical_blocks, tied_copy, unroll
from tl_loops.upstream import HookPoint, init_root, set_tokenizer


class LoopedTransformer(Iterations, Generation, InheritedMethods, Circuits, PhysicalWeights):
    """A looped transformer as a HookedTransformer whose every pass has hook points of its own.

    Block ``blocks.{i}`` is layer ``l`` at iteration ``t`` with ``i = n_prelude + t * n_core + l``;
    ``model.layout`` translates. Everything that takes a hook name also takes ``prelude.{l}.REST``,
    ``iter.{t}.{l}.REST`` and ``coda.{l}.REST``. Between iterations there are
    ``hook_initial_state``, ``hook_injection``, ``iter.{t}.hook_state_in``,
    ``iter.{t}.hook_injected``, ``iter.{t}.hook_state_out`` and ``iter.{t}.hook_exit_gate``. With
    two stacks these are of the stack that iteration t calls; ``iter.{t}.hook_other_in`` is what it
    reads of the other's state, and ``hook_slow_initial_state`` the slow stack's first state.

    Args:
        cfg: The architecture. The model keeps a copy.
        tokenizer: A Hugging Face tokenizer; ``None``: the model takes tokens only.
        move_to_device: Whether to move the model to ``cfg.device``.
        default_padding_side: ``"left"`` or ``"right"``.
        weights: Pairs of physical name and tensor, consumed one at a time, which become the
            model's weights without a copy; ``None``: random initialisation by ``cfg.seed``.

    Raises:
        ConfigError: ``cfg`` is not a LoopedTransformerConfig or does not hold together.
        ValueError: ``weights`` are missing, unexpected or of the wrong shape.
    """

    iter: nn.ModuleList
    ln_final: Norm

    def __init__(
        self,
        cfg: LoopedTransformerConfig | dict[str, Any],
        tokenizer: Any = None,
        move_to_device: bool = True,
        default_padding_side: str | None = None,
        *,
        weights: Weights | None = None,
    ):
        init_root(self)
        if isinstance(cfg, dict):
            cfg = LoopedTransformerConfig.from_dict(cfg)
        if not isinstance(cfg, LoopedTransformerConfig):
            raise ConfigError(
                f"LoopedTransformer needs a LoopedTransformerConfig, got {type(cfg).__name__}; "
                "to load a checkpoint call LoopedTransformer.from_pretrained"
            )
        self.cfg = cfg = copy.copy(cfg)
        self.dataset = self.tokenizer = None
        if tokenizer is not None:
            set_tokenizer(self, tokenizer, default_padding_side)
        if cfg.d_vocab < 1:
            raise ConfigError(f"d_vocab must be at least 1, got {cfg.d_vocab}")

        device = None if weights is None else "meta"
        self.embed = Embed(cfg, device)
        self.hook_embed = HookPoint()
        if cfg.positional_embedding_type == "standard":
            self.pos_embed = PosEmbed(cfg, device)
            self.hook_pos_embed = HookPoint()
        for mechanism in cfg.mechanisms:
            for point in mechanism.points_of(cfg, "run"):
                setattr(self, point.name, HookPoint())
            for name in mechanism.norms(cfg):
                setattr(self, name, Norm(cfg, device=device))
            for name, module in mechanism.modules(cfg, device).items():
                setattr(self, name, module)
        self.ln_final = Norm(cfg, device=device, off=not cfg.final_norm)
        self.unembed = Unembed(cfg, self.embed, device)
        physical = physical_blocks(cfg, device)
        if weights is not None:
            waiting: dict[str, nn.Module] = dict(physical)
            waiting |= {name: getattr(self, name) for name in owners(cfg) if hasattr(self, name)}
            self._assign(weights, waiting)

        self.blocks = nn.ModuleList(unroll(cfg.layout, physical))  # type: ignore[assignment]
        self.iter = nn.ModuleList(iteration_hooks(cfg, self.ln_final))
        if cfg.norm_before_coda:
            self.ln_coda = tied_copy(self.ln_final)
        object.__setattr__(
            self, "_rotary", RotaryTable(cfg) if cfg.positional_embedding_type == "rotary" else None
        )
        if weights is None and cfg.init_weights:
            self.init_weights()
        if move_to_device:
            self.move_model_modules_to_device()
        self.setup()

    def init_weights(self) -> None:
        """Draw all weights from N(0, cfg.initializer_range²) by ``cfg.seed``; gains become 1."""
        generator = None
        if self.cfg.seed is not None:
            generator = torch.Generator().manual_seed(self.cfg.seed)
        initialise(self.physical_named_parameters(), self.cfg.initializer_range, generator)

    # Iterations.

    def _iteration_hooks(self, old: Iterable[nn.Module]) -> list[IterationHooks]:
        """Hook points for the present iterations; those of ``old`` are kept where they fit."""
        new = iteration_hooks(self.cfg, self.ln_final)
        # Only the hook points move over: an iteration that was the last has no norm of its own
        # where the final norm ends it, and gets one when others follow.
        for hooks, previous in zip(new, old, strict=False):
            for name, child in previous.named_children():
                if hasattr(hooks, name):
                    setattr(hooks, name, child)
        return new

    # Loading and saving.

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model_name: str | Path,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
        checkpoint_index: int | None = None,
        checkpoint_value: int | None = None,
        hf_model: Any = None,
        device: str | torch.device | None = None,
        n_devices: int = 1,
        tokenizer: Any = None,
        move_to_device: bool = True,
        fold_value_biases: bool = True,
        default_prepend_bos: bool | None = None,
        default_padding_side: str | None = None,
        dtype: str | torch.dtype = torch.float32,
        first_n_layers: int | None = None,
        n_ctx: int | None = None,
        *,
        n_iterations: int | None = None,
        state_seed: int | None = 0,
        **hub_kwargs: Any,
    ) -> "LoopedTransformer":
        """Load a looped model by hub id, alias or checkpoint directory.

        Weights stream from the safetensors files into place; no remote code runs and no Hugging
        Face model is built. Folding and centring are done where they leave the logits as they are;
        one warning names the rest.

        Args:
            model_name: A name that ``tl-loops models`` lists, or a directory with ``config.json``
                and ``*.safetensors``.
            fold_ln: Fold the gains of pre-norms into the weights that read them.
            center_writing_weights: Never exact here, so never done.
            center_unembed: Never exact here (it moves the logits), so never done.
            refactor_factored_attn_matrices: Refused.
            checkpoint_index: Refused: looped checkpoints have no training snapshots.
            checkpoint_value: Refused, likewise.
            hf_model: Refused: weights are read from files.
            device: Where the model goes; ``None``: CUDA if there is one, else the CPU.
            n_devices: Refused above 1: tied blocks share one device.
            tokenizer: Used instead of the checkpoint's.
            move_to_device: Whether to move the model to the device.
            fold_value_biases: Move ``b_V`` into ``b_O`` where there are biases.
            default_prepend_bos: Overrides the family's rule.
            default_padding_side: ``"left"`` or ``"right"``.
            dtype: Of the weights in memory.
            first_n_layers: Refused: use ``n_iterations``.
            n_ctx: Overrides the context length.
            n_iterations: Passes through the core; ``None``: what the checkpoint says.
            state_seed: Seed of a random initial state; ``None``: a fresh draw at each call.
            **hub_kwargs: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

        Raises:
            UnknownModelError: The name is not known; near matches are suggested.
            CheckpointError: The checkpoint cannot be loaded exactly.
            LoopedSemanticsError: An argument above that is refused.
        """
        for name, value, default, instead in (
            ("checkpoint_index", checkpoint_index, None, "pass revision=... for a hub revision"),
            ("checkpoint_value", checkpoint_value, None, "pass revision=... for a hub revision"),
            ("hf_model", hf_model, None, "pass the directory of its checkpoint"),
            ("first_n_layers", first_n_layers, None, "pass n_iterations"),
            ("n_devices", n_devices, 1, "tied blocks share one device"),
        ):
            if value != default:
                raise LoopedSemanticsError(f"{name}={value!r} has no meaning here: {instead}")
        source = loading.resolve(model_name, **hub_kwargs)
        overrides = {"n_ctx": n_ctx, "default_prepend_bos": default_prepend_bos}
        cfg = loading.load_config(
            source,
            n_iterations=n_iterations,
            dtype=dtype,
            device=device,
            state_seed=state_seed,
            **{name: value for name, value in overrides.items() if value is not None},
        )
        weights = loading.open_tensors(source, cfg)
        if tokenizer is None:
            tokenizer = load_tokenizer(source)
        model = cls(
            cfg,
            tokenizer,
            move_to_device=move_to_device,
            default_padding_side=default_padding_side,
            weights=weights,
        )
        model.process_weights_(
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
            fold_value_biases=fold_value_biases,
        )
        return model

    @classmethod
    def from_pretrained_no_processing(  # type: ignore[override]
        cls, model_name: str | Path, **kwargs: Any
    ) -> "LoopedTransformer":
        """:meth:`from_pretrained` without folding and centring: the weights as they are stored."""
        off = dict.fromkeys(
            ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False
        )
        return cls.from_pretrained(model_name, **{**kwargs, **off})

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config, physical weights (safetensors) and tokenizer; loads with from_pretrained.

        Args:
            directory: Made where missing. A failure leaves no half-written file.
        """
        loading.save_checkpoint(
            Path(directory), self.cfg, self.physical_state_dict(), self.tokenizer
        )
