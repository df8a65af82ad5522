"""How the prelude's output e enters each iteration with the state s."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_loops.errors import ConfigError
from tl_loops.layout.names import HookSpec, Place, norm_specs, spec
from tl_loops.mechanisms.mechanism import Config, Mechanism, OnPath, Part, Run, Setting
from tl_loops.mechanisms.norm import Norm
from tl_loops.mechanisms.tensors import Tensors, add_parameters, matrix, vector
from tl_loops.mechanisms.words import exactly
from tl_loops.upstream import unshared

_CONCATS, _DECAYS = ("concat", "concat_injection_first"), ("gated_diagonal", "orthogonal")
KINDS = (None, *_CONCATS, "add", "add_normed", *_DECAYS)


class Injection(nn.Module):
    """The injection's weights and maps, by ``cfg.injection``.

    The part that depends on e alone is computed once per forward pass (:meth:`prepare`) and shared
    by all iterations. Once e is fixed every kind is affine in s, or with ``"add_normed"`` in the
    normed s.
    """

    A_log: nn.Parameter
    dt_bias: nn.Parameter
    W_B: nn.Parameter
    W: nn.Parameter
    b: nn.Parameter | None
    _norm: Norm | None

    def __init__(self, cfg: Config, device: torch.device | str | None = None):
        super().__init__()
        self.kind, self.eps = cfg.injection, cfg.injection_eps
        # Without weights, and no child: its hook points are no part of a run.
        norm = Norm(cfg, weight=False) if self.kind == "add_normed" else None
        object.__setattr__(self, "_norm", norm)
        add_parameters(self, INJECTION.weights(cfg), "injection", cfg.dtype, device)
        if not cfg.injection_bias:
            self.register_parameter("b", None)

    @property
    def W_state(self) -> Float[Tensor, "d_model d_model"]:
        """The rows of the concatenation's map that the state meets."""
        d = self.W.shape[1]
        return self.W[:d] if self.kind == "concat" else self.W[d:]

    @property
    def W_injection(self) -> Float[Tensor, "d_model d_model"]:
        """The rows of the concatenation's map that e meets."""
        d = self.W.shape[1]
        return self.W[d:] if self.kind == "concat" else self.W[:d]

    def prepare(
        self, e: Float[Tensor, "*batch d_model"], norm: nn.Module | None = None
    ) -> Float[Tensor, "*batch d_model"]:
        """The additive part of the injected input, which e alone decides.

        Args:
            e: What the prelude gives.
            norm: With ``"add_normed"``: a norm whose hook points fire; ``None``: none do.
        """
        if self.kind == "add_normed":
            return self._normed(e, norm)
        if self.kind == "add":
            return e
        if self.kind in _DECAYS:
            return F.softplus(self.dt_bias) * F.linear(e, self.W_B.T)
        return F.linear(e, self.W_injection.T, self.b)

    def _normed(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        norm = self._norm if norm is None else norm
        assert norm is not None
        return norm(x)

    def carry(self, s: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The linear map of the state (with ``"add_normed"`` of the normed one) without e.

        ``carry(s) + prepare(e)`` is the input of an iteration; with ``"orthogonal"``,
        ``project(carry(s), prepare(e)) + prepare(e)``; with ``"add_normed"``,
        ``carry(norm(s)) + prepare(e)``.
        """
        if self.kind in ("add", "add_normed"):
            return s
        if self.kind in _DECAYS:
            return s * torch.exp(-F.softplus(self.dt_bias) * torch.exp(self.A_log))
        return F.linear(s, self.W_state.T)

    def project(
        self, v: Float[Tensor, "*batch d_model"], a: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        """``v - (v·a) / (a·a + ε) a``: v without its component along a, in float32 or better."""
        wide = torch.promote_types(v.dtype, torch.float32)
        v_, a_ = v.to(wide), a.to(wide)
        along = (v_ * a_).sum(-1, keepdim=True) / (a_.square().sum(-1, keepdim=True) + self.eps)
        return (v_ - along * a_).to(v.dtype)

    def forward(
        self,
        s: Float[Tensor, "*batch d_model"],
        prepared: Float[Tensor, "*batch d_model"],
        norm: nn.Module | None = None,
    ) -> Float[Tensor, "*batch d_model"]:
        """What enters an iteration.

        Args:
            s: The state.
            prepared: :meth:`prepare` of e.
            norm: With ``"add_normed"``: a norm whose hook points fire; ``None``: none do.
        """
        if self.kind == "add_normed":
            s = self._normed(s, norm)
        carried = self.carry(s)
        if self.kind == "orthogonal":
            carried = self.project(carried, prepared)
        return carried + prepared


class _Inject(Part):
    def __init__(self, run: Run):
        super().__init__(run)
        self._normed = run.cfg.injection == "add_normed"
        self._prepared: Tensor | None = None

    def _prepare(self, e: Tensor) -> Tensor:
        model = self.run.model
        return model.injection.prepare(e, model.ln_injection if self._normed else None)

    def begin(self, x: Tensor) -> Tensor:
        model = self.run.model
        x = model.ln_injection(x) if self.run.cfg.norm_injection else x
        x = model.hook_injection(unshared(x, model.hook_injection))
        self._prepared = self._prepare(x)
        return x

    def enter(self, t: int, state: Tensor) -> Tensor:
        if not enters(self.run.cfg, t):
            return state
        if self._prepared is None:  # The run starts inside the loop.
            self._prepared = self._prepare(self.run.injection)
        model = self.run.model
        norm = model.iter[t].ln_state if self._normed else None
        return model.injection(state, self._prepared, norm)


def enters(cfg: Config, iteration: int) -> bool:
    """Whether e enters an iteration: of two stacks, the calls of the fast one, unless of both."""
    if cfg.stacks is None or cfg.slow_injection:
        return True
    return cfg.stacks[iteration % len(cfg.stacks)] != cfg.slow_stack


def injection_in_words(cfg: Config, state: str = "s") -> str:
    """What enters an iteration, for ``describe()``: ``"x = s + e"``.

    Args:
        cfg: A config with an injection.
        state: What is injected into; a sum where there are two states.
    """
    factor = f"({state})" if " " in state else state
    bias, v, a = " + b" if cfg.injection_bias else "", f"{factor}·exp(-Δ·exp(A))", "Δ·(e Bᵀ)"
    along = f"(v·a) / (a·a + {exactly(cfg.injection_eps)})·a"
    return {
        "concat": f"x = [{state}, e] W{bias}",
        "concat_injection_first": f"x = [e, {state}] W{bias}",
        "add": f"x = {state} + e",
        "add_normed": f"x = ln_state({state}) + ln_injection(e)",
        "gated_diagonal": f"x = {v} + {a}",
        "orthogonal": f"v = {v}; a = {a}; x = v - {along} + a",
    }[cfg.injection]


class _InjectionMechanism(Mechanism):
    name = "injection"
    owners = ("ln_injection", "injection")
    settings = (
        Setting(
            "injection",
            str | None,
            None,
            "How the prelude output e enters each iteration with the state s. ``None``: not. "
            '``"concat"``: linear map of [s, e]. ``"concat_injection_first"``: of [e, s]. '
            '``"add"``: s + e. ``"add_normed"``: norm(s) + norm(e), without gains (Dory). '
            '``"gated_diagonal"``: s·exp(-Δ·exp(A)) + Δ·(e Bᵀ), Δ = '
            'softplus(dt) (Parcae). ``"orthogonal"``: v - (v·a) / (a·a + ε)·a + a with the v and a '
            'whose sum ``"gated_diagonal"`` is (2610.06833).',
            choices=KINDS,
        ),
        Setting(
            "injection_bias",
            bool,
            False,
            'The linear map of ``"concat"`` and ``"concat_injection_first"`` has a bias.',
        ),
        Setting(
            "injection_eps",
            float,
            1e-6,
            'ε of ``"orthogonal"``.',
            above=0,
            of_the_weights=False,
        ),
        Setting(
            "norm_injection",
            bool,
            False,
            "The prelude output is normed, with a gain of its own, before it becomes the injection "
            "e (Parcae).",
        ),
    )
    points = (
        spec("hook_injection", "run", "batch pos d_model", moment="loop", residual=True),
        *norm_specs("ln_injection", "run", moment="loop"),
        *norm_specs("ln_state", "iteration", moment="before"),
    )

    def active(self, cfg: Config) -> bool:
        return cfg.injection is not None

    def check(self, cfg: Config) -> None:
        if cfg.norm_injection and cfg.injection is None:
            raise ConfigError("norm_injection needs an injection")
        if cfg.norm_injection and cfg.injection == "add_normed":
            raise ConfigError("injection='add_normed' norms e already: leave norm_injection out")
        if cfg.injection_bias and cfg.injection not in _CONCATS:
            raise ConfigError(
                f"injection_bias needs injection='concat' or 'concat_injection_first', got "
                f"{cfg.injection!r}"
            )

    def phrases(self, cfg: Config) -> dict[str, str]:
        e = {"e": "ln_injection(x)"} if cfg.norm_injection else {}
        return {"enter": injection_in_words(cfg), **e}

    def points_of(self, cfg: Config, place: Place) -> tuple[HookSpec, ...]:
        return self.points[:1] if place == "run" else ()  # the norm has its own

    def norms(self, cfg: Config) -> tuple[str, ...]:
        return ("ln_injection",) if cfg.norm_injection else ()

    def weights(self, cfg: Config) -> Tensors:
        d = cfg.d_model
        if cfg.injection in _CONCATS:
            bias = {"injection.b": vector(d)} if cfg.injection_bias else {}
            return {"injection.W": matrix(2 * d, d), **bias}
        if cfg.injection in _DECAYS:
            return {
                "injection.A_log": vector(d),
                "injection.dt_bias": vector(d),
                "injection.W_B": matrix(d, d),
            }
        return {}

    def modules(self, cfg: Config, device: Any) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {"injection": Injection(cfg, device)}
        if cfg.injection == "add_normed":
            found["ln_injection"] = Norm(cfg, weight=False)
        return found

    def iteration_modules(self, cfg: Config, iteration: int) -> dict[str, nn.Module]:
        normed = cfg.injection == "add_normed" and enters(cfg, iteration)
        return {"ln_state": Norm(cfg, weight=False)} if normed else {}

    def part(self, run: Run) -> Part:
        return _Inject(run)

    def path(self, cfg: Config) -> OnPath:
        return OnPath()  # decompositions carry it as a linear map, once e is held


INJECTION = _InjectionMechanism()
