"""How perplexity depends on depth, width and training tokens: the law, its fit and its intervals.

    L(D, W, N) = L0 + a·D^-α + b·W^-β + c·N^-γ

of Nemotron-Flash (Fu et al. 2025), in which L is the perplexity and not its logarithm. N is left
out where there is one token budget only.

*Fit.* Bounded non-linear least squares on relative errors: seeds move the logarithm of perplexity
by about as much everywhere. For given exponents the law is linear, and non-negative least squares
give L0, a, b and c at once, so that only the exponents are searched (variable projection, Golub and
Pereyra 1973), from several starts.

*Intervals.* Bootstrap of residuals over points and over seeds: every point of the design gets the
residuals of one that is drawn at random, and the seeds are drawn with replacement for all points
together, since a seed decides batches and their order for all alike (Owen 2007, who calls drawing
both ways at once the pigeonhole bootstrap, and shows it to be wide rather than narrow). The design
itself stays: drawn with replacement, a dozen points would often be too few for the fit.

Letters: M observations, F factors (depth and width, or depth, width and tokens), R resamples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

Array = NDArray[np.float64]

# No perplexity is less: the lowest that L0 may be.
MIN_OFFSET = 1.0
MIN_EXPONENT, MAX_EXPONENT = 0.05, 5.0
# Of each exponent; the search begins at every combination.
STARTS = (0.2, 0.8, 2.5)
# How near to its bound an exponent is at it.
AT_BOUND = 1e-3
NUM_RESAMPLES = 400
# With the names of their constants.
FACTORS = (("depth", "a", "α"), ("width", "b", "β"), ("tokens", "c", "γ"))


@dataclass(frozen=True)
class Observations:
    """What trainings gave: an entry per size, seed and token budget.

    factors: [M, F]. perplexity: [M]. sizes, seeds: [M], which of the sizes and of the seeds.
    """

    factors: Array
    perplexity: Array
    sizes: NDArray[np.int64]
    seeds: NDArray[np.int64]

    def where(self, chosen: NDArray[np.bool_]) -> Observations:
        """Some of them."""
        return Observations(
            self.factors[chosen], self.perplexity[chosen], self.sizes[chosen], self.seeds[chosen]
        )

    @property
    def num_constants(self) -> int:
        """Of the law that is fitted to them."""
        return 1 + 2 * self.factors.shape[1]

    @cached_property
    def points(self) -> tuple[Array, NDArray[np.int64]]:
        """The distinct combinations of factors [P, F], and which of them each is of [M]."""
        distinct, index = np.unique(self.factors, axis=0, return_inverse=True)
        return distinct, index.reshape(-1)

    def point_means(self, values: Array) -> Array:
        """Mean of values [M] over the seeds of each point [P]."""
        _, index = self.points
        return np.bincount(index, weights=values) / np.bincount(index)


@dataclass(frozen=True)
class Law:
    """L0 + Σ coefficient · factor^-exponent, the factors in the order of `FACTORS`."""

    offset: float
    coefficients: tuple[float, ...]
    exponents: tuple[float, ...]

    def perplexity(self, factors: Array) -> Array:
        """Of factors [..., F]: [...]."""
        powers = factors ** -np.array(self.exponents)
        total: Array = self.offset + powers @ np.array(self.coefficients)
        return total

    def constants(self) -> dict[str, float]:
        """By the names that the law is written with."""
        named = {"L0": self.offset}
        for (_, a, alpha), coefficient, exponent in self._terms():
            named |= {a: coefficient, alpha: exponent}
        return named

    def at_bounds(self) -> list[str]:
        """Which constants are at a bound, a sentence each."""
        found = []
        if self.offset <= MIN_OFFSET:
            found.append(f"L0 is at its bound {MIN_OFFSET:g}, the least a perplexity can be")
        for (factor, a, alpha), coefficient, exponent in self._terms():
            if coefficient == 0:
                found.append(f"{a} is at its bound 0: more {factor} lowers no perplexity")
                continue
            for bound in (MIN_EXPONENT, MAX_EXPONENT):
                if abs(exponent / bound - 1) < AT_BOUND:
                    found.append(f"{alpha} is at its bound {bound:g}")
        return found

    def _terms(self) -> Iterator[tuple[tuple[str, str, str], float, float]]:
        """Each factor's names, coefficient and exponent."""
        return zip(FACTORS, self.coefficients, self.exponents, strict=False)

    def jacobian(self, factors: Array) -> Array:
        """Derivatives [M, 1 + 2F] of the perplexities of factors [M, F] by the constants."""
        coefficients, exponents = np.array(self.coefficients), np.array(self.exponents)
        powers = factors**-exponents
        slopes = -coefficients * powers * np.log(factors)
        return np.concatenate([np.ones((len(factors), 1)), powers, slopes], axis=1)


