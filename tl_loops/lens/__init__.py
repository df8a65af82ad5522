"""Lenses: what the residual stream already says at each iteration and layer."""

from tl_loops.lens.decode import CodaLens, ExitLens, Lens, LogitLens
from tl_loops.lens.jacobian import JacobianLens, fit_jacobian_lens
from tl_loops.lens.points import LensPoint
from tl_loops.lens.read import coda_lens, exit_lens, logit_lens, read_lens
from tl_loops.lens.result import LensResult, TokenTrajectory
from tl_loops.lens.tracking import EntityTracks, rank_jumps, track_entities
from tl_loops.lens.tuned import TunedLens, train_tuned_lens
from tl_loops.metrics.lenses import (
    adjacent_agreement,
    logit_kurtosis,
    transport_similarity,
)
from tl_loops.metrics.lenses import (
    singular_value_participation as participation_ratio,
)

__all__ = [
    "CodaLens",
    "EntityTracks",
    "ExitLens",
    "JacobianLens",
    "Lens",
    "LensPoint",
    "LensResult",
    "LogitLens",
    "TokenTrajectory",
    "TunedLens",
    "adjacent_agreement",
    "coda_lens",
    "exit_lens",
    "fit_jacobian_lens",
    "logit_kurtosis",
    "logit_lens",
    "participation_ratio",
    "rank_jumps",
    "read_lens",
    "track_entities",
    "train_tuned_lens",
    "transport_similarity",
]
