"""Mean and variance that merge: of a stream, of shards, of a run that was interrupted."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.printing import prints_short


@prints_short
@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and squared deviations of samples, one set for each entry of a shape.

    A sample that is NaN or infinite is undefined: it is counted as such and enters neither mean nor
    deviation. Everything is float64. Merging is exact algebra (Chan, Golub and LeVeque 1983,
    "Algorithms for computing the sample variance", Eq. 2.1), so any split of the samples gives the
    same numbers up to rounding (about 1e-15 relative); the same split in the same order gives the
    same bits.

    Attributes:
        count: Number of defined samples, n.
        undefined: Number of undefined samples.
        mean: Mean of the defined samples; NaN without one.
        m2: Sum of squared deviations from the mean, 0 without a sample.
    """

    count: Int[Tensor, "*shape"]
    undefined: Int[Tensor, "*shape"]
    mean: Float[Tensor, "*shape"]
    m2: Float[Tensor, "*shape"]

    @classmethod
    def empty(cls, *shape: int) -> "Moments":
        """No sample yet; the neutral element of :meth:`merge`."""
        n, zero = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.float64)
        return cls(n, n.clone(), torch.full_like(zero, torch.nan), zero)

    @classmethod
    def of(cls, samples: Float[Tensor, "*shape sample"]) -> "Moments":
        """Moments along the last axis.

        Args:
            samples: NaN and infinities are undefined.

        Returns:
            Moments of shape ``[...]``, on the CPU.
        """
        # Moved first: some devices have no float64.
        x = samples.detach().cpu().double()
        defined = x.isfinite()
        n = defined.sum(-1)
        x = torch.where(defined, x, 0.0)
        mean = x.sum(-1) / n  # 0 / 0 is NaN
        deviation = torch.where(defined, x - mean.unsqueeze(-1), 0.0)
        return cls(n, (~defined).sum(-1), mean, deviation.square().sum(-1))

    def merge(self, other: "Moments") -> "Moments":
        """Moments of the samples of both.

        With δ = mean_B - mean_A and n = n_A + n_B: mean = mean_A + δ n_B / n and
        M2 = M2_A + M2_B + δ² n_A n_B / n.

        Raises:
            ValueError: The shapes differ.
        """
        if self.count.shape != other.count.shape:
            raise ValueError(
                f"moments of shape {list(self.count.shape)} and {list(other.count.shape)} are not "
                "about the same entries"
            )
        n = self.count + other.count
        delta = other.mean.nan_to_num(nan=0.0) - self.mean.nan_to_num(nan=0.0)
        # In float64: a quotient of integer tensors would be float32.
        share = other.count.double() / n.clamp(min=1)
        mean = self.mean.nan_to_num(nan=0.0) + delta * share
        return Moments(
            count=n,
            undefined=self.undefined + other.undefined,
            mean=torch.where(n > 0, mean, torch.nan),
            m2=self.m2 + other.m2 + delta.square() * self.count * share,
        )

    def std(self, ddof: int = 1) -> Float[Tensor, "*shape"]:
        """Standard deviation, sqrt(M2 / (n - ddof)).

        Args:
            ddof: 1 for the sample's (as pandas and torch), 0 for the population's (as numpy).

        Returns:
            ``[...]``; NaN where ``count <= ddof``.
        """
        freedom = self.count - ddof
        return torch.where(freedom > 0, (self.m2 / freedom).sqrt(), torch.nan)

    def scattered(self, index: Sequence[int], size: int) -> "Moments":
        """The entries of a one-dimensional shape at places of a longer one; no sample elsewhere."""
        whole = Moments.empty(size)
        where = torch.tensor(list(index), dtype=torch.int64)
        for name, values in self.tensors().items():
            getattr(whole, name)[where] = values
        return whole

    def tensors(self) -> dict[str, Tensor]:
        """The four tensors by name; ``Moments(**tensors)`` is the inverse."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
