"""Token-choice routing: how many iterations each token takes (Mixture-of-Recursions)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_loops.errors import ConfigError
from tl_loops.layout.names import spec
from tl_loops.mechanisms.iteration_weights import n_rows
from tl_loops.mechanisms.mechanism import (
    DECIDES_KEYS,
    LEAVES_ITERATION,
    LEAVES_LOOP,
    Config,
    Mechanism,
    Part,
    Run,
    Setting,
)
from tl_loops.mechanisms.tensors import Tensors, add_parameters, matrix
from tl_loops.mechanisms.words import exactly


class Router(nn.Module):
    """Scores of every depth for a token: ``softmax(s W)`` or ``sigmoid(s W)``, times a scale."""

    W: nn.Parameter

    def __init__(self, cfg: Config, device: torch.device | str | None = None):
        super().__init__()
        self.score, self.scale = cfg.router_score, cfg.router_scale
        add_parameters(self, ROUTER.weights(cfg), "router", cfg.dtype, device)

    def forward(self, s: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos depth"]:
        scores = F.linear(s, self.W.T)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        squashed = scores.softmax(-1) if self.score == "softmax" else scores.sigmoid()
        return squashed * self.scale


@dataclass
class Routing:
    """The routes of one run.

    With weights g over the depths and the depth i = argmax g of a token (counted from 0), the state
    after iteration t is

    - g_t f(s_t) for t < i (with ``router_gates="last"``: f(s_t)),
    - g_i f(s_t) + s_0 at t = i, where s_0 is what entered iteration 0,
    - unchanged for t > i.

    f attends to tokens that are still in the loop alone. A token that has left it attends to
    itself, and what it computes is dropped.

    Attributes:
        weights: g, [batch, pos, depth].
        depths: i of the new tokens, [batch, pos].
        key_depths: i of cached and new tokens, [batch, key].
        first: s_0.
        every: Whether every iteration is gated.

    Source: 2507.10524, section 2.2.1, token-choice routing, with recursion-wise keys and values;
    ``router_gates="last"`` is what the released training code computes.
    """

    weights: Float[Tensor, "batch pos depth"]
    depths: Int[Tensor, "batch pos"]
    key_depths: Int[Tensor, "batch key"]
    first: Float[Tensor, "batch pos d_model"]
    every: bool

    def context(self, base: Any, iteration: int) -> Any:
        """Positions and masks of one iteration."""
        batch, n_new = self.depths.shape
        n_keys = self.key_depths.shape[1]
        device = self.depths.device
        allowed = base.allowed
        if allowed is None:
            allowed = torch.ones(1, 1, n_new, n_keys, dtype=torch.bool, device=device)
            # One new token after a cache sees every key: the context then says not causal.
            allowed = allowed.tril(diagonal=n_keys - n_new) if base.causal else allowed
        itself = torch.eye(n_keys, dtype=torch.bool, device=device)[None, None, n_keys - n_new :]
        running = (self.depths >= iteration)[:, None, :, None]
        keys = (self.key_depths >= iteration)[:, None, None, :]
        allowed = torch.where(running, allowed & keys, itself).expand(batch, 1, n_new, n_keys)
        return replace(base, allowed=allowed)

    def weight(self, iteration: int) -> Float[Tensor, "batch pos 1"]:
        """What the core's output is multiplied with; 0 for tokens that have left the loop."""
        gate = self.weights[..., iteration : iteration + 1]
        if not self.every:
            gate = torch.where((self.depths == iteration).unsqueeze(-1), gate, 1.0)
        return gate * (self.depths >= iteration).unsqueeze(-1)

    def update(
        self,
        before: Float[Tensor, "batch pos d_model"],
        core: Float[Tensor, "batch pos d_model"],
        weight: Float[Tensor, "batch pos 1"],
        iteration: int,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The state after an iteration.

        Args:
            before: The state that entered it.
            core: What the core made of it.
            weight: From :meth:`weight`.
            iteration: Counted from 0.
        """
        depths = self.depths.unsqueeze(-1)
        moved = weight.to(core) * core
        moved = torch.where(depths == iteration, moved + self.first, moved)
        return torch.where(depths >= iteration, moved, before)


class _Route(Part):
    _routing: Routing | None = None

    def enter(self, t: int, state: Tensor) -> Tensor:
        """Fix every token's depth before iteration 0, and the masks of iteration t."""
        run = self.run
        self._entered = state
        if t == 0 or self._routing is None:
            weights = run.model.hook_router_weights(run.model.router(state))
            depths = key_depths = weights.argmax(-1)
            if run.past is not None:
                # Which cached keys are there depends on the depths of their tokens.
                known = getattr(run.past, "router_depths", None)
                key_depths = depths if known is None else torch.cat([known, depths], dim=1)
                if not run.past.frozen:
                    run.past.router_depths = key_depths
            every = run.cfg.router_gates == "every"
            self._routing = Routing(weights, depths, key_depths, state, every)
        self._allowed = self._routing.context(run.context, t).allowed
        return state

    def context(self, t: int, layer: int, context: Any, x: Tensor) -> Any:
        return context if self._routing is None else replace(context, allowed=self._allowed)

    def leave(self, t: int, state: Tensor) -> Tensor:
        if self._routing is None:
            return state
        weight = self.run.model.iter[t].hook_router_weight(self._routing.weight(t))
        return self._routing.update(self._entered, state, weight, t)


class _Router(Mechanism):
    name = "router"
    owners = ("router",)
    settings = (
        Setting(
            "router",
            str | None,
            None,
            '``"token_choice"``: a router gives every token a number of iterations '
            "(Mixture-of-Recursions).",
            choices=(None, "token_choice"),
            refused={
                "expert_choice": "is not causal: which tokens go on is a top-k over the whole "
                "sequence, so a later token changes earlier logits; use router='token_choice'"
            },
        ),
        Setting(
            "router_score",
            str,
            "softmax",
            'Its scores are a ``"softmax"`` over the depths, or each a ``"sigmoid"``.',
            choices=("softmax", "sigmoid"),
            of_the_weights=False,
        ),
        Setting("router_scale", float, 1.0, "Factor on the scores.", of_the_weights=False),
        Setting(
            "router_gates",
            str,
            "every",
            '``"every"``: the output of every iteration is multiplied by its score. ``"last"``: '
            "only the last one of a token.",
            choices=("every", "last"),
            of_the_weights=False,
        ),
    )
    points = (
        spec("hook_router_weights", "run", "batch pos depth", moment="loop"),
        spec("hook_router_weight", "iteration", "batch pos one"),
    )
    with_stacks = False
    own_keys = "routes decide which keys there are"

    def decides(self, cfg: Config) -> dict[str, str]:
        return {**LEAVES_LOOP, **LEAVES_ITERATION, **DECIDES_KEYS}

    def check(self, cfg: Config) -> None:
        if not cfg.router_scale > 0:
            raise ConfigError(f"router_scale must be above 0, got {cfg.router_scale}")
        if cfg.router is not None and cfg.norm_between_iterations:
            raise ConfigError("router and norm_between_iterations exclude each other")

    def check_iterations(self, cfg: Config, n_iterations: int) -> None:
        limit = cfg.max_iterations
        if cfg.router is not None and limit is not None and n_iterations != limit:
            raise ConfigError(
                f"the router shares tokens out among {limit} depths, so n_iterations is "
                f"max_iterations = {limit}, got {n_iterations}"
            )

    def has_rows(self, cfg: Config) -> bool:
        return cfg.router is not None

    def describe(self, cfg: Config) -> list[str]:
        scale = "" if cfg.router_scale == 1.0 else f"{exactly(cfg.router_scale)}·"
        gate = "g_t x" if cfg.router_gates == "every" else "x"
        return [
            f"router   g = {scale}{cfg.router_score}(s W), depth i = argmax g; "
            f"s = {gate} for t < i, g_i x + s_0 at t = i, then unchanged"
        ]

    def weights(self, cfg: Config) -> Tensors:
        return {"router.W": matrix(cfg.d_model, n_rows(cfg))}

    def modules(self, cfg: Config, device: Any) -> dict[str, nn.Module]:
        return {"router": Router(cfg, device)}

    def part(self, run: Run) -> Part:
        return _Route(run)

    def carries(self, cfg: Config) -> str:
        return "routes"

    def remixes(self, cfg: Config) -> bool:
        return True


ROUTER = _Router()
