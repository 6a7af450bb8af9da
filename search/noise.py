"""How far the seed alone moves a score, and which differences are more than that."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SeedNoise:
    """Standard deviation of a score over the seeds of one architecture, as if alike for all.

    deviation: in the unit of the score. low, high: its 95 % interval.
    degrees_of_freedom: scores that it comes from, less their architectures.
    """

    deviation: float
    low: float
    high: float
    degrees_of_freedom: int

    @property
    def least_difference(self) -> float:
        """What two scores of one seed each must differ by to be called different at 95 %."""
        from scipy import stats

        return math.sqrt(2) * float(stats.t.ppf(0.975, self.degrees_of_freedom)) * self.deviation


def seed_noise(scores: Sequence[Sequence[float]]) -> SeedNoise:
    """Pool the scatter within architectures; the interval is that of normal scores (chi-square).

    scores: for each architecture, those of its seeds. One with a single score tells nothing.
    Raises ValueError if a score is not finite, or if no architecture has two.
    """
    from scipy import stats

    groups = [np.asarray(group, dtype=np.float64) for group in scores if len(group) > 1]
    if not groups:
        raise ValueError("noise over seeds: needs an architecture with two scores or more")
    if not all(np.isfinite(group).all() for group in groups):
        raise ValueError("noise over seeds: a score is not finite")
    degrees = sum(len(group) - 1 for group in groups)
    squares = float(sum(np.square(group - group.mean()).sum() for group in groups))
    low, high = np.sqrt(squares / stats.chi2.ppf([0.975, 0.025], degrees))
    return SeedNoise(math.sqrt(squares / degrees), float(low), float(high), degrees)


def is_difference(a: float, b: float, noise: SeedNoise) -> bool:
    """Whether two scores of one seed each differ by more than seeds make them at 95 %."""
    return abs(a - b) > noise.least_difference


def mean_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % interval of the mean of normal values (Student 1908); None for fewer than two."""
    if len(values) < 2:
        return None, None
    from scipy import stats

    error = statistics.stdev(values) / math.sqrt(len(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    mean = statistics.fmean(values)
    return mean - half, mean + half
