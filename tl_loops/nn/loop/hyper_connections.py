"""Hyper-connections after each loop: several residual streams around one looped core."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_loops.config.config import LoopedTransformerConfig

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

    def __init__(self, cfg: LoopedTransformerConfig, device: torch.device | str | None = None):
        super().__init__()
        n, d = cfg.hyper_connections or 0, cfg.d_model
        rows = cfg.max_iterations or cfg.n_iterations
        self.n_streams, self.eps = n, cfg.eps
        self.W_gates = nn.Parameter(torch.empty(rows, n * d, 3 * n, dtype=cfg.dtype, device=device))
        self.b_gates = nn.Parameter(torch.empty(rows, 3 * n, dtype=cfg.dtype, device=device))
        self.W_E = nn.Parameter(torch.empty(rows, d, dtype=cfg.dtype, device=device))

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
        """The streams behind an iteration."""
        written = core + self.W_E[iteration]
        return keep.unsqueeze(-1) * streams + write.unsqueeze(-1) * written.unsqueeze(-2)
