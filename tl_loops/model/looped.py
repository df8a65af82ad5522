"""The looped transformer: unrolled blocks over weights that exist once."""

import copy
from collections.abc import Iterable
from inspect import signature
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import ConfigError, LoopedSemanticsError
from tl_loops.loading import open as loading
from tl_loops.loading.arguments import check_arguments
from tl_loops.loading.hub import push_to_hub
from tl_loops.loading.stated_loop import StatedLoop
from tl_loops.loading.tokenizer import load_tokenizer
from tl_loops.mechanisms.norm import Norm
from tl_loops.model import generation, readout, state_dicts
from tl_loops.model.checks import block_index, check_return_type, given, key_value_sharing
from tl_loops.model.exits import ExitMode
from tl_loops.model.hooks import CoordinateHooks
from tl_loops.model.iterations import at_iterations
from tl_loops.model.start import start_run
from tl_loops.model.state_dicts import without_unsupported
from tl_loops.model.weights import PhysicalWeights, Weights, owners
from tl_loops.nn.embedding import Embed, PosEmbed, Unembed
from tl_loops.nn.initialise import initialise
from tl_loops.nn.loop.hooks import IterationHooks
from tl_loops.nn.rotary import RotaryTable, rotary_tables
from tl_loops.nn.unrolling import iteration_hooks, physical_blocks, tied_copy, unroll
from tl_loops.upstream import (
    USE_DEFAULT_VALUE,
    HookPoint,
    KeyValueCache,
    LocallyOverridenDefaults,
    TextMethods,
    init_root,
    set_tokenizer,
)


