"""What the tools are called on in the fuzz: small models, prompts and the caches of their runs."""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformerConfig

from tl_loops import (
    LoopedTransformer,
    LoopedTransformerConfig,
    circuits,
    exit_curve,
    lens,
    measure,
)
from tl_loops.report import default_prompts
from tl_loops.training import TrainingLog
from tl_loops.upstream import HookedTransformer

SIZES = dict(d_model=16, d_head=8, n_heads=2, d_mlp=32, d_vocab=20, n_ctx=12, seed=0)


@lru_cache
def tiny(n_iterations: int, dtype: torch.dtype) -> Any:
    """The embedded model: prelude, core, coda, injection, and a tokenizer."""
    model = LoopedTransformer.from_pretrained_no_processing(
        "tl-loops-tiny", n_iterations=n_iterations
    )
    return model.to(dtype).eval()


@lru_cache
def gated(n_iterations: int, dtype: torch.dtype) -> Any:
    """A core alone, with an exit gate and a norm between iterations."""
    cfg = LoopedTransformerConfig(
        n_core=2,
        n_iterations=n_iterations,
        exit_gate=True,
        norm_between_iterations=True,
        initializer_range=0.3,
        **SIZES,
    )
    return LoopedTransformer(cfg).to(dtype).eval()


@lru_cache
def pondering(n_iterations: int, dtype: torch.dtype) -> Any:
    """A core that halts by a gate."""
    fields = dict(halting="ponder", injection="add", exit_gate=True, initializer_range=0.3)
    cfg = LoopedTransformerConfig(n_core=2, n_iterations=n_iterations, **fields, **SIZES)
    return LoopedTransformer(cfg).to(dtype).eval()


@lru_cache
def settling(dtype: torch.dtype) -> Any:
    """A loop that is at its fixed point after 60 iterations."""
    fields = dict(injection="gated_diagonal", initial_state="zeros", initializer_range=0.1)
    cfg = LoopedTransformerConfig(n_core=1, n_iterations=60, **fields, **SIZES)
    model = LoopedTransformer(cfg)
    with torch.no_grad():
        model.injection.A_log.fill_(2.0)  # the state is forgotten quickly
    return model.to(dtype).eval()


@lru_cache
def feedforward() -> Any:
    """A model without a loop."""
    sizes = {**SIZES, "n_layers": 2, "act_fn": "gelu"}
    return HookedTransformer(HookedTransformerConfig(**sizes)).eval()


@lru_cache
def feedforward_cache(rows: int, n_pos: int) -> Any:
    """The cache of a run of it."""
    with torch.no_grad():
        return feedforward().run_with_cache(world(rows=rows, n_pos=n_pos).clean)[1]


@dataclass(frozen=True)
class World:
    """Prompts of one shape, and models of one depth and dtype.

    Attributes:
        rows: Number of prompts.
        n_pos: Number of tokens of each.
        n_iterations: Of both models.
        dtype: Of their weights and caches.
    """

    rows: int = 2
    n_pos: int = 5
    n_iterations: int = 3
    dtype: torch.dtype = torch.float32
    results: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def model(self) -> Any:
        return tiny(self.n_iterations, self.dtype)

    @property
    def gated(self) -> Any:
        return gated(self.n_iterations, self.dtype)

    @property
    def settling(self) -> Any:
        return settling(self.dtype)

    @property
    def pondering(self) -> Any:
        return pondering(self.n_iterations, self.dtype)

    @property
    def feedforward(self) -> Any:
        return feedforward()

    def _draw(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 20, (self.rows, self.n_pos), generator=generator)

    @cached_property
    def tokens(self) -> Tensor:
        return self._draw(0)

    @cached_property
    def clean(self) -> Tensor:
        return self._draw(1)

    @cached_property
    def cache(self) -> Any:
        with torch.no_grad():
            return self.model.run_with_cache(self.clean)[1]

    @cached_property
    def gated_cache(self) -> Any:
        with torch.no_grad():
            return self.gated.run_with_cache(self.clean)[1]

    @cached_property
    def cache_without_batch(self) -> Any:
        with torch.no_grad():
            return self.model.run_with_cache(self.clean[:1], remove_batch_dim=True)[1]

    @cached_property
    def profile(self) -> Any:
        names = ["residual_norm", "sink_rate"]
        return measure(self.model, list(self.clean), names, progress=False)

    @cached_property
    def gate_profile(self) -> Any:
        return measure(self.gated, list(self.clean), ["exit_probability"], progress=False)

    @cached_property
    def tuned(self) -> Any:
        prompts = list(self.clean)
        return lens.train_tuned_lens(self.model, prompts, n_steps=2, batch_size=2, progress=False)

    @cached_property
    def jacobian(self) -> Any:
        prompts = list(self.clean[:, :2])
        return lens.fit_jacobian_lens(
            self.model, prompts, points="states", target="penultimate", progress=False
        )

    @cached_property
    def reading(self) -> Any:
        with torch.no_grad():
            return lens.coda_lens(self.model, self.clean, track={"a": 3, "b": 4}, keep_logits=True)

    @cached_property
    def tracks(self) -> Any:
        with torch.no_grad():
            return lens.track_entities(self.model, self.clean, {"a": 3, "b": 4})

    @cached_property
    def scores(self) -> Any:
        metric, reference = _first_logit, self.cache
        return circuits.score(
            self.model, self.tokens, metric, reference=reference, n_steps=2, progress=False
        )

    @cached_property
    def circuit(self) -> Any:
        return circuits.prune(self.scores, 6)

    @cached_property
    def effects(self) -> Any:
        return circuits.PartEffects(("a", "b", "c"), torch.tensor([1.0, -3.0, 2.0]))

    @cached_property
    def training_log(self) -> Any:
        log = TrainingLog()
        log.add({"step": 1, "n_iterations": 2, "loss": 3.0}, [1.0, 2.0])
        return log

    @cached_property
    def exit_curve(self) -> Any:
        return exit_curve(self.model, list(self.clean), progress=False)

    @cached_property
    def default_prompts(self) -> Any:
        return default_prompts(self.model)


def _first_logit(logits: Tensor) -> Tensor:
    return logits[:, -1, 3].float().mean()


@lru_cache
def world(**shape: Any) -> World:
    """One of each, so that models and caches are made once."""
    return World(**shape)
