"""Hyper-connections after each loop: several residual streams around one looped core."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_loops.errors import ConfigError
from tl_loops.layout.names import spec
from tl_loops.mechanisms.iteration_weights import n_rows
from tl_loops.mechanisms.mechanism import (
    LEAVES_ITERATION,
    LEAVES_LOOP,
    Config,
    Mechanism,
    Part,
    Run,
    Setting,
)
from tl_loops.mechanisms.tensors import PhysicalTensor, Tensors, add_parameters

Streams = Float[Tensor, "batch pos stream d_model"]
Gates = Float[Tensor, "batch pos stream"]


class StreamGates(NamedTuple):
    """How the streams meet one iteration: read (r), written to (w, in 0 to 2), kept (k)."""

    read: Gates
    write: Gates
    keep: Gates


class HyperConnections(nn.Module):
    """Input-dependent gates between the streams and the core, with weights of every iteration.

    With the streams S and z = rms(S) over all streams of a position (weightless):
    (r, w, k) = sigmoid(z W_t + b_t); the core reads Σ_n r_n S_n; with x what leaves it,
    S_n becomes k_n S_n + 2 w_n (x + E_t). All streams start as the initial state, and the coda
    reads their mean.

    Source: Hyperloop Transformers, 2604.21254: the streams are mixed after each loop, by gates that
    are diagonal in the streams. No code was released; initialisation is not the paper's.
    """

    W_gates: nn.Parameter
    b_gates: nn.Parameter
    W_E: nn.Parameter

    def __init__(self, cfg: Config, device: torch.device | str | None = None):
        super().__init__()
        self.n_streams, self.eps = cfg.hyper_connections or 0, cfg.eps
        weights = HYPER_CONNECTIONS.weights(cfg)
        add_parameters(self, weights, "hyper_connections", cfg.dtype, device)

    def start(self, state: Float[Tensor, "batch pos d_model"]) -> Streams:
        """The streams before iteration 0: copies of the state."""
        return state.unsqueeze(-2).expand(*state.shape[:-1], self.n_streams, -1)

    def gates(self, streams: Streams, iteration: int) -> StreamGates:
        """The gates of an iteration, from the streams that enter it."""
        flat = streams.flatten(-2)
        wide = flat if flat.dtype == torch.float64 else flat.float()
        z = F.rms_norm(wide, (wide.shape[-1],), eps=self.eps).to(flat.dtype)
        squashed = torch.sigmoid(z @ self.W_gates[iteration] + self.b_gates[iteration])
        read, write, keep = squashed.chunk(3, dim=-1)
        return StreamGates(read, 2 * write, keep)

    def read(self, streams: Streams, gate: Gates) -> Float[Tensor, "batch pos d_model"]:
        """What the core reads."""
        return (gate.unsqueeze(-1) * streams).sum(-2)

    def write(
        self,
        streams: Streams,
        core: Float[Tensor, "batch pos d_model"],
        write: Gates,
        keep: Gates,
        iteration: int,
    ) -> Streams:
        """The streams after an iteration."""
        written = core + self.W_E[iteration]
        return keep.unsqueeze(-1) * streams + write.unsqueeze(-1) * written.unsqueeze(-2)


class _Mix(Part):
    """Keeps the streams; an edit of the state moves all of them alike."""

    _streams: Tensor

    def read(self, t: int, x: Tensor) -> Tensor:
        self._unhooked = x
        return x

    def enter(self, t: int, state: Tensor) -> Tensor:
        hyper, hooks = self.run.model.hyper_connections, self.run.model.iter[t]
        if t == 0:
            self._streams = hyper.start(state)
        else:
            self._streams = self._streams + (state - self._unhooked).unsqueeze(-2)
        gates = hyper.gates(self._streams, t)
        self._write = hooks.hook_hyper_write(gates.write)
        self._keep = hooks.hook_hyper_keep(gates.keep)
        return hyper.read(self._streams, hooks.hook_hyper_read(gates.read))

    def leave(self, t: int, state: Tensor) -> Tensor:
        """The mean of the streams after an iteration: what the coda would read."""
        hyper = self.run.model.hyper_connections
        self._streams = hyper.write(self._streams, state, self._write, self._keep, t)
        return self._streams.mean(-2)

    def left(self, t: int, state: Tensor, unhooked: Tensor) -> Tensor:
        self._streams = self._streams + (state - unhooked).unsqueeze(-2)
        return state


class _HyperConnections(Mechanism):
    name = "hyper_connections"
    owners = ("hyper_connections",)
    settings = (
        Setting(
            "hyper_connections",
            int | None,
            None,
            "Number of residual streams around the core, mixed after each iteration (Hyperloop); "
            "``None``: one, as usual.",
        ),
    )
    points = tuple(
        spec(f"hook_hyper_{name}", "iteration", "batch pos stream", moment="before")
        for name in ("read", "write", "keep")
    )
    with_stacks = False

    def active(self, cfg: Config) -> bool:
        return cfg.hyper_connections is not None

    def decides(self, cfg: Config) -> dict[str, str]:
        return {**LEAVES_LOOP, **LEAVES_ITERATION}

    def check(self, cfg: Config) -> None:
        if cfg.hyper_connections is None:
            return
        if cfg.hyper_connections < 2:
            raise ConfigError(
                "hyper_connections is a number of streams of at least 2, got "
                f"{cfg.hyper_connections}"
            )
        if cfg.norm_between_iterations:
            raise ConfigError("hyper_connections and norm_between_iterations exclude each other")

    def has_rows(self, cfg: Config) -> bool:
        return cfg.hyper_connections is not None

    def describe(self, cfg: Config) -> list[str]:
        return [
            f"streams  {cfg.hyper_connections} streams S; r, w, k = σ(rms(S) W_t + b_t); "
            "x enters as Σ r S; S = k S + 2w (x + W_E[t]); s = mean S"
        ]

    def weights(self, cfg: Config) -> Tensors:
        n, d, rows = cfg.hyper_connections, cfg.d_model, n_rows(cfg)
        return {
            "hyper_connections.W_gates": PhysicalTensor((rows, n * d, 3 * n)),
            "hyper_connections.b_gates": PhysicalTensor((rows, 3 * n)),
            "hyper_connections.W_E": PhysicalTensor((rows, d)),
        }

    def modules(self, cfg: Config, device: Any) -> dict[str, nn.Module]:
        return {"hyper_connections": HyperConnections(cfg, device)}

    def part(self, run: Run) -> Part:
        return _Mix(run)

    def carries(self, cfg: Config) -> str:
        return "residual streams"

    def remixes(self, cfg: Config) -> bool:
        return True


HYPER_CONNECTIONS = _HyperConnections()