def fit_law(observations: Observations, starts: Sequence[Sequence[float]] | None = None) -> Law:
    """The law nearest to the observations.

    starts: exponents to begin at; None: every combination of STARTS.
    """
    num_factors = observations.factors.shape[1]
    logs = np.log(observations.factors)
    # In units of their typical values, factors keep the problem well conditioned.
    centre = logs.mean(axis=0)
    weights = 1 / observations.perplexity
    target = 1 - MIN_OFFSET * weights

    def columns(exponents: Array) -> Array:
        powers = np.exp((centre - logs) * exponents)
        return np.concatenate([np.ones((len(powers), 1)), powers], axis=1) * weights[:, None]

    def errors(exponents: Array) -> Array:
        matrix = columns(exponents)
        relative: Array = matrix @ nnls(matrix, target)[0] - target
        return relative

    found = [
        least_squares(errors, start, bounds=(MIN_EXPONENT, MAX_EXPONENT))
        for start in starts or itertools.product(STARTS, repeat=num_factors)
    ]
    exponents = min(found, key=lambda result: result.cost).x
    offset, *scaled = nnls(columns(exponents), target)[0]
    coefficients = scaled * np.exp(centre * exponents)
    return Law(
        float(MIN_OFFSET + offset),
        tuple(map(float, coefficients)),
        tuple(map(float, exponents)),
    )


def relative_errors(observations: Observations, law: Law) -> Array:
    """What each observation has more than the law gives it, as a share of the latter [M]."""
    return observations.perplexity / law.perplexity(observations.factors) - 1


def bootstrap(
    observations: Observations, law: Law, seed: int, num_resamples: int = NUM_RESAMPLES
) -> list[Law]:
    """Laws fitted to resampled data; how they scatter is how far `law` can be off."""
    rng = np.random.default_rng(seed)
    expected = law.perplexity(observations.factors)
    residuals = relative_errors(observations, law)
    distinct, point_of = observations.points
    # What a fit has left of the errors of points is smaller than they are.
    num_points = len(distinct)
    free = max(1, num_points - observations.num_constants)
    means = observations.point_means(residuals)
    within = residuals - means[point_of]
    means *= np.sqrt(num_points / free)
    sizes, size_of = np.unique(observations.sizes, return_inverse=True)
    seeds, seed_of = np.unique(observations.seeds, return_inverse=True)
    budgets, budget_of = np.unique(observations.factors[:, 2:], axis=0, return_inverse=True)
    budget_of = budget_of.reshape(-1)
    # By size, budget and seed. Of a training that failed there is no residual but zero.
    of_points = np.zeros((len(sizes), len(budgets)))
    of_points[size_of, budget_of] = means[point_of]
    of_seeds = np.zeros((*of_points.shape, len(seeds)))
    of_seeds[size_of, budget_of, seed_of] = within
    found = []
    for _ in range(num_resamples):
        donors = rng.integers(len(sizes), size=len(sizes))[size_of]
        drawn = rng.integers(len(seeds), size=len(seeds))[seed_of]
        errors = of_points[donors, budget_of] + of_seeds[donors, budget_of, drawn]
        resampled = Observations(
            observations.factors, expected * (1 + errors), observations.sizes, observations.seeds
        )
        found.append(fit_law(resampled, starts=[law.exponents]))
    return found


def interval(values: Array) -> tuple[float, float]:
    """Between which 95 % of the values of resamples lie [R]."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
