"""How many iterations a training step runs: a constant, or a draw for each step."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from tl_loops.arguments import check_at_least, checked, checked_fields


@runtime_checkable
class IterationDraw(Protocol):
    """A distribution over numbers of iterations."""

    def draw(self, generator: torch.Generator) -> int:
        """A number of iterations, at least 1."""
        ...

    @property
    def most(self) -> int:
        """The largest number that it can give."""
        ...


@checked_fields
@dataclass(frozen=True)
class ConstantIterations:
    """The same number at every step.

    Attributes:
        n: At least 1.

    Raises:
        ValueError: ``n`` is below 1.
    """

    n: int

    def __post_init__(self) -> None:
        check_at_least(1, n=self.n)

    @checked
    def draw(self, generator: torch.Generator) -> int:
        """``n``; the generator is not used."""
        return self.n

    @property
    def most(self) -> int:
        """``n``."""
        return self.n


@checked_fields
@dataclass(frozen=True)
class UniformIterations:
    """Every number from ``least`` to ``most`` equally often.

    Attributes:
        least: At least 1.
        most: At least ``least``; included.

    Raises:
        ValueError: The bounds do not go together.
    """

    least: int
    most: int

    def __post_init__(self) -> None:
        check_at_least(1, least=self.least)
        check_at_least(self.least, most=self.most)

    @checked
    def draw(self, generator: torch.Generator) -> int:
        """A draw."""
        return int(torch.randint(self.least, self.most + 1, (), generator=generator))


@checked_fields
@dataclass(frozen=True)
class PoissonIterations:
    """1 + Poisson(mean - 1), cut at ``most``.

    Attributes:
        mean: Mean before the cut, at least 1.
        most: Draws above it become it.

    Raises:
        ValueError: A number is out of its range.
    """

    mean: float | int
    most: int

    def __post_init__(self) -> None:
        check_at_least(1, mean=self.mean)
        check_at_least(1, most=self.most)

    @checked
    def draw(self, generator: torch.Generator) -> int:
        """A draw."""
        rate = torch.tensor(self.mean - 1.0, dtype=torch.float64)
        return min(1 + int(torch.poisson(rate, generator=generator)), self.most)


@checked_fields
@dataclass(frozen=True)
class LogNormalPoissonIterations:
    """1 + Poisson(λ) with a log-normal rate: mostly few iterations, with a heavy tail.

    τ ~ N(log(r) - σ²/2, σ²), λ = exp(τ), so that the mean before the cut is r + 1.

    Attributes:
        mean: r, above 0.
        most: Draws above it become it.
        sigma: σ, at least 0; 0 is a plain Poisson.

    Raises:
        ValueError: A number is out of its range.

    Source: Huginn, 2502.05171, section 3.3.
    """

    mean: float | int
    most: int
    sigma: float | int = 0.5

    def __post_init__(self) -> None:
        if not self.mean > 0:
            raise ValueError(f"mean must be above 0, got {self.mean}")
        check_at_least(1, most=self.most)
        check_at_least(0, sigma=self.sigma)

    @checked
    def draw(self, generator: torch.Generator) -> int:
        """A draw."""
        normal = torch.randn((), dtype=torch.float64, generator=generator)
        rate = torch.exp(math.log(self.mean) - self.sigma**2 / 2 + self.sigma * normal)
        return min(1 + int(torch.poisson(rate, generator=generator)), self.most)


@checked_fields
@dataclass(frozen=True)
class MixedIterations:
    """One of two draws, such as short runs that teach and long ones that hold what was taught.

    Attributes:
        first: A draw.
        second: Another one.
        share: Probability of the second one, from 0 to 1.

    Raises:
        ValueError: The share is out of its range.
    """

    first: IterationDraw
    second: IterationDraw
    share: float | int = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share must be a probability, from 0 to 1, got {self.share}")

    @checked
    def draw(self, generator: torch.Generator) -> int:
        """A draw."""
        second = float(torch.rand((), dtype=torch.float64, generator=generator)) < self.share
        return (self.second if second else self.first).draw(generator)

    @property
    def most(self) -> int:
        """The larger of both."""
        return max(self.first.most, self.second.most)