@without_unsupported
class LoopedTransformer(CoordinateHooks, PhysicalWeights):
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
    blocks: Any
    ln_final: Norm
    ln_coda: Norm
    coda_in: nn.Module
    _rotary: RotaryTable | None
    _further_rotary: dict[float, RotaryTable]

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

        self.blocks = nn.ModuleList(unroll(cfg.layout, physical))
        self.iter = nn.ModuleList(iteration_hooks(cfg, self.ln_final))
        if cfg.norm_before_coda:
            self.ln_coda = tied_copy(self.ln_final)
        for name, tables in zip(("_rotary", "_further_rotary"), rotary_tables(cfg), strict=True):
            object.__setattr__(self, name, tables)
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

    def iteration_hooks(
        self, cfg: LoopedTransformerConfig, old: Iterable[nn.Module]
    ) -> list[IterationHooks]:
        """Hook points for the iterations of ``cfg``; those of ``old`` are kept where they fit."""
        new = iteration_hooks(cfg, self.ln_final)
        # Only the hook points move over: an iteration that was the last has no norm of its own
        # where the final norm ends it, and gets one when others follow.
        for hooks, previous in zip(new, old, strict=False):
            for name, child in previous.named_children():
                if hasattr(hooks, name):
                    setattr(hooks, name, child)
        return new

    # Running.

    def forward(
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
        n_iterations: SupportsIndex | None = None,
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
            start_at_layer: Start before this block, with its ``resid_pre`` (after the injection)
                as input. 0 means: after the embedding.
            tokens: Tokens for the loss, and for value embeddings where the model has them, when the
                input is not tokens.
            shortformer_pos_embed: Accepted for TransformerLens's generation loop; must be ``None``.
            attention_mask: 1 for tokens, 0 for padding, over cached and new tokens.
            stop_at_layer: Return what enters this block; with the unrolled depth, what leaves the
                last one. ``model(model(x, stop_at_layer=i), start_at_layer=i, ...)`` is
                ``model(x)``.
            past_kv_cache: One entry per unrolled block.
            n_iterations: Number of iterations for this call.
            initial_state: [batch, pos, d_model], the state before iteration 0; ``None``: the
                architecture's rule.
            injection: [batch, pos, d_model], the prelude output e (``cache["hook_injection"]``),
                needed when a start skips the prelude and later iterations inject it.
            start_at_iteration: Start before this iteration, with its ``hook_state_in`` as input.
            exit_at: Logits of the state after this iteration (models without a coda); default
                ``cfg.exit_step``.
            exit_threshold: Per position, logits of the first iteration whose cumulative exit
                probability reaches this; default ``cfg.exit_threshold``.
            weighted_exit: Logits of all iterations weighted by their exit probabilities.
            other_state: [batch, pos, d_model], with two stacks and a start inside the loop: the
                state of the stack that the first iteration does not call
                (``cache["iter.{t}.hook_other_in"]``).
            prefix_mask: 1 where new tokens see each other in both directions, else 0 (models with
                ``cfg.prefix_mask``). Not after a filled key-value cache: a prefix is one call.
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
        model = at_iterations(self, n_iterations)
        check_return_type(return_type)
        loss_per_token = given("loss_per_token", loss_per_token, bool)
        given("shortformer_pos_embed", shortformer_pos_embed, None)
        weighted_exit = given("weighted_exit", weighted_exit, bool)
        mode = ExitMode(exit_at, exit_threshold, weighted_exit).or_of(model.cfg)
        sharing = key_value_sharing(model, kv_sharing, past_kv_cache)
        with LocallyOverridenDefaults(model, prepend_bos=prepend_bos, padding_side=padding_side):
            where = (start_at_layer, start_at_iteration, past_kv_cache, prefix_mask)
            start = start_run(model, input, tokens, attention_mask, *where)
        if (stop := stop_at_layer) is not None:
            stop = block_index(model.cfg.n_layers, stop, "stop_at_layer")
        mode.check(model.cfg, start.first_iteration())
        start.carry(sharing, stop, initial_state, injection, other_state)
        start.run.keep_states = mode.early and stop is None
        trajectory = start.go(stop)
        if stop is not None:
            return trajectory.resid
        logits = readout.logits_of(model, mode, trajectory, return_type is not None)
        return readout.output(model, return_type, logits, start.tokens, start.mask, loss_per_token)

    # Tokenizers are taken as they are, where TransformerLens makes special tokens up.
    set_tokenizer: Any = set_tokenizer
    to_tokens: Any = TextMethods.to_tokens

    generate: Any = generation.generate
    generate_stream: Any = generation.generate_stream
    enter_coda: Any = readout.enter_coda
    state_logits: Any = readout.state_logits
    make_kv_cache: Any = generation.make_kv_cache
    input_to_embed: Any = state_dicts.input_to_embed
    get_residual: Any = state_dicts.get_residual
    load_and_process_state_dict: Any = state_dicts.load_and_process_state_dict

    # Loading and saving.

    @classmethod
    def from_pretrained(
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
        n_iterations: SupportsIndex | None = None,
        loop: StatedLoop | None = None,
        state_seed: int | None = 0,
        allow_non_finite: bool = False,
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
            refactor_factored_attn_matrices: Not supported.
            checkpoint_index: Not supported: looped checkpoints have no training snapshots.
            checkpoint_value: Not supported, likewise.
            hf_model: Not supported: weights are read from files.
            device: Where the model goes; ``None``: CUDA if there is one, else the CPU.
            n_devices: Not supported above 1: tied blocks share one device.
            tokenizer: Used instead of the checkpoint's.
            move_to_device: Whether to move the model to the device.
            fold_value_biases: Move ``b_V`` into ``b_O`` where there are biases.
            default_prepend_bos: Overrides the family's rule.
            default_padding_side: ``"left"`` or ``"right"``.
            dtype: Of the weights in memory.
            first_n_layers: Not supported: use ``n_iterations``.
            n_ctx: Overrides the context length.
            n_iterations: Passes through the core; ``None``: what the checkpoint says.
            loop: For feedforward checkpoints: ``(start, stop, n_iterations)``, or a mapping of
                config fields; ``None``: one iteration of all layers.
            state_seed: Seed of a random initial state; ``None``: a fresh draw at each call.
            allow_non_finite: Whether to load weights that are NaN or infinite, or become infinite
                in ``dtype``.
            **hub_kwargs: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

        Raises:
            UnknownModelError: The name is not known; near matches are suggested.
            CheckpointError: The checkpoint cannot be loaded exactly.
            LoopedSemanticsError: An argument above that is not supported.
            TypeError: An argument that there is not; the message says what to pass instead.
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
        check_arguments(hub_kwargs, tuple(signature(cls.from_pretrained).parameters)[:-1])
        source = loading.resolve(model_name, read_as=loading.stated_family(loop), **hub_kwargs)
        overrides = {"n_ctx": n_ctx, "default_prepend_bos": default_prepend_bos}
        cfg = loading.load_config(
            source,
            n_iterations=n_iterations,
            dtype=dtype,
            device=device,
            loop=loop,
            state_seed=state_seed,
            **{name: value for name, value in overrides.items() if value is not None},
        )
        weights = loading.open_tensors(source, cfg, allow_non_finite)
        if tokenizer is None:
            tokenizer = load_tokenizer(source, cfg)
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
        return model.eval()

    @classmethod
    def from_pretrained_no_processing(
        cls, model_name: str | Path, **kwargs: Any
    ) -> "LoopedTransformer":
        """:meth:`from_pretrained` without folding and centring: the weights as they are stored."""
        off = dict.fromkeys(
            ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False
        )
        return cls.from_pretrained(model_name, **{**kwargs, **off})

    push_to_hub: Any = push_to_hub

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config, weights (safetensors), tokenizer and card; loads with from_pretrained.

        Args:
            directory: Made where missing. A kill at any moment leaves the old checkpoint there or
                the new one; files of others stay.

        Raises:
            CheckpointError: It holds a checkpoint of another format.
            FileInUseError: Another process or thread saves there.
            OSError: The disk is full or may not be written.
        """
        loading.save_checkpoint(
            Path(directory), self.cfg, self.physical_state_dict(), self.tokenizer
        )
