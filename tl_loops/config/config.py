"""The architecture of a looped transformer as data."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from tl_loops.config.checks import check_cycles, check_values
from tl_loops.config.describe import data_flow
from tl_loops.config.mechanisms import check_iterations, has_iteration_weights
from tl_loops.config.weights import physical_tensors
from tl_loops.errors import ConfigError, did_you_mean
from tl_loops.layout.layout import LoopLayout
from tl_loops.upstream import BaseConfig


@dataclass(repr=False)
class LoopedTransformerConfig(BaseConfig):
    """A ``HookedTransformerConfig`` with the fields that describe the loop.

    All fields of the TransformerLens config keep their meaning; ``n_layers`` (the unrolled depth)
    follows from the sizes and need not be given. Defaults describe a Llama-style block (RMSNorm,
    rotary positions, gated SiLU MLP).

    Attributes:
        n_prelude: Blocks before the loop.
        n_core: Blocks in one iteration of the loop.
        n_coda: Blocks after the loop.
        n_iterations: Passes through the core.
        block_norm: Where a block normalises. ``"pre"``: the branch inputs (Llama).
            ``"sandwich"``: pre-norm, plus a norm on each branch's output before the add (Ouro).
            ``"post_residual"``: pre-norm, plus a norm on the sum after each add (Huginn).
            ``"post_branch"``: only the branch outputs (OLMo-2). ``"post_norm"``: only the sum
            after each add (the original and the Universal Transformer).
        initial_state: The state before iteration 0. ``"embed"``: what the prelude, or else the
            embedding, gives. ``"normal"``: normal with ``initial_state_std``, truncated at three
            standard deviations. ``"zeros"``. ``"learned"``: one trained vector.
        initial_state_std: Standard deviation (before truncation) of ``"normal"``.
        state_seed: Seed of the ``"normal"`` draw, which is a function of the seed and the absolute
            position alone; ``None`` draws afresh from torch's default generator at each call.
        injection: How the prelude output e enters each iteration with the state s. ``None``: not.
            ``"concat"``: linear map of [s, e]. ``"concat_injection_first"``: of [e, s]. ``"add"``:
            s + e. ``"gated_diagonal"``: s·exp(-Δ·exp(A)) + Δ·(e Bᵀ), Δ = softplus(dt) (Parcae).
        norm_between_iterations: The final norm is applied to the state after every iteration
            (Ouro). Without a coda the last of these is the final norm itself.
        norm_before_coda: The final norm is also applied once between core and coda (Huginn).
        exit_gate: A linear halting gate reads the state after each iteration (Ouro).
        exit_threshold: The exit of :meth:`LoopedTransformer.forward` when none is asked for: the
            first iteration whose cumulative exit probability reaches it; ``None``: the last.
        rotary_layout: ``"half"`` pairs dimension i with i + d/2, ``"interleaved"`` 2i with 2i + 1.
        rotary_reversed: Queries and keys are rotated by the negative angle (nanochat).
        rotary_table_dtype: Cosines and sines are rounded to this type, e.g. ``"bfloat16"``
            (nanochat), before they are used in float32; ``None``: not rounded.
        qk_norm: Norm of queries and keys. ``"full"``: over the whole projection with a weight,
            before heads are split and rotated (OLMo-2). ``"head"``: weightless per head, after
            the rotation (Parcae). ``"head_weight"``: per head with a weight that all heads share,
            before the rotation (Qwen3).
        qk_bias: Queries and keys have a bias (``b_Q``, ``b_K``), added before the rotation.
        attn_bias: Queries, keys, values and the attention output have biases.
        mlp_bias: The MLP has biases (``b_in``, ``b_out``).
        unembed_bias: The unembedding has a bias (``b_U``).
        embed_scale: Factor on the token embedding.
        padded_vocab: Token ids from this one on are padding of the vocabulary; ``None``: none are.
        norm_injection: The prelude output is normed, with a gain of its own, before it becomes the
            injection e (Parcae).
        linear_before_coda: The state goes through a linear map between core and coda (Parcae).
        value_embeddings: Every second physical layer, counted so that the last one is among them,
            adds an embedding of its own of the token to its values, gated by the first
            ``value_gate_channels`` channels of what the values read (Parcae).
        value_gate_channels: See ``value_embeddings``.
        step_embedding: What is added to the state before each iteration. ``"sinusoidal"``: a
            sinusoid of the iteration. ``"position_and_step"``: of the position and the iteration
            (Universal Transformer). ``"learned"``: a trained vector an iteration.
        halting: What the exit gate decides. ``None``: nothing in the forward pass; exits are asked
            for by call. ``"act"``: what leaves the loop is the sum of all states by their halting
            probabilities. ``"ponder"``: the halting distribution of PonderNet, for its loss.
        act_epsilon: ``"act"`` halts when the probabilities sum to 1 less this.
        router: ``"token_choice"``: a router gives every token a number of iterations
            (Mixture-of-Recursions).
        router_score: Its scores are a ``"softmax"`` over the depths, or each a ``"sigmoid"``.
        router_scale: Factor on the scores.
        router_gates: ``"every"``: the output of every iteration is multiplied by its score.
            ``"last"``: only the last one of a token.
        hyper_connections: Number of residual streams around the core, mixed after each iteration
            (Hyperloop); ``None``: one, as usual.
        kv_sharing: Which keys and values the iterations share; see
            :class:`~tl_loops.config.kv_sharing.KVSharing`. ``None``: each has its own.
        max_iterations: Iterations that learned step embeddings, the router and the
            hyper-connections have weights for; ``None``: ``n_iterations``.
        stacks: The two stacks, e.g. ``("L", "L", "L", "H")``, that the iterations of one cycle call
            (HRM). Each has ``n_core`` layers and a state of its own; an iteration is one call,
            which reads the sum of both states and replaces that of its stack. The stack that the
            cycle calls last is the slow one: its state is read out. ``n_iterations`` is a multiple
            of the cycle. ``None``: one stack, one state. With ``injection="add"`` e enters the
            calls of the other stack alone (HRM, TRM).
        shared_stacks: Both stacks are the same layers (TRM); their states stay two.
        slow_initial_state: The slow stack's state before iteration 0: ``"embed"`` (what the
            prelude, or the embedding, gives) or ``"learned"``. ``initial_state`` is the other's.
        attn_gate: What attention writes is gated, head by head and dimension by dimension, by the
            sigmoid of a linear map of what the queries read (HRM-Text).
        first_pass_window: From iteration 1 on, heads mix by a gate full attention to iteration 0's
            keys and values with attention to their own of this many positions (IQuest).
        state_gate_rank: An iteration leaves g·new + (1 - g)·old, with a gate g in each dimension
            that a map of this rank gives of new - old (LoopUS); ``None``: new.
        halt_head: A head reads new - old into a halting logit (LoopUS).
        time_conditioning: Blocks are modulated by how far the loop is (t / T) and by the size of
            its steps (1 / T): gates on what they write, scales on what they read (LoopFormer).
        block_norm_weight: Whether the norms of blocks have gains, where norms have any.
        final_norm: Whether the final norm is applied; without it what leaves the last block is read
            out as it is (HRM).
        n_extra_tokens: Embeddings behind the vocabulary that no logit stands for, such as names of
            puzzles (HRM); the token behind them is a row of zeros.
        extra_token_slices: How many of them are stored as one row.
        prefix_mask: The forward pass takes ``prefix_mask``, whose positions see each other in both
            directions (HRM-Text).

    Raises:
        ConfigError: A field is missing, out of range, contradicts another one, or asks for
            something that is not supported; the message names it and what to use instead.
    """

    n_layers: int = field(default=-1, kw_only=True)
    n_prelude: int = field(default=0, kw_only=True)
    n_core: int = field(default=1, kw_only=True)
    n_coda: int = field(default=0, kw_only=True)
    n_iterations: int = field(default=1, kw_only=True)
    block_norm: str = field(default="pre", kw_only=True)
    initial_state: str = field(default="embed", kw_only=True)
    initial_state_std: float = field(default=0.02, kw_only=True)
    state_seed: int | None = field(default=0, kw_only=True)
    injection: str | None = field(default=None, kw_only=True)
    norm_between_iterations: bool = field(default=False, kw_only=True)
    norm_before_coda: bool = field(default=False, kw_only=True)
    exit_gate: bool = field(default=False, kw_only=True)
    exit_threshold: float | None = field(default=None, kw_only=True)
    rotary_layout: str = field(default="half", kw_only=True)
    rotary_reversed: bool = field(default=False, kw_only=True)
    rotary_table_dtype: str | None = field(default=None, kw_only=True)
    qk_norm: str | None = field(default=None, kw_only=True)
    qk_bias: bool = field(default=False, kw_only=True)
    attn_bias: bool = field(default=False, kw_only=True)
    mlp_bias: bool = field(default=False, kw_only=True)
    unembed_bias: bool = field(default=False, kw_only=True)
    embed_scale: float = field(default=1.0, kw_only=True)
    padded_vocab: int | None = field(default=None, kw_only=True)
    norm_injection: bool = field(default=False, kw_only=True)
    linear_before_coda: bool = field(default=False, kw_only=True)
    value_embeddings: bool = field(default=False, kw_only=True)
    value_gate_channels: int = field(default=32, kw_only=True)
    step_embedding: str | None = field(default=None, kw_only=True)
    halting: str | None = field(default=None, kw_only=True)
    act_epsilon: float = field(default=0.01, kw_only=True)
    router: str | None = field(default=None, kw_only=True)
    router_score: str = field(default="softmax", kw_only=True)
    router_scale: float = field(default=1.0, kw_only=True)
    router_gates: str = field(default="every", kw_only=True)
    hyper_connections: int | None = field(default=None, kw_only=True)
    kv_sharing: str | None = field(default=None, kw_only=True)
    max_iterations: int | None = field(default=None, kw_only=True)
    stacks: tuple[str, ...] | None = field(default=None, kw_only=True)
    shared_stacks: bool = field(default=False, kw_only=True)
    slow_initial_state: str = field(default="embed", kw_only=True)
    attn_gate: bool = field(default=False, kw_only=True)
    prefix_mask: bool = field(default=False, kw_only=True)
    first_pass_window: int | None = field(default=None, kw_only=True)
    state_gate_rank: int | None = field(default=None, kw_only=True)
    halt_head: bool = field(default=False, kw_only=True)
    time_conditioning: bool = field(default=False, kw_only=True)
    block_norm_weight: bool = field(default=True, kw_only=True)
    final_norm: bool = field(default=True, kw_only=True)
    n_extra_tokens: int = field(default=0, kw_only=True)
    extra_token_slices: int = field(default=1, kw_only=True)
    # Llama-style values for fields that TransformerLens defaults to GPT-2's.
    act_fn: str = "silu"
    gated_mlp: bool = True
    normalization_type: str | None = "RMS"
    positional_embedding_type: str = "rotary"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_values(self)
        try:
            layout = self.layout
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if self.n_layers not in (-1, layout.n_layers):
            raise ConfigError(
                f"n_layers={self.n_layers} contradicts n_prelude + n_iterations * n_core + n_coda "
                f"= {layout.n_layers}; leave n_layers out"
            )
        self.n_layers = layout.n_layers
        if self.max_iterations is None and has_iteration_weights(self):
            self.max_iterations = self.n_iterations
        if self.n_key_value_heads == self.n_heads:
            self.n_key_value_heads = None
        # The base class accepts its own activation functions alone; ours were checked above.
        act_fn, self.act_fn = self.act_fn, "relu"
        super().__post_init__()
        self.act_fn = act_fn
        self.n_params = self.count_parameters()

    @property
    def layout(self) -> LoopLayout:
        """Coordinates and names of the unrolled blocks."""
        stacks = None
        if self.stacks is not None:
            stacks = self.stacks * (self.n_iterations // len(self.stacks))
        return LoopLayout(
            self.n_prelude, self.n_core, self.n_coda, self.n_iterations, stacks, self.shared_stacks
        )

    @property
    def slow_stack(self) -> str | None:
        """The stack whose state is read out; ``None`` without ``stacks``."""
        return None if self.stacks is None else self.stacks[-1]

    @property
    def notation(self) -> str:
        """The paper's notation, e.g. ``"(2, 4⊗8, 2)_I"`` (2604.11791, section 3)."""
        return self.layout.notation(injected=self.injection is not None)

    @property
    def n_physical_layers(self) -> int:
        """Number of distinct sets of block weights; does not grow with the iterations."""
        return self.layout.n_physical_layers

    def has_value_embedding(self, physical_layer: int) -> bool:
        """Whether a physical layer, counted through prelude, core and coda, has one.

        See ``value_embeddings``.
        """
        return self.value_embeddings and (self.n_physical_layers - 1 - physical_layer) % 2 == 0

    @property
    def state_is_whole(self) -> bool:
        """Whether the state (with the injection) is all that goes from an iteration to the next.

        Halting probabilities, routes, residual streams, shared keys, keys of iteration 0 and the
        state that a gate mixes in again are more: such a model cannot start in the middle of its
        loop.
        """
        others = (
            self.router,
            self.hyper_connections,
            self.kv_sharing,
            self.first_pass_window,
            self.state_gate_rank,
        )
        whole = self.halting != "act" and not self.halt_head
        return whole and all(other is None for other in others)

    @property
    def branch_norms(self) -> tuple[str, str]:
        """Names of the norms behind the attention and behind the MLP, where there are any."""
        return "ln1_post", "ln2_post"

    @property
    def norm_has_weight(self) -> bool:
        """Whether norms carry a trained gain (``"RMS"``, ``"LN"``) or not (``"...Pre"``)."""
        return self.normalization_type in ("RMS", "LN")

    def set_iterations(self, n_iterations: int) -> None:
        """Set ``n_iterations`` and with it ``n_layers``.

        Raises:
            ConfigError: ``n_iterations`` is not an integer of at least 1.
        """
        if isinstance(n_iterations, bool) or not isinstance(n_iterations, int) or n_iterations < 1:
            raise ConfigError(f"n_iterations must be an integer of at least 1, got {n_iterations}")
        check_iterations(self, n_iterations)
        check_cycles(self, n_iterations)
        layout = self.layout.with_iterations(n_iterations)
        self.n_iterations, self.n_layers = n_iterations, layout.n_layers

    def count_parameters(self) -> int:
        """Number of trained scalars, each physical weight counted once."""
        return sum(math.prod(tensor.shape) for tensor in physical_tensors(self).values())

    def describe(self) -> str:
        """The data flow of one forward pass in a few lines."""
        return data_flow(self)

    def set_seed_everywhere(self, seed: int) -> None:
        """Leave the global random state alone: ``seed`` feeds the model's own generator."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as a new dictionary; ``from_dict(to_dict())`` gives an equal config."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> "LoopedTransformerConfig":
        """Build a config from a dictionary of fields.

        Raises:
            ConfigError: A key is not a field (near matches are suggested) or a required one is
                missing.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for key in config_dict:
            if key not in names:
                hint = did_you_mean(key, names, "see LoopedTransformerConfig")
                raise ConfigError(f"unknown config field {key!r}; {hint}")
        required = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        missing = [name for name in required if name not in config_dict]
        if missing:
            raise ConfigError(f"config lacks the required field(s) {', '.join(missing)}")
        lists = {key: tuple(v) for key, v in config_dict.items() if isinstance(v, list)}
        return cls(**{**config_dict, **lists})  # JSON has no tuples

    def __repr__(self) -> str:
        return f"LoopedTransformerConfig:\n{self.describe()}"


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``: the form that JSON can hold."""
    return str(dtype).removeprefix("torch.")
